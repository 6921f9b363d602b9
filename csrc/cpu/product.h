// The product at the heart of a step: rows of a state times a block of weights, into a small array of sums.
//
// A block is kLanes * kVectors columns wide. Three ways to get at the weights:
//   panel    packed once per call as [k][column], so that one register tile streams them in order;
//   columns  the same tile on a row-major matrix of the tile's own type, a row of it per k: nothing to pack;
//   dots     row-major weights whose rows are the columns of the product: sums over k in the lanes, for calls too short
//            to earn back the packing.
// All sums are of type F (float for 16-bit formats) and in an order that depends on the shape alone.
#pragma once
#include "vec.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

// A tile's sums stay in registers: leave four for the weights and the broadcast value.
constexpr int kTileVectors = FUSEDRNN_VECTOR_REGISTERS - 4;
// k per pass over the rows: 256 * 4 vectors * 32 bytes stay in a first-level cache of 32 KiB.
constexpr int64_t kTileDepth = 256;

// sums (kRows, kVectors * lanes) += a (kRows, k) b (k, kVectors * lanes). Few rows split k among several sums to keep the
// multiply-add units busy: at least 8 chains of dependent additions are needed (latency 4, two units).
template <class F, int kVectors, int kRows>
inline void tile(const F* a, int64_t a_row, const F* b, int64_t b_row, int64_t depth, F* sums) {
  using V = Vec<F>;
  constexpr int kLanes = V::kLanes;
  constexpr int kChains = kRows * kVectors >= 6 ? 1 : kRows * kVectors >= 3 ? 2 : 4;
  V c[kChains][kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      c[0][m][v] = load(sums + (m * kVectors + v) * kLanes);
#pragma GCC unroll 4
      for (int i = 1; i < kChains; ++i) c[i][m][v] = V(F(0));
    }
  int64_t k = 0;
  for (; k + kChains <= depth; k += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      V w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = load(b + (k + i) * b_row + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const V x(a[m * a_row + k + i]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) c[i][m][v] = x * w[v] + c[i][m][v];
      }
    }
  }
  for (; k < depth; ++k)
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        c[0][m][v] = V(a[m * a_row + k]) * load(b + k * b_row + v * kLanes) + c[0][m][v];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int i = 1; i < kChains; ++i) c[0][m][v] = c[0][m][v] + c[i][m][v];
      store(sums + (m * kVectors + v) * kLanes, c[0][m][v]);
    }
}

// The tile of a number of rows known only at run time, 1 to kRows.
template <class F, int kVectors, int kRows>
FUSEDRNN_INLINE void tile_of(int64_t rows, const F* a, int64_t a_row, const F* b, int64_t b_row, int64_t depth, F* sums) {
  if constexpr (kRows > 1)
    if (rows < kRows) return tile_of<F, kVectors, kRows - 1>(rows, a, a_row, b, b_row, depth, sums);
  tile<F, kVectors, kRows>(a, a_row, b, b_row, depth, sums);
}

// sums (rows, kVectors * lanes) += a (rows, depth) b (depth, kVectors * lanes), in passes over k that keep b in cache, in
// tiles of nearly equal height.
template <class F, int kVectors>
inline void multiply_columns(const F* a, int64_t a_row, int64_t rows, const F* b, int64_t b_row, int64_t depth, F* sums) {
  constexpr int kRows = kTileVectors / kVectors;
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    const int64_t pass = depth - k < kTileDepth ? depth - k : kTileDepth;
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t m = rows * i / tiles;
      tile_of<F, kVectors, kRows>(rows * (i + 1) / tiles - m, a + m * a_row + k, a_row, b + k * b_row, b_row, pass,
                                  sums + m * kVectors * Vec<F>::kLanes);
    }
  }
}

// sums[m][u] += dot of a's row m with w's row u, for kUnits rows of weights in their storage format S.
template <class F, class S, int kUnits, int kRows>
inline void dot_tile(const F* a, int64_t a_row, const S* w, int64_t w_row, int64_t depth, F* sums, int64_t sums_row) {
  using V = Vec<F>;
  V c[kRows][kUnits];
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) c[m][u] = V(F(0));
  auto step = [&](int64_t k, int n) __attribute__((always_inline)) {
    V x[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) x[m] = load(a + m * a_row + k);  // the state's rows end in zeros
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) {
      const V y = load(w + u * w_row + k, n);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) c[m][u] = x[m] * y + c[m][u];
    }
  };
  int64_t k = 0;
  for (; k + V::kLanes <= depth; k += V::kLanes) step(k, V::kLanes);
  if (k < depth) step(k, int(depth - k));
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) sums[m * sums_row + u] += sum_lanes(c[m][u]);
}

// Columns [0, columns) of sums (rows, sums_row) += a (rows, depth) w^T, w (columns, depth) row-major.
template <class F, class S>
inline void multiply_dots(const F* a, int64_t a_row, int64_t rows, const S* w, int64_t w_row, int64_t columns,
                          int64_t depth, F* sums, int64_t sums_row) {
  int64_t u = 0;
  auto pass = [&](auto units) __attribute__((always_inline)) {
    constexpr int kUnits = decltype(units)::value;
    int64_t m = 0;
    for (; m + 2 <= rows; m += 2)
      dot_tile<F, S, kUnits, 2>(a + m * a_row, a_row, w + u * w_row, w_row, depth, sums + m * sums_row + u, sums_row);
    for (; m < rows; ++m)
      dot_tile<F, S, kUnits, 1>(a + m * a_row, a_row, w + u * w_row, w_row, depth, sums + m * sums_row + u, sums_row);
    u += kUnits;
  };
  while (u + 4 <= columns) pass(Constant<4>{});
  while (u < columns) pass(Constant<1>{});
}

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
