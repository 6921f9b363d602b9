// Matrix operations: fragments lie as the PTX ISA says, and products by tiles equal those of plain C++ in double.
#pragma once
#include "self_test.h"

namespace self_test {

inline Plant row_misaligned{"row_misaligned", "fragments"}, half_a_warp{"half_a_warp", "fragments"},
    no_barrier_in_gemm{"no_barrier_in_gemm", "gemm_bf16"};

// ------------------------------------------------------------------------------------------------------- fragments

// Element (i, j) of matrix m has the value 64 m + 8 i + j.
__global__ void load_matrices(uint32_t* results) {
  constexpr int kStride = 8;
  uint16_t* matrices = take<uint16_t>(4 * 64 + 8);
  for (unsigned i = threadIdx.x; i < 4 * 64; i += 32) matrices[i] = uint16_t(i);
  __syncwarp();
  const uint16_t* row = matrices + threadIdx.x * kStride + (row_misaligned && threadIdx.x == 9 ? 1 : 0);
  int at = 0;
  for (bool transposed : {false, true})
    for (int count : {1, 2, 4}) {
      if (half_a_warp && count == 4 && threadIdx.x >= 16) continue;
      ldmatrix(count, transposed, results + (threadIdx.x * 6 + at++) * 4, row);
    }
}

inline void fragments(test::Random&) {
  Array<uint32_t> got(32 * 6 * 4);
  launch(grid("load_matrices", 1, 32, 1024), [&] { load_matrices(got.data); });
  synchronize();
  for (int lane = 0; lane < 32; ++lane)
    for (int which = 0; which < 6; ++which)
      for (int m = 0; m < (which % 3 == 0 ? 1 : which % 3 == 1 ? 2 : 4); ++m) {
        const int row = lane / 4, column = lane % 4 * 2, step = which < 3 ? 1 : 8;
        const uint32_t low = uint32_t(64 * m + (which < 3 ? 8 * row + column : 8 * column + row));
        const uint32_t want = low | (low + uint32_t(step)) << 16;
        CHECK(got[size_t((lane * 6 + which) * 4 + m)] == want, "lane %d, load %d, matrix %d", lane, which, m);
      }
}

// ------------------------------------------------------------------------------------------------------- products

struct Bf16 {
  using Element = __nv_bfloat16;
  static constexpr int kDepth = 16;
  static Element make(float x) { return __float2bfloat16_rn(x); }
  static double value(Element x) { return __bfloat162float(x); }
  static void mma(float* c, const uint32_t* a, const uint32_t* b) { mma_m16n8k16_bf16(c, a, b); }
};

struct F16 {
  using Element = __half;
  static constexpr int kDepth = 16;
  static Element make(float x) { return __float2half_rn(x); }
  static double value(Element x) { return __half2float(x); }
  static void mma(float* c, const uint32_t* a, const uint32_t* b) { mma_m16n8k16_f16(c, a, b); }
};

struct Tf32 {
  using Element = float;
  static constexpr int kDepth = 8;
  static Element make(float x) { return x; }
  static double value(Element x) {  // of which the hardware sees 10 bits of mantissa
    int exponent;
    const double mantissa = std::frexp(double(x), &exponent);
    return std::ldexp(std::trunc(mantissa * 2048) / 2048, exponent);
  }
  static void mma(float* c, const uint32_t* a, const uint32_t* b) { mma_m16n8k8_tf32(c, a, b); }
};

constexpr int kM = 32, kN = 24, kK = 48;

// c (kM, kN) = a (kM, kK) times b (kN, kK) transposed, a warp to each tile of 16 x 8. If `by_ldmatrix`, 16-bit fragments come
// by ldmatrix, else each lane reads the elements that the PTX ISA gives it.
template <class Format>
__global__ void multiply(const typename Format::Element* a, const typename Format::Element* b, float* c, bool by_ldmatrix) {
  using Element = typename Format::Element;
  constexpr int kPair = 4 / sizeof(Element);             // elements of a register
  constexpr int kStride = kK + 16 / int(sizeof(Element));  // rows begin at multiples of 16 bytes, in different banks
  constexpr int kVector = 16 / int(sizeof(Element));
  Element* a_tile = take<Element>(16 * kStride);
  Element* b_tile = take<Element>(kN * kStride);
  const int row0 = int(blockIdx.x) * 16, column0 = int(threadIdx.y) * 8;
  const int lane = int(threadIdx.x), group = lane / 4, member = lane % 4;
  const int thread = lane + 32 * int(threadIdx.y), threads = 32 * int(blockDim.y);
  for (int i = thread; i < 16 * kK / kVector; i += threads)
    cp_async(a_tile + i * kVector / kK * kStride + i * kVector % kK, a + row0 * kK + i * kVector, 16, 16);
  for (int i = thread; i < kN * kK / kVector; i += threads)
    cp_async(b_tile + i * kVector / kK * kStride + i * kVector % kK, b + i * kVector, 16, 16);
  cp_async_commit();
  cp_async_wait(0);
  if (!no_barrier_in_gemm) __syncthreads();
  float sums[4] = {};
  for (int k = 0; k < kK; k += Format::kDepth) {
    uint32_t fa[4], fb[2];
    if (by_ldmatrix && kPair == 2) {
      ldmatrix(4, false, fa, a_tile + lane % 16 * kStride + k + lane / 16 * 8);
      ldmatrix(2, false, fb, b_tile + (column0 + lane % 8) * kStride + k + lane / 8 % 2 * 8);
    } else {
      for (int r = 0; r < 4; ++r)
        std::memcpy(&fa[r], a_tile + (group + r % 2 * 8) * kStride + k + member * kPair + r / 2 * Format::kDepth / 2, 4);
      for (int r = 0; r < 2; ++r)
        std::memcpy(&fb[r], b_tile + (column0 + group) * kStride + k + member * kPair + r * Format::kDepth / 2, 4);
    }
    Format::mma(sums, fa, fb);
  }
  for (int r = 0; r < 4; ++r) c[(row0 + group + r / 2 * 8) * kN + column0 + member * 2 + r % 2] = sums[r];
}

template <class Format>
void gemm(test::Random& random) {
  using Element = typename Format::Element;
  Array<Element> a(kM * kK), b(kN * kK);
  for (size_t i = 0; i < a.size; ++i) a[i] = Format::make(float(random.uniform(-1, 1)));
  for (size_t i = 0; i < b.size; ++i) b[i] = Format::make(float(random.uniform(-1, 1)));
  for (bool by_ldmatrix : {false, true}) {
    Array<float> c(kM * kN);
    launch(grid("multiply", kM / 16, dim3(32, kN / 8), 32 << 10),
           [&] { multiply<Format>(a.data, b.data, c.data, by_ldmatrix); });
    synchronize();
    check_all("c", c, [&](size_t i) {
      double sum = 0;
      for (size_t k = 0; k < kK; ++k) sum += Format::value(a[i / kN * kK + k]) * Format::value(b[i % kN * kK + k]);
      return sum;
    }, 1e-6 * kK / Format::kDepth);
  }
}

}  // namespace self_test
