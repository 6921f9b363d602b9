// Matrix operations of a warp: ldmatrix and mma.sync, with the fragments of the PTX ISA ("Warp-level matrix instructions").
//
// In all of them lane = 4 * group + member. Products are exact and summed in double; only the result is rounded. Tensor cores
// round more often and in an order that nobody documents: results on a device differ in the last bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "collectives.h"
#include "memory.h"

namespace cuda_on_host {

// Loads `matrices` (1, 2 or 4) of 8 x 8 16-bit elements from shared memory. Lane 8 m + i gives the address of row i of matrix
// m; the addresses of further lanes do not matter. Of matrix m a lane gets r[m] = elements (group, 2 member) and
// (group, 2 member + 1), the first in the low half; of its transpose if `transposed`.
inline void ldmatrix(int matrices, bool transposed, uint32_t* r, const void* row, CUDA_ON_HOST_SITE) {
  struct Lane {
    uint32_t* r;
    uint16_t row[8];
  } mine{r, {}};
  const Site site{"ldmatrix", file, line};
  if (matrices != 1 && matrices != 2 && matrices != 4) fail(site, std::to_string(matrices) + " matrices; can be 1, 2 or 4");
  if (int(current->lane()) < 8 * matrices) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail(site, "row address is not a multiple of 16 bytes");
    if (!in_shared(*current->block, row, 16)) fail(site, "row not within an array of the block's shared memory");
    note_read(row, 16);
    Quiet quiet;
    std::memcpy(mine.row, row, 16);
  }
  warp_collective(kWholeWarp, site, mine, Orders::kNothing, [=](Lane** lanes) {
    for (int m = 0; m < matrices; ++m) {
      auto element = [&](int i, int j) { return uint32_t(transposed ? lanes[8 * m + j]->row[i] : lanes[8 * m + i]->row[j]); };
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, member = lane % 4;
        lanes[lane]->r[m] = element(group, 2 * member) | element(group, 2 * member + 1) << 16;
      }
    }
  });
}

inline double bf16_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline double f16_value(uint16_t bits) {
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}

// The hardware ignores the low 13 bits of an operand.
inline double tf32_value(uint32_t bits) {
  bits &= ~0x1fffu;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// What each lane brings to an mma of m16n8: C has 16 x 8 elements for all formats, and the same fragment.
struct MmaLane {
  float* c;
  const uint32_t *a, *b;
};

using Row = double __attribute__((vector_size(64)));  // 8 columns; GCC makes of it what the processor has

// C += A B, where A is 16 x kDepth and B kDepth x 8, both given by element.
template <int kDepth>
inline void multiply_add(MmaLane** lanes, const double (&a)[16][kDepth], const Row (&b)[kDepth]) {
  for (int row = 0; row < 16; ++row) {
    Row sums;
    auto c = [&](int column) -> float& { return lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2]; };
    for (int column = 0; column < 8; ++column) sums[column] = c(column);
    for (int k = 0; k < kDepth; ++k) sums += a[row][k] * b[k];
    for (int column = 0; column < 8; ++column) c(column) = float(sums[column]);
  }
}

template <double (*value)(uint16_t)>
inline void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, const Site& site) {
  MmaLane mine{c, a, b};
  warp_collective(kWholeWarp, site, mine, Orders::kNothing, [](MmaLane** lanes) {
    double a_elements[16][16];
    Row b_elements[16];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, member = lane % 4;
      auto element = [](const uint32_t* registers, int i) { return uint16_t(registers[i / 2] >> i % 2 * 16); };
      for (int i = 0; i < 8; ++i)  // registers alternate between rows group and group + 8; the last two are of k + 8
        a_elements[group + i / 2 % 2 * 8][2 * member + i % 2 + i / 4 * 8] = value(element(lanes[lane]->a, i));
      for (int i = 0; i < 4; ++i) b_elements[2 * member + i % 2 + i / 2 * 8][group] = value(element(lanes[lane]->b, i));
    }
    multiply_add<16>(lanes, a_elements, b_elements);
  });
}

// C (16 x 8, float) += A (16 x 16, by rows) B (16 x 8, by columns): c[4], a[4], b[2] are the calling lane's registers.
inline void mma_m16n8k16_bf16(float* c, const uint32_t* a, const uint32_t* b, CUDA_ON_HOST_SITE) {
  mma_m16n8k16<bf16_value>(c, a, b, {"mma.sync.bf16", file, line});
}

inline void mma_m16n8k16_f16(float* c, const uint32_t* a, const uint32_t* b, CUDA_ON_HOST_SITE) {
  mma_m16n8k16<f16_value>(c, a, b, {"mma.sync.f16", file, line});
}

// C (16 x 8, float) += A (16 x 8, by rows) B (8 x 8, by columns): c[4], a[4], b[2]. Operands are bits of floats.
inline void mma_m16n8k8_tf32(float* c, const uint32_t* a, const uint32_t* b, CUDA_ON_HOST_SITE) {
  MmaLane mine{c, a, b};
  warp_collective(kWholeWarp, Site{"mma.sync.tf32", file, line}, mine, Orders::kNothing, [](MmaLane** lanes) {
    double a_elements[16][8];
    Row b_elements[8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, member = lane % 4;
      for (int i = 0; i < 4; ++i) a_elements[group + i % 2 * 8][member + i / 2 * 4] = tf32_value(lanes[lane]->a[i]);
      for (int i = 0; i < 2; ++i) b_elements[member + i * 4][group] = tf32_value(lanes[lane]->b[i]);
    }
    multiply_add<8>(lanes, a_elements, b_elements);
  });
}

}  // namespace cuda_on_host
