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
constexpr int kColumnPitch = 20;    // numbers from row to row of a block's sums: lanes that store floats share no bank
// A warp takes 1, 2 or 4 tiles of the batch: at most as many as its registers hold the sums of. Not measured yet.
constexpr int most_tiles(int sum_bytes) { return sum_bytes == 8 ? 2 : 4; }

// One kernel of a step: out (units, gates) of a product of depth K, for each row of the batch.
struct ProductPlan {
  int64_t unit_tiles, batch_tiles;  // blocks of the grid: one direction's are their product, or if it `stays` batch_tiles
  int64_t depth_blocks;             // steps of a sum, of block_depth() numbers each
  int tiles;                        // of the batch, to a warp
  int warps;                        // of a block
  int split, groups;                // of which `split` share a sum by its depth, `groups` the rows of the batch
  int block_rows;                   // of the batch, to a block
  int64_t shared_bytes;
  bool stays;                       // one grid does all steps, and each of its blocks keeps all weights (block.cuh)
  int64_t blocks() const { return stays ? batch_tiles : unit_tiles * batch_tiles; }
  int threads() const { return kWarp * warps; }
  int64_t padded_rows() const { return batch_tiles * block_rows; }
};

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
constexpr bool goes_by_matrix_units(Dtype dtype, bool tf32) {
  return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16 || (dtype == Dtype::kFloat32 && tf32);
}
// How many numbers of a sum a warp takes at once: what 16 bytes a lane hold (arithmetic.cuh).
constexpr int block_depth(Dtype dtype, bool tf32) {
  if (goes_by_matrix_units(dtype, tf32)) return dtype == Dtype::kFloat32 ? 16 : 32;
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

// Every sum of a step is short where H is, and steps follow each other: what counts is that each step's work is spread over
// the whole chip. So warps first share the depth of their sums, and only where there are blocks for all multiprocessors
// without that do they take more rows of the batch instead, which loads the weights fewer times.
inline ProductPlan plan_product(const Chip& chip, const LayerParams& p, bool tf32, int64_t units, int gates, int64_t depth) {
  constexpr int kBlocksEach = 2;  // a multiprocessor, with which it counts as busy. Not measured yet.
  const int sum_bytes = p.dtype == Dtype::kFloat64 ? 8 : 4;
  ProductPlan plan{};
  plan.depth_blocks = ceil_div(depth, block_depth(p.dtype, tf32));
  plan.unit_tiles = ceil_div(units, kUnits);
  const int64_t tiles = ceil_div(p.steps.B, kTileRows);
  plan.tiles = tiles <= 2 ? std::max(1, int(tiles)) : most_tiles(sum_bytes);
  auto bytes = [&](int warps) {  // every warp leaves its sums in shared memory
    return int64_t(warps) * gates * plan.tiles * kTileRows * kColumnPitch * sum_bytes;
  };
  plan.groups = 1;
  while (2 * plan.groups <= kMostWarps && bytes(2 * plan.groups) <= chip.shared_bytes && 2 * plan.groups * plan.tiles <= tiles &&
         plan.unit_tiles * ceil_div(tiles, 2 * plan.groups * plan.tiles) * p.D >= int64_t(kBlocksEach) * chip.multiprocessors)
    plan.groups *= 2;
  plan.split = 1;
  while (2 * plan.split * plan.groups <= kMostWarps && 2 * plan.split <= plan.depth_blocks &&
         bytes(2 * plan.split * plan.groups) <= chip.shared_bytes)
    plan.split *= 2;
  plan.block_rows = kTileRows * plan.tiles * plan.groups;
  plan.batch_tiles = ceil_div(tiles, plan.tiles * plan.groups);
  plan.warps = plan.split * plan.groups;
  plan.shared_bytes = bytes(plan.warps);
  return plan;
}

// Tiles of the batch to a warp of block.cuh, whose registers hold the inputs of the cell besides the sums. Not measured yet.
constexpr int most_block_tiles(int sum_bytes) { return sum_bytes == 8 ? 1 : 2; }

// The same product where a block keeps all weights for all steps: rows of the batch are spread over the multiprocessors, and a
// block's warps take its tiles of units and of rows in turn. `stays` is false if the weights are
// too large, or the steps too few.
inline ProductPlan plan_block(const Chip& chip, const LayerParams& p, bool tf32, int64_t units, int gates, int64_t depth) {
  const int sum_bytes = p.dtype == Dtype::kFloat64 ? 8 : 4;
  ProductPlan plan{};
  plan.depth_blocks = ceil_div(depth, block_depth(p.dtype, tf32));
  plan.unit_tiles = ceil_div(units, kUnits);
  plan.shared_bytes = plan.unit_tiles * kUnits * gates * plan.depth_blocks * block_depth(p.dtype, tf32) * bytes_of(p.dtype);
  constexpr int64_t kLeastSteps = 2;  // a single one gains nothing from weights that stay. Not measured yet.
  plan.stays = plan.shared_bytes <= chip.shared_bytes && p.steps.T >= kLeastSteps;
  const int64_t tiles = ceil_div(p.steps.B, kTileRows), blocks = std::max<int64_t>(1, chip.multiprocessors / p.D);
  const int64_t block_tiles = std::max<int64_t>(1, ceil_div(tiles, blocks));
  plan.tiles = block_tiles == 1 ? 1 : most_block_tiles(sum_bytes);
  plan.groups = int(ceil_div(block_tiles, plan.tiles));
  plan.split = 1;
  plan.warps = int(std::min<int64_t>(kMostWarps, plan.unit_tiles * plan.groups));
  plan.block_rows = kTileRows * plan.tiles * plan.groups;
  plan.batch_tiles = ceil_div(p.steps.B, plan.block_rows);
  return plan;
}

// The kernels of a layer's steps: forward the cell and the projection, backward the gradient of the state that is multiplied by
// weight_hh, and of the one that is multiplied by weight_hr. Without projections the second of each is not launched.
struct StepPlan {
  ProductPlan cell, projection, dh, dunprojected;
};

// may_stay: whether kernels that keep their weights for all steps are to be used where they can.
inline StepPlan plan_step(const Chip& chip, const LayerParams& p, int gates, bool tf32, bool may_stay) {
  auto product = [&](int64_t units, int gates_of_sum, int64_t depth, bool alone) {
    const ProductPlan block = plan_block(chip, p, tf32, units, gates_of_sum, depth);
    return may_stay && alone && block.stays ? block : plan_product(chip, p, tf32, units, gates_of_sum, depth);
  };
  const bool alone = !p.weight_hr[0];  // a step is one kernel
  return {product(p.H, gates, p.P, alone), product(p.P, 1, p.H, false), product(p.P, 1, gates * p.H, alone),
          product(p.H, 1, p.P, false)};
}

}  // namespace fusedrnn
