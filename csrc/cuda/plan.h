// How a layer is laid out on a chip: which kernels run it, and how their blocks divide the work. Plain C++ and no CUDA, so that
// what it decides for any chip can be asked, and tested, anywhere.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace fusedrnn {

// What a plan needs to know of a GPU.
struct Chip {
  int multiprocessors;
  int64_t shared_bytes;  // the most that one block may have
  int major;             // of the compute capability
};

// Tiles of the step kernels. A warp sums 16 units (kUnits), all gates of each, for `kernel_tiles` times 8 rows of the batch.
constexpr int kUnits = 16, kTileRows = 8, kWarp = 32;
constexpr int kMostWarps = 8;       // to a block. Not measured yet.
constexpr int kColumnPitch = 20;    // numbers from column to column of a block's sums: no two lanes of a store share a bank
constexpr int kFewTiles = 1;        // what a warp takes of the batch: the smallest there is, and as many as its registers hold.
template <class Sum>
constexpr int kManyTiles = sizeof(Sum) == 8 ? 2 : 4;  // Not measured yet.

// One kernel of a step: out (units, gates) of a product of depth K, for each row of the batch.
struct ProductPlan {
  int64_t unit_tiles, batch_tiles;  // blocks of the grid: one direction's are their product
  int tiles;                        // of the batch, to a warp
  int split, groups;                // warps of a block: `split` share a sum by its depth, `groups` the rows of the batch
  int block_rows;                   // of the batch, to a block
  int64_t shared_bytes;
  int64_t blocks() const { return unit_tiles * batch_tiles; }
  int threads() const { return kWarp * split * groups; }
};

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Every sum of a step is short where H is, and steps follow each other: what counts is that each step's work is spread over the
// whole chip. So warps first share the depth of their sums, and only where there are blocks for all multiprocessors without that do
// they take more rows of the batch instead, which loads the weights fewer times.
//
// depth: blocks of kDepth in a sum. sum_bytes: 4, or 8 for float64.
inline ProductPlan plan_product(const Chip& chip, int64_t units, int gates, int64_t depth, int64_t B, int64_t D, int sum_bytes) {
  constexpr int kBlocksEach = 2;  // a multiprocessor, with which it counts as busy. Not measured yet.
  ProductPlan plan{};
  plan.unit_tiles = ceil_div(units, kUnits);
  const int64_t tiles = ceil_div(B, kTileRows);
  plan.tiles = tiles == 1 ? kFewTiles : sum_bytes == 8 ? kManyTiles<double> : kManyTiles<float>;
  auto bytes = [&](int warps) {  // every warp leaves its sums in shared memory
    return int64_t(warps) * gates * plan.tiles * kTileRows * kColumnPitch * sum_bytes;
  };
  plan.groups = 1;
  while (plan.groups < kMostWarps && bytes(2 * plan.groups) <= chip.shared_bytes && 2 * plan.groups * plan.tiles <= tiles &&
         plan.unit_tiles * ceil_div(tiles, 2 * plan.groups * plan.tiles) * D >= int64_t(kBlocksEach) * chip.multiprocessors)
    plan.groups *= 2;
  plan.split = 1;
  while (2 * plan.split * plan.groups <= kMostWarps && 2 * plan.split <= depth &&
         bytes(2 * plan.split * plan.groups) <= chip.shared_bytes)
    plan.split *= 2;
  plan.block_rows = kTileRows * plan.tiles * plan.groups;
  plan.batch_tiles = ceil_div(tiles, plan.tiles * plan.groups);
  plan.shared_bytes = bytes(plan.split * plan.groups);
  return plan;
}

}  // namespace fusedrnn
