// How a layer is laid out on a chip: which kernels run it, and how their blocks divide the work. Plain C++ and no CUDA, so that
// what it decides for any chip can be asked, and tested, anywhere.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

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

// Which kernel runs the steps of a layer, and where its weights are between them.
enum class Regime {
  kStep,     // a grid a step, which reads them (product.cuh)
  kBlock,    // one grid for all steps, and each of its blocks keeps all weights (block.cuh)
  kCluster,  // so do a few blocks side by side, each a part; they write the states into each other's shared memory (cluster.cuh)
  kGrid,     // so do all blocks of the chip; they pass the states to one another through memory (grid.cuh)
  kAlone,    // there are no weights: one grid for all steps, whose threads need each other for nothing (alone.cuh)
};
constexpr const char* kRegimeNames[] = {"step", "block", "cluster", "grid", "alone"};
constexpr int kChosenRegimes = 4;  // the first so many may be asked for; the last is a cell's only one, or not for it

// What a plan needs to know of a cell.
struct CellKind {
  int gates, states;
  bool multiplies;    // else a step has no product
  bool one_product;   // is_of_one_product
  bool of_torch;      // is_of_torch
  int late;           // gates that a second product of a step sums
  int pre;            // pre-activations of a unit
};
template <class Cell>
constexpr CellKind kKindOf = {Cell::kGates,       Cell::kStates, Cell::kMultiplies, is_of_one_product<Cell>,
                              is_of_torch<Cell>, Cell::kLate,   Cell::kPre};

// Whether there are kernels whose weights stay; in float64 for torch's cells only, since all of them take long to compile.
constexpr bool stays(const CellKind& cell, bool float64) { return cell.one_product && (cell.of_torch || !float64); }

// Which regimes a call may use: the best of all that it can, or one, where it can, and else a grid a step.
struct Regimes {
  bool block = true, cluster = true, grid = true;
};
// As the environment variable FUSEDRNN_KERNEL names them; another word, or none: all.
inline Regimes regimes_named(std::string_view name) {
  const auto is = [&](Regime regime) { return name == kRegimeNames[int(regime)]; };
  const bool all = !is(Regime::kStep) && !is(Regime::kBlock) && !is(Regime::kCluster) && !is(Regime::kGrid);
  return {all || is(Regime::kBlock), all || is(Regime::kCluster), all || is(Regime::kGrid)};
}

// Kernels count in 32 bits but for rows of a whole sequence: steps, rows of the batch, units, and blocks of packed states. More than
// that is refused; it would not fit into the memory of any chip.
constexpr int64_t kMostSteps = 1 << 30, kMostRows = 1 << 30, kMostUnits = 1 << 20, kMostBlocks = int64_t(1) << 31;
inline void refuse_above(int64_t most, int64_t found, const char* what) {
  if (found > most)
    throw std::invalid_argument(std::string("fusedrnn: CUDA kernels expected at most ") + std::to_string(most) + " " + what + ", got " +
                                std::to_string(found));
}
inline void check_sizes(const LayerParams& p) {
  refuse_above(kMostSteps, p.steps.T, "steps");
  refuse_above(kMostRows, p.steps.B * p.D, "rows in all directions");
  refuse_above(kMostUnits, std::max(p.H, p.P), "units");
}

// One product of a step: out (units, gates) of depth K, for each row of the batch.
struct ProductPlan {
  Regime regime;
  int64_t unit_tiles, batch_tiles;  // of all units, and of the rows of a block
  int64_t sharers;                  // blocks of the same rows, which divide the tiles of units among themselves
  int64_t unit_tiles_each;          // at most
  int64_t depth_blocks;             // steps of a sum, of block_depth() numbers each
  int tiles;                        // of the batch, to a warp
  int warps;                        // of a block
  int split, groups;                // of which `split` share a sum by its depth, `groups` the rows of the batch
  int slots;                        // places for the parts of a sum: where there are fewer than parts, some are added to others
  int block_rows;                   // of the batch, to a block
  int64_t shared_bytes;
  int64_t blocks() const { return sharers * batch_tiles; }  // of a strand
  int threads() const { return kWarp * warps; }
  int64_t padded_rows() const { return batch_tiles * block_rows; }
  int64_t state_blocks() const { return padded_rows() / kTileRows * depth_blocks; }  // of packed states
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

// A product's shape, and what its parts take of shared memory.
struct Product {
  int64_t unit_tiles, depth_blocks, batch_tiles;  // of 16 units, of block_depth() numbers, of 8 rows
  int gates, sum_bytes;
  int64_t tile_bytes;  // weights of 16 units
  int64_t state_bytes;  // states of 8 rows
  Product(const LayerParams& p, bool tf32, int64_t units, int gates, int64_t depth)
      : unit_tiles(ceil_div(units, kUnits)), depth_blocks(ceil_div(depth, block_depth(p.dtype, tf32))),
        batch_tiles(ceil_div(p.steps.B, kTileRows)), gates(gates), sum_bytes(p.dtype == Dtype::kFloat64 ? 8 : 4),
        tile_bytes(kUnits * gates * depth_blocks * block_depth(p.dtype, tf32) * bytes_of(p.dtype)),
        state_bytes(kTileRows * depth_blocks * block_depth(p.dtype, tf32) * bytes_of(p.dtype)) {}
  // What as many warps as this leave in shared memory; those of block.cuh leave nothing.
  int64_t sums_bytes(int64_t warps, int tiles) const {
    return warps * gates * tiles * kTileRows * kColumnPitch * sum_bytes;
  }
};

// Tiles of the batch to a warp that has so many before it.
inline int tiles_of_warp(int64_t tiles, int sum_bytes) { return tiles <= 2 ? std::max(1, int(tiles)) : most_tiles(sum_bytes); }

// What follows from `tiles`, `groups` and the blocks that share rows.
inline void divide(ProductPlan& plan, const Product& product, int64_t sharers) {
  plan.sharers = sharers;
  plan.unit_tiles = product.unit_tiles;
  plan.unit_tiles_each = ceil_div(product.unit_tiles, sharers);
  plan.depth_blocks = product.depth_blocks;
  plan.block_rows = kTileRows * plan.tiles * plan.groups;
  plan.batch_tiles = ceil_div(product.batch_tiles, plan.tiles * plan.groups);
}

constexpr int64_t kLeastSteps = 2;  // a single one gains nothing from weights that stay. Not measured yet.

// Every sum of a step is short where H is, and steps follow each other: what counts is that each step's work is spread over
// the whole chip. So warps first share the depth of their sums, and only where there are blocks for all multiprocessors
// without that do they take more rows of the batch instead, which loads the weights fewer times.
inline ProductPlan plan_grid_a_step(const Chip& chip, const LayerParams& p, const Product& product) {
  constexpr int kBlocksEach = 2;  // a multiprocessor, with which it counts as busy. Not measured yet.
  const int64_t tiles = product.batch_tiles;
  ProductPlan plan{};
  plan.tiles = tiles_of_warp(tiles, product.sum_bytes);
  auto fits = [&](int warps) { return warps <= kMostWarps && product.sums_bytes(warps, plan.tiles) <= chip.shared_bytes; };
  plan.groups = 1;
  while (fits(2 * plan.groups) && 2 * plan.groups * plan.tiles <= tiles &&
         product.unit_tiles * ceil_div(tiles, 2 * plan.groups * plan.tiles) * p.strands() >=
             int64_t(kBlocksEach) * chip.multiprocessors)
    plan.groups *= 2;
  plan.split = 1;
  while (fits(2 * plan.split * plan.groups) && 2 * plan.split <= product.depth_blocks) plan.split *= 2;
  plan.slots = plan.split;
  plan.warps = plan.split * plan.groups;
  plan.shared_bytes = product.sums_bytes(plan.warps, plan.tiles);
  divide(plan, product, product.unit_tiles);
  return plan;
}

// Tiles of the batch to a warp of block.cuh, whose registers hold the inputs of the cell besides the sums. Not measured yet.
constexpr int most_block_tiles(int sum_bytes, int states) { return sum_bytes == 8 || states > 2 ? 1 : 2; }

// The same product where a block keeps all weights for all steps: rows of the batch are spread over the multiprocessors, and a
// block's warps take its tiles of units and of rows in turn. Regime kStep if the weights are too large, or the steps too few.
inline ProductPlan plan_block(const Chip& chip, const LayerParams& p, const Product& product, int states) {
  ProductPlan plan{};
  plan.shared_bytes = product.unit_tiles * product.tile_bytes;
  if (plan.shared_bytes > chip.shared_bytes || p.steps.T < kLeastSteps) return plan;
  plan.regime = Regime::kBlock;
  const int64_t blocks = std::max<int64_t>(1, chip.multiprocessors / p.strands());
  const int64_t block_tiles = std::max<int64_t>(1, ceil_div(product.batch_tiles, blocks));
  plan.tiles = block_tiles == 1 ? 1 : most_block_tiles(product.sum_bytes, states);
  plan.groups = int(ceil_div(block_tiles, plan.tiles));
  plan.split = plan.slots = 1;
  plan.warps = int(std::min<int64_t>(kMostWarps, product.unit_tiles * plan.groups));
  divide(plan, product, 1);
  return plan;
}

// Where `sharers` blocks keep the weights together for all steps: what multiprocessors there are beyond those for all units take
// rows of the batch. Warps then share the depth of their sums. False if a block's part does not fit into its shared memory, with
// `copies` of the states of its rows there.
inline bool divide_shared(ProductPlan& plan, const Chip& chip, const LayerParams& p, const Product& product, int64_t sharers,
                          int copies) {
  const int64_t places = chip.multiprocessors / (sharers * p.strands());  // for blocks that do the same for other rows
  if (places < 1) return false;
  const int64_t block_tiles = std::max<int64_t>(1, ceil_div(product.batch_tiles, places));
  plan.tiles = tiles_of_warp(block_tiles, product.sum_bytes);
  const int64_t groups = ceil_div(block_tiles, plan.tiles);
  const int64_t kept = ceil_div(product.unit_tiles, sharers) * product.tile_bytes + copies * groups * plan.tiles * product.state_bytes;
  const int64_t room = chip.shared_bytes - kept, sums_bytes = product.sums_bytes(groups, plan.tiles);
  if (groups > kMostWarps || sums_bytes > room) return false;
  plan.groups = int(groups);
  plan.split = int(std::min<int64_t>(kMostWarps / groups, product.depth_blocks));
  plan.slots = int(std::min<int64_t>(plan.split, room / sums_bytes));
  plan.warps = plan.split * plan.groups;
  plan.shared_bytes = kept + plan.slots * sums_bytes;
  divide(plan, product, sharers);
  return true;
}

// By the blocks of one grid, for 16 units each. All of them are on the chip at once, one to a multiprocessor, since they wait for
// each other. Regime kStep if they are too many or too large, or the steps too few.
inline ProductPlan plan_grid(const Chip& chip, const LayerParams& p, const Product& product) {
  ProductPlan plan{};
  if (p.steps.T >= kLeastSteps && divide_shared(plan, chip, p, product, product.unit_tiles, 0)) plan.regime = Regime::kGrid;
  return plan.regime == Regime::kGrid ? plan : ProductPlan{};
}

// By the blocks of a cluster, as many as there is room for. Each has two copies of the states: the one that is multiplied, and the
// one that all blocks write their part into.
inline ProductPlan plan_cluster(const Chip& chip, const LayerParams& p, const Product& product) {
  constexpr int kSizes[] = {8, 4, 2};  // 8 is the most that every chip with clusters has
  for (int size : kSizes) {
    ProductPlan plan{};
    if (chip.major < 9 || p.steps.T < kLeastSteps || size > product.unit_tiles) continue;
    if (!divide_shared(plan, chip, p, product, size, 2)) continue;
    plan.regime = Regime::kCluster;
    return plan;
  }
  return {};
}

constexpr int kAloneThreads = 64;  // so few that a small layer, too, is on many multiprocessors. Not measured yet.

// A thread for each unit of each row of the batch.
inline ProductPlan plan_alone(const LayerParams& p) {
  ProductPlan plan{};
  plan.regime = Regime::kAlone;
  plan.warps = kAloneThreads / kWarp;
  plan.sharers = 1;
  plan.batch_tiles = ceil_div(p.steps.B * p.H, kAloneThreads);
  return plan;
}

// Where a cell needs sums over all units of a row, a block a row, whose threads take units in turn (row.cuh). Not measured yet.
constexpr int kRowThreads = 256;  // at most
inline int row_threads(int64_t units) { return int(std::min<int64_t>(kRowThreads, kWarp * ceil_div(units, kWarp))); }

// The last states of a layer of a stack, which the layer above may still read. Of more than two the layers need not go in step, so
// that a layer finds the states below when it comes to them. Not measured yet. A power of two.
constexpr int kRing = 4;

// The products of a layer's steps: forward the cell's and the projection's, backward the gradient of the state that is multiplied by
// weight_hh, and of the one that is multiplied by weight_hr. Of a cell with a late gate the second of each is that gate's. Without
// either it is not made.
struct StepPlan {
  ProductPlan cell, projection, dh, dunprojected;
};

// The fewer blocks keep the weights, the nearer they are to each other: none waits for another, or only for its neighbours. Not
// measured yet: for a small batch that is one multiprocessor's work, or a few's, against an exchange.
inline StepPlan plan_step(const Chip& chip, const LayerParams& p, const CellKind& cell, bool tf32, Regimes regimes) {
  check_sizes(p);
  if (!cell.multiplies) return {plan_alone(p), {}, plan_alone(p), {}};
  const int gates = cell.gates - cell.late;
  const bool one_kernel = stays(cell, p.dtype == Dtype::kFloat64) && !p.weight_hr[0];  // to a step
  auto plan = [&](int64_t units, int gates_of_sum, int64_t depth, bool may_stay) {
    const Product product(p, tf32, units, gates_of_sum, depth);
    ProductPlan found{};
    auto look = [&](bool allowed, auto planner) {
      if (allowed && may_stay && found.regime == Regime::kStep) found = planner(chip, p, product);
    };
    look(regimes.block, [&](const auto&... of) { return plan_block(of..., cell.states); });
    look(regimes.cluster, plan_cluster);
    look(regimes.grid, plan_grid);
    if (found.regime == Regime::kStep) found = plan_grid_a_step(chip, p, product);
    refuse_above(kMostBlocks, found.state_blocks(), "blocks of states");
    return found;
  };
  const int64_t units = p.units(), depth = p.depth();
  return {plan(units, gates, depth, one_kernel), plan(depth, 1, units, false), plan(depth, 1, gates * units, one_kernel),
          plan(units, 1, depth, false)};
}

// Several layers in one grid, each of whose blocks has 16 units of one layer (stack.cuh): how the blocks of a layer divide its work,
// on their part of the chip. They keep the weights of the input beside those of the hidden state, and sum for every pre-activation,
// or backward for each of the two products. Regime kStep if they are too many or too large.
inline ProductPlan plan_stacked(const Chip& chip, const LayerParams& p, const CellKind& cell, bool tf32, int64_t layers, bool backward) {
  check_sizes(p);
  ProductPlan plan{};
  if (!cell.of_torch || p.weight_hr[0] || p.strands() != 1 || layers < 1 || layers > kMostStacked) return plan;
  Product product(p, tf32, p.H, backward ? 1 : cell.gates, backward ? cell.gates * p.H : p.H);
  product.tile_bytes *= 2;
  product.gates = backward ? 2 : cell.pre;
  const Chip part{int(chip.multiprocessors / layers), chip.shared_bytes, chip.major};
  if (!divide_shared(plan, part, p, product, product.unit_tiles, 0)) return {};
  plan.regime = Regime::kGrid;
  refuse_above(kMostBlocks, layers * kRing * plan.state_blocks(), "blocks of states");
  return plan;
}

// Whether those layers go in one grid backward, too. There each block reads the gradients of all gates of its rows, twice, from the
// second-level cache, and all blocks do at once: what that takes must be less than the steps of the layers one after the other.
constexpr int64_t kReadsAClock = 20;     // bytes of a multiprocessor: 19 of an A100, 30 of an H800 (arXiv:2402.13499). Not measured yet.
constexpr int64_t kStepClocks = 2400;    // of a layer's step by itself, as benchmarks/sass.py predicts it. Not measured yet.
constexpr int64_t kExchangeClocks = 800; // of them between two steps. Not measured yet.
inline bool stacks_backward(const ProductPlan& plan, const LayerParams& p, bool tf32, int64_t layers) {
  const int64_t reads = 2 * plan.block_rows * plan.depth_blocks * block_depth(p.dtype, tf32) * bytes_of(p.dtype);
  return plan.regime == Regime::kGrid && reads / kReadsAClock + kExchangeClocks < layers * kStepClocks;
}

constexpr int64_t kStepsOfLayer = 4;  // of a sequence, for each layer, which waits so many steps before it begins. Not measured yet.

// How many of `layers` layers, one upon the other, go in one grid; 1: each goes by itself. `wanted`: wherever they fit.
//
// n layers take T + n - 1 steps of two products instead of n T steps of one. Where a block has no more rows than a warp takes at once,
// it reads its weights once a step in either case: then the steps of n layers take no longer even if a step were nothing but products,
// and what they save is the exchange of all layers but one, and the product of the input of all rows.
// A layer that fits into one block has no exchange to save, and is left as it is.
inline int64_t plan_stack(const Chip& chip, const LayerParams& p, const CellKind& cell, bool tf32, int64_t layers, bool wanted) {
  int64_t most = std::min<int64_t>(layers, kMostStacked);
  if (!wanted) {
    const Regime alone = plan_step(chip, p, cell, tf32, {}).cell.regime;
    if (alone != Regime::kCluster && alone != Regime::kGrid) return 1;
    most = std::min(most, p.steps.T / kStepsOfLayer);
  }
  for (int64_t n = most; n > 1; --n) {
    const ProductPlan plan = plan_stacked(chip, p, cell, tf32, n, false), back = plan_stacked(chip, p, cell, tf32, n, true);
    if (plan.regime == Regime::kGrid && back.regime == Regime::kGrid && (wanted || plan.groups == 1)) return n;
  }
  return 1;
}

}  // namespace fusedrnn
