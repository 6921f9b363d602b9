// How a warp multiplies weights by states, for each format: which numbers go through which units of the chip, and in what
// order they lie in memory so that a lane's share of a block is 16 bytes, or twice 16 bytes, in one piece.
//
// All kinds of arithmetic leave the sums (16 rows of weights, 8 columns of states) in the same lanes: with g = lane / 4 and
// t = lane % 4, sum[0..3] are (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). A kernel is written once for all of them.
//
// An arithmetic is a struct with
//   Storage                  the format of the tensors
//   Element                  the format of the packed weights and states that are multiplied
//   Sum                      the format of sums and of the cell
//   kDepth                   how far a block of weights (16, kDepth) and of states (8, kDepth) reaches
//   weight_at, state_at      where in its block a number lies: (row, k), (column, k)
//   Weights, States          a lane's share of a block: share(lane), where it begins, and load, from there
//   multiply_add             by a whole warp
#pragma once
#include "plan.h"
#include "prims.cuh"

namespace fusedrnn {

constexpr int kRows = kUnits, kColumns = kTileRows, kLanes = kWarp;  // of a block of sums; of a warp

// ---- Formats ----

FUSEDRNN_DEVICE float widen(float x) { return x; }
FUSEDRNN_DEVICE double widen(double x) { return x; }
FUSEDRNN_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
FUSEDRNN_DEVICE float widen(__half x) { return __half2float(x); }

template <class To, class From>
FUSEDRNN_DEVICE To narrow(From x) {
  return To(x);
}
template <>
FUSEDRNN_DEVICE __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
FUSEDRNN_DEVICE __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}

// To the nearest TF32 number, which has 10 bits behind the leading one; ties away from zero, as cvt.rna does. Infinities and
// NaN stay.
FUSEDRNN_DEVICE float round_to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
  else if (bits & 0x7fffffu) bits |= 0x400000u;  // a NaN whose mark is in the bits that are left out stays one
  memcpy(&x, &bits, sizeof bits);
  return x;
}

struct alignas(16) Sixteen {  // bytes that are loaded at once
  uint32_t word[4];
};

// ---- The ordinary units: every product and sum in the tensors' own format ----

template <class F>
struct FmaArithmetic {
  using Storage = F;
  using Element = F;
  using Sum = F;
  static constexpr int kDepth = int(sizeof(Sixteen) / sizeof(F));  // as block_depth says in plan.h
  static FUSEDRNN_DEVICE int weight_at(int row, int k) { return row * kDepth + k; }
  static FUSEDRNN_DEVICE int state_at(int column, int k) { return column * kDepth + k; }
  static FUSEDRNN_DEVICE Element element(Sum x) { return x; }

  struct alignas(16) Run {
    F at[kDepth];
  };
  struct Weights {
    Run row[2];  // g and g + 8
    static FUSEDRNN_DEVICE int share(int lane) { return weight_at(lane / 4, 0); }
    FUSEDRNN_DEVICE void load(const Element* from) {
      const Run* runs = reinterpret_cast<const Run*>(from);
      row[0] = runs[0];
      row[1] = runs[8];
    }
  };
  struct States {
    Run column[2];  // 2t and 2t + 1
    static FUSEDRNN_DEVICE int share(int lane) { return state_at(2 * (lane % 4), 0); }
    FUSEDRNN_DEVICE void load(const Element* from) {
      const Run* runs = reinterpret_cast<const Run*>(from);
      column[0] = runs[0];
      column[1] = runs[1];
    }
  };
  static FUSEDRNN_DEVICE void multiply_add(Sum (&sum)[4], const Weights& weights, const States& states) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = fma(weights.row[i / 2].at[k], states.column[i % 2].at[k], sum[i]);
  }
};

// ---- The matrix units: products of 16-bit numbers, or of TF32 numbers, summed in float ----

template <class S, class E>
struct MatrixArithmetic {
  using Storage = S;
  using Element = E;
  using Sum = float;
  static constexpr int kPack = int(sizeof(uint32_t) / sizeof(E));  // numbers to a register
  static constexpr int kMmaDepth = 8 * kPack, kDepth = 2 * kMmaDepth;

  // Which register and which part of it holds column k of a row, of one mma; see prims::mma.
  static FUSEDRNN_DEVICE int lane_of(int row, int k) { return row % 8 * 4 + k % (4 * kPack) / kPack; }
  static FUSEDRNN_DEVICE int weight_at(int row, int k) {
    const int mma = k / kMmaDepth, within = k % kMmaDepth, word = row / 8 + 2 * (within / (4 * kPack));
    return ((mma * kLanes + lane_of(row, within)) * 4 + word) * kPack + within % kPack;
  }
  static FUSEDRNN_DEVICE int state_at(int column, int k) {
    const int mma = k / kMmaDepth, within = k % kMmaDepth, word = 2 * mma + within / (4 * kPack);
    return (lane_of(column, within) * 4 + word) * kPack + within % kPack;
  }
  static FUSEDRNN_DEVICE Element element(Sum x) {
    if constexpr (sizeof(E) == sizeof(float)) return round_to_tf32(x);
    else return narrow<Element>(x);
  }

  struct Weights {
    Sixteen of[2];  // the two mma of a block
    static FUSEDRNN_DEVICE int share(int lane) { return lane * 4 * kPack; }
    FUSEDRNN_DEVICE void load(const Element* from) {
      const Sixteen* shares = reinterpret_cast<const Sixteen*>(from);
      of[0] = shares[0];
      of[1] = shares[kLanes];
    }
  };
  struct States {
    Sixteen both;
    static FUSEDRNN_DEVICE int share(int lane) { return lane * 4 * kPack; }
    FUSEDRNN_DEVICE void load(const Element* from) { both = *reinterpret_cast<const Sixteen*>(from); }
  };
  static FUSEDRNN_DEVICE void multiply_add(Sum (&sum)[4], const Weights& weights, const States& states) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t part[2] = {states.both.word[2 * i], states.both.word[2 * i + 1]};
      prims::mma(Element{}, sum, weights.of[i].word, part);
    }
  }
};

using Float32 = FmaArithmetic<float>;
using Float64 = FmaArithmetic<double>;
using Tf32 = MatrixArithmetic<float, float>;
using BFloat16 = MatrixArithmetic<__nv_bfloat16, __nv_bfloat16>;
using Float16 = MatrixArithmetic<__half, __half>;

}  // namespace fusedrnn
