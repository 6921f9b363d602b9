// The product at the heart of a step: rows of a state times a block of weights, into a small array of sums.
//
// Two ways to get at the weights:
//   panels   packed once per call, kPanelVectors vectors of columns in each, as [k][column], so that a register tile streams
//            them in order;
//   dots     row-major weights whose rows are the columns of the product: sums over k in the lanes, for calls too short
//            to earn back the packing.
// All sums are of type F (float for 16-bit formats) and in an order that depends on the shape alone.
#pragma once
#include "vec.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

// A tile of kTileRows by kPanelVectors sums stays in registers: leave four for the weights and the broadcast value. Two vectors
// and many rows read less from the cache than a squarer tile: 80 GF/s a core where four vectors by three rows have 62 (AVX2).
constexpr int kPanelVectors = 2;
constexpr int kTileRows = (FUSEDRNN_VECTOR_REGISTERS - 4) / kPanelVectors;
// k per pass over the rows: 256 * 2 vectors * 32 bytes are half of a first-level cache of 32 KiB.
constexpr int64_t kTileDepth = 256;

// sums (kRows, panel) += a (kRows, depth) panel (depth, panel). Few rows split k among several sums to keep the multiply-add
// units busy: at least 8 chains of dependent additions are needed (latency 4, two units). kColumns: a is (depth, kRows) and dense.
template <class F, int kRows, bool kColumns = false>
inline void tile(const F* a, int64_t a_row, const F* panel, int64_t depth, F* sums, int64_t sums_row) {
  using V = Vec<F>;
  constexpr int kVectors = kPanelVectors, kLanes = V::kLanes, kWidth = kVectors * kLanes;
  constexpr int kChains = kRows * kVectors >= 6 ? 1 : kRows * kVectors >= 3 ? 2 : 4;
  V c[kChains][kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) c[i][m][v] = V(F(0));
  auto value = [&](int64_t m, int64_t k) __attribute__((always_inline)) {
    return V(kColumns ? a[k * kRows + m] : a[m * a_row + k]);
  };
  int64_t k = 0;
  for (; k + kChains <= depth; k += kChains) {
#pragma GCC unroll 4
    for (int i = 0; i < kChains; ++i) {
      V w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = load(panel + (k + i) * kWidth + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const V x = value(m, k + i);
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
        c[0][m][v] = value(m, k) * load(panel + k * kWidth + v * kLanes) + c[0][m][v];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
      for (int i = 1; i < kChains; ++i) c[0][m][v] = c[0][m][v] + c[i][m][v];
      store(sums + m * sums_row + v * kLanes, load(sums + m * sums_row + v * kLanes) + c[0][m][v]);
    }
}

// The tile of a number of rows known only at run time, 1 to kRows.
template <class F, int kRows = kTileRows>
FUSEDRNN_INLINE void tile_of(int64_t rows, const F* a, int64_t a_row, const F* panel, int64_t depth, F* sums, int64_t sums_row) {
  if constexpr (kRows > 1)
    if (rows < kRows) return tile_of<F, kRows - 1>(rows, a, a_row, panel, depth, sums, sums_row);
  tile<F, kRows>(a, a_row, panel, depth, sums, sums_row);
}

// Weights that fill more than this are read ahead of their use, from a cache that all cores share or from memory: 10 to 20 %
// at 16 MiB, where two threads measured 104 GF/s without and 120 with it; nothing at 4 MiB; a loss of 5 % below 1 MiB.
constexpr int64_t kNearBytes = 4 << 20;

FUSEDRNN_INLINE void prefetch(const char* begin, const char* end) {
  for (; begin < end; begin += 64) __builtin_prefetch(begin, 0, 2);
}

// sums (rows, kPanels panels) += a (rows, depth) times kPanels panels, in passes over k that keep what they read of a and of a
// panel in cache, in tiles of nearly equal height. Panels lie pass by pass, as they are read: (passes, kPanels, k, panel).
// far: beyond kNearBytes; each tile asks for its part of what the next pass over a panel will read.
template <class F, int kPanels>
inline void multiply_panels(const F* a, int64_t a_row, int64_t rows, const F* panels, bool far, int64_t depth, F* sums) {
  constexpr int kWidth = kPanelVectors * Vec<F>::kLanes;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    const int64_t pass = depth - k < kTileDepth ? depth - k : kTileDepth, bytes = pass * kWidth * int64_t(sizeof(F));
    for (int panel = 0; panel < kPanels; ++panel) {
      const F* weights = panels + (k * kPanels + panel * pass) * kWidth;
      const char* next = reinterpret_cast<const char*>(weights) + bytes;
      for (int64_t i = 0; i < tiles; ++i) {
        if (far && tiles > 1) prefetch(next + bytes * i / tiles, next + bytes * (i + 1) / tiles);
        const int64_t m = rows * i / tiles;
        tile_of<F>(rows * (i + 1) / tiles - m, a + m * a_row + k, a_row, weights, pass, sums + (m * kPanels + panel) * kWidth,
                   kPanels * kWidth);
      }
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
