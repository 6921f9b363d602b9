// The end of a step of a row of the batch, where each unit needs sums over all units: one block a row, whose threads take units in
// turn. The sums are always added in the same order, so that a call gives the same bits every time.
#pragma once
#include "../cells/cell.h"
#include "plan.h"
#include "prims.cuh"

namespace fusedrnn {

// Sums over all threads of a block.
template <class Sum>
struct RowSums {
  static constexpr int kMost = 2;  // at once
  Sum* memory;                     // (2, kMost, warps) the parts of a sum, and of the one before
  int turn = 0;

  static int64_t bytes(int threads) { return 2 * kMost * threads / kWarp * int64_t(sizeof(Sum)); }
  FUSEDRNN_DEVICE RowSums(prims::Shared& shared) { memory = shared.template take<Sum>(2 * kMost * (blockDim.x / kWarp)); }

  // Each number becomes the sum of those of all threads. Called by all threads of the block.
  template <int kCount>
  FUSEDRNN_DEVICE void add(Sum (&number)[kCount]) {
    static_assert(kCount <= kMost);
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    Sum* parts = memory + turn * kMost * warps;
    turn = 1 - turn;  // others may still read the parts of the sum before this one
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int bits = kWarp / 2; bits > 0; bits /= 2) number[i] += prims::of_lane_across(number[i], bits);
      if (threadIdx.x % kWarp == 0) parts[i * warps + warp] = number[i];
    }
    prims::block_sync();  // the parts are there
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      number[i] = parts[i * warps];
      for (int other = 1; other < warps; ++other) number[i] += parts[i * warps + other];
    }
  }
};

// Calls fn(unit) for this thread's units.
template <class Fn>
FUSEDRNN_DEVICE void for_own_units(int units, const Fn& fn) {
  for (int u = threadIdx.x; u < units; u += blockDim.x) fn(u);
}

// What normalises `each` numbers of every unit, number(u, i). The variance is that from the mean, in a pass of its own.
template <class Sum, class Number>
FUSEDRNN_DEVICE Norm<Sum> norm_of(RowSums<Sum>& sums, int units, int each, const Number& number) {
  const Sum count = Sum(units * each);
  Sum mean[1] = {}, variance[1] = {};
  for_own_units(units, [&](int u) {
    for (int i = 0; i < each; ++i) mean[0] += number(u, i);
  });
  sums.add(mean);
  mean[0] /= count;
  for_own_units(units, [&](int u) {
    for (int i = 0; i < each; ++i) {
      const Sum off = number(u, i) - mean[0];
      variance[0] += off * off;
    }
  });
  sums.add(variance);
  return {mean[0], Sum(1) / Sum(sqrt(variance[0] / count + Sum(kNormEpsilon)))};
}

// A Row is what differs from kernel to kernel, and is its argument:
//   Sum, Now, step[d]            as a Step's (product.cuh)
//   int visited(now)             rows that are looked at
//   finish_row(d, now, row, sums)   by all threads of the block
template <class Row>
__global__ void __launch_bounds__(kRowThreads, 1) row_kernel(const __grid_constant__ Row row) {
  const int d = blockIdx.z;
  const int b = int(blockIdx.x);
  const typename Row::Now& now = row.step[d];
  prims::Shared shared;
  RowSums<typename Row::Sum> sums(shared);
  prims::let_next_grid_start();
  prims::wait_for_previous_grid();
  if (b < row.visited(now)) row.finish_row(d, now, b, sums);
}

// After a kernel of the same step.
template <class Row>
void launch_rows(const char* name, const Row& row, int64_t rows, int64_t units, int directions, const Queue& queue) {
  const int threads = row_threads(units);
  const Grid grid{rows, directions, threads, RowSums<typename Row::Sum>::bytes(threads), true};
  launch(name, row_kernel<Row>, grid, queue, row);
}

}  // namespace fusedrnn
