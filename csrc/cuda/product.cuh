// The product of a step: packed weights times the states of all rows of the batch, by one block of threads for 16 units.
//
// Weights and states are packed before they are multiplied, in the order in which lanes load them (arithmetic.cuh), and
// padded with zeros to whole blocks, so that the loop below has no bounds to check and no unaligned load, whatever H and B
// are.
#pragma once
#include <algorithm>

#include "arithmetic.cuh"
#include "plan.h"
#include "walk.h"

namespace fusedrnn {

// Weights of one strand: (unit tiles, depth blocks, gates, 16 units by kDepth).
template <class A, int kGates>
FUSEDRNN_DEVICE int64_t packed_weight_at(int64_t depth_blocks, int64_t unit, int gate, int64_t k) {
  const int64_t block = ((unit / kUnits) * depth_blocks + k / A::kDepth) * kGates + gate;
  return block * kRows * A::kDepth + A::weight_at(int(unit % kUnits), int(k % A::kDepth));
}

// States of one strand: (tiles of 8 rows, depth blocks, 8 rows by kDepth).
template <class A>
FUSEDRNN_DEVICE int64_t packed_state_at(int64_t depth_blocks, int64_t row, int64_t k) {
  const int64_t block = row / kTileRows * depth_blocks + k / A::kDepth;
  return block * kColumns * A::kDepth + A::state_at(int(row % kTileRows), int(k % A::kDepth));
}

// ---- Strands: a block's direction is blockIdx.z, its head blockIdx.y ----

FUSEDRNN_DEVICE int strand_of(int d) { return d * int(gridDim.y) + int(blockIdx.y); }
// Where heads of so many numbers, or units, lie side by side, the first of the block's.
FUSEDRNN_DEVICE int64_t first_of_head(int64_t each) { return blockIdx.y * each; }
FUSEDRNN_DEVICE int first_unit(int64_t units) { return int(blockIdx.y) * int(units); }
// The same for a cell, and the number of its unit u in the head: nothing to compute where there are no heads.
template <class Cell>
FUSEDRNN_DEVICE int strand_of(int d) {
  if constexpr (may_have_heads<Cell>) return strand_of(d);
  else return d;
}
template <class Cell>
FUSEDRNN_DEVICE int64_t unit_in_head(int64_t u, int64_t units) {
  if constexpr (may_have_heads<Cell>) return u - first_unit(units);
  else return u;
}

// ---- Grids without a plan: each thread takes every so many-th place of a matrix ----

constexpr int kPlainThreads = 256;
constexpr int64_t kPlainBlocks = 1024;  // at most; a thread then takes several. Not measured yet.

inline Grid plain_grid(int64_t places, const LayerParams& p) {
  Grid grid{std::clamp<int64_t>(ceil_div(places, kPlainThreads), 1, kPlainBlocks), int(p.D), kPlainThreads, 0, false};
  grid.heads = int(p.N);
  return grid;
}

// Calls fn(row, column) for this thread's part of a matrix. Neighbouring threads have neighbouring columns.
template <class Fn>
FUSEDRNN_DEVICE void for_each_place(int64_t rows, int64_t columns, const Fn& fn) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * columns; i += int64_t(gridDim.x) * blockDim.x)
    fn(i / columns, i % columns);
}

// ---- Packing, once a call ----

// A head's weight, whose element (gate, unit, k) lies at gate * gate_stride + unit * unit_stride + k / run * run_stride +
// k % run * k_stride, and that of the next head head_stride behind it.
struct WeightPlaces {
  int64_t units, depth, gate_stride, unit_stride, run, run_stride, k_stride, head_stride;
};
// Of a weight that has, for a gate after the other, rows_of_gate rows, those of all heads. Its rows are the units, or what is summed.
inline WeightPlaces by_rows(int64_t units, int64_t depth, int64_t rows_of_gate) {
  return {units, depth, rows_of_gate * depth, depth, depth, 0, 1, units * depth};
}
inline WeightPlaces by_columns(int64_t units, int64_t rows, int64_t gates, int64_t rows_of_gate) {
  return {units, gates * rows, 0, 1, rows, rows_of_gate * units, units, rows * units};
}

template <class A>
struct PackArgs {
  const typename A::Storage* from[kMaxDirections];
  typename A::Element* to[kMaxDirections];
  WeightPlaces at;
  int64_t unit_tiles, depth_blocks;
};

template <class A, int kGates>
__global__ void pack_kernel(const __grid_constant__ PackArgs<A> args) {
  const int d = blockIdx.z;
  const int64_t units = args.unit_tiles * kUnits, depth = args.depth_blocks * A::kDepth;
  const typename A::Storage* from = args.from[d] + first_of_head(args.at.head_stride);
  typename A::Element* to = args.to[d] + first_of_head(units * depth * kGates);
  auto pack = [&](int64_t unit, int64_t k) {
    const bool real = unit < args.at.units && k < args.at.depth;
    const WeightPlaces& at = args.at;
    const int64_t place = unit * at.unit_stride + k / at.run * at.run_stride + k % at.run * at.k_stride;
    for (int gate = 0; gate < kGates; ++gate) {
      const typename A::Sum value = real ? typename A::Sum(widen(from[gate * at.gate_stride + place])) : typename A::Sum(0);
      to[packed_weight_at<A, kGates>(args.depth_blocks, unit, gate, k)] = A::element(value);
    }
  };
  // Neighbouring threads read neighbouring numbers, whichever way the weight lies.
  if (args.at.unit_stride < args.at.k_stride) for_each_place(depth, units, [&](int64_t k, int64_t unit) { pack(unit, k); });
  else for_each_place(units, depth, pack);
}

// Numbers of a tile of 16 units, and of one strand.
template <class A>
FUSEDRNN_ANYWHERE int64_t packed_tile_count(const ProductPlan& plan, int gates) {
  return plan.depth_blocks * gates * kRows * A::kDepth;
}
template <class A>
int64_t packed_weight_count(const ProductPlan& plan, int gates) {
  return plan.unit_tiles * packed_tile_count<A>(plan, gates);
}

// Copies packed numbers to shared memory, by all threads of a block; who needs them waits for a barrier.
template <class Element>
FUSEDRNN_DEVICE void copy_in(Element* to, const Element* from, int64_t count) {
  const int64_t pieces = count * int64_t(sizeof(Element)) / int64_t(sizeof(Sixteen));
  for (int64_t i = threadIdx.x; i < pieces; i += blockDim.x)
    reinterpret_cast<Sixteen*>(to)[i] = reinterpret_cast<const Sixteen*>(from)[i];
}

// Packs a weight of each direction, head after head.
template <class A, int kGates>
void pack(const LayerParams& p, const void* const (&from)[kMaxDirections], typename A::Element* const (&to)[kMaxDirections],
          const WeightPlaces& at, const ProductPlan& plan, const Queue& queue) {
  PackArgs<A> args{{}, {}, at, plan.unit_tiles, plan.depth_blocks};
  for (int64_t d = 0; d < p.D; ++d) {
    args.from[d] = static_cast<const typename A::Storage*>(from[d]);
    args.to[d] = to[d];
  }
  const Grid grid = plain_grid(plan.unit_tiles * kUnits * plan.depth_blocks * A::kDepth, p);
  launch("pack", pack_kernel<A, kGates>, grid, queue, args);
}

// The rows of weight_hh that belong to the late gate.
struct LateWeights {
  const void* of[kMaxDirections];
};
template <class Cell, class A>
LateWeights late_weights(const LayerParams& p) {
  LateWeights weights{};
  for (int64_t d = 0; d < p.D; ++d)
    weights.of[d] = static_cast<const typename A::Storage*>(p.weight_hh[d]) + (Cell::kGates - Cell::kLate) * p.H * p.depth();
  return weights;
}

// ---- The product ----

// Where a block is in a product's grid: those that share rows are side by side. Its tiles of units, and its first row.
struct BlockPlace {
  int64_t sharer, batch_tile, unit_tile, end_tile, first_row;
  FUSEDRNN_DEVICE BlockPlace(const ProductPlan& plan)
      : sharer(blockIdx.x % unsigned(plan.sharers)), batch_tile(blockIdx.x / unsigned(plan.sharers)),
        unit_tile(sharer * plan.unit_tiles_each), end_tile(unit_tile + plan.unit_tiles_each),
        first_row(batch_tile * plan.block_rows) {
    if (end_tile > plan.unit_tiles) end_tile = plan.unit_tiles;
  }
};

// The sums of a block, in shared memory: (slots, gates, rows of the block, kColumnPitch) numbers, of which 16 to a row are in
// use.
template <class A, int kGates, int kTiles>
struct BlockSums {
  using Element = typename A::Element;
  static constexpr int kWeights = kRows * A::kDepth, kStates = kColumns * A::kDepth;  // numbers of a block of either

  const ProductPlan& plan;
  const int lane, part, group;  // of this thread: in its warp; its warp's share of the depth, and of the rows
  typename A::Sum* memory;
  // What is multiplied next, on its way while something else is done.
  typename A::Weights weight[kGates];
  typename A::States state[kTiles];

  FUSEDRNN_DEVICE BlockSums(const ProductPlan& plan, prims::Shared& shared)
      : plan(plan), lane(threadIdx.x % kLanes), part(threadIdx.x / kLanes % plan.split),
        group(threadIdx.x / kLanes / plan.split) {
    memory = shared.template take<typename A::Sum>(int64_t(plan.slots) * kGates * plan.block_rows * kColumnPitch);
  }
  FUSEDRNN_DEVICE int at(int slot, int gate, int row) const {
    return ((slot * kGates + gate) * plan.block_rows + row) * kColumnPitch;
  }

  FUSEDRNN_DEVICE void load_weights(const Element* weights, int64_t block) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) weight[gate].load(weights + (block * kGates + gate) * kWeights, lane);
  }
  FUSEDRNN_DEVICE void load_states(const Element* states, int64_t block) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) state[n].load(states + ((group * kTiles + n) * plan.depth_blocks + block) * kStates, lane);
  }

  // weights: the unit tile's, of which load_weights has begun to load block `part`; states: from the block's first row on.
  // Ends with a barrier: all sums are there.
  FUSEDRNN_DEVICE void multiply(const Element* weights, const Element* states) {
    prims::warp_sync();  // lanes may come from different ends of a step
    typename A::Sum sum[kGates][kTiles][4] = {};
    load_states(states, part);
    for (int64_t block = part; block < plan.depth_blocks;) {
      typename A::Weights weight_now[kGates];
      typename A::States state_now[kTiles];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) weight_now[gate] = weight[gate];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) state_now[n] = state[n];
      block += plan.split;
      if (block < plan.depth_blocks) {
        load_weights(weights, block);
        load_states(states, block);
      }
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) A::multiply_add(sum[gate][n], weight_now[gate], state_now[n]);
    }
    for (int turn = 0; turn * plan.slots < plan.split; ++turn) {  // once, where all parts have a slot
      if (part / plan.slots == turn) leave(sum, turn > 0);
      prims::block_sync();  // the sums of this turn are there
    }
  }

  // Stores the warp's sums, or adds them to those that are there.
  FUSEDRNN_DEVICE void leave(const typename A::Sum (&sum)[kGates][kTiles][4], bool adds) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = (group * kTiles + n) * kColumns + 2 * (lane % 4) + i % 2, unit = lane / 4 + 8 * (i / 2);
          typename A::Sum& place = memory[at(part % plan.slots, gate, row) + unit];
          place = adds ? place + sum[gate][n][i] : sum[gate][n][i];
        }
  }

  // The parts of a sum, in an order that never changes.
  FUSEDRNN_DEVICE typename A::Sum total(int gate, int row, int unit) const {
    typename A::Sum sum = memory[at(0, gate, row) + unit];
    for (int slot = 1; slot < plan.slots; ++slot) sum += memory[at(slot, gate, row) + unit];
    return sum;
  }

  // The end of a step for the i-th (row, unit) of the block.
  template <class Step, class Pass>
  FUSEDRNN_DEVICE void finish(const Step& step, int d, const typename Step::Now& now, int i, int64_t row, int64_t unit,
                              const typename Step::Inputs& inputs, const Pass& pass) const {
    typename A::Sum sums[kGates];  // nothing for rows that have not begun
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      sums[gate] = row < step.multiplied(now) ? total(gate, i / kUnits, i % kUnits) : typename A::Sum(0);
    step.finish(d, now, row, unit, sums, inputs, pass);
  }
};

// For kernels whose next step reads the states from memory.
struct PassNothing {
  template <class Element>
  FUSEDRNN_DEVICE void operator()(int64_t, Element) const {}
};

// One kernel of a step. A Step is what differs from kernel to kernel, and is its argument:
//   Arithmetic, kGates           of its product
//   ProductPlan plan, and p with the sizes of the call
//   kBackward                    the order of its walk, for kernels that do all steps
//   const Element* weights(d), states(d, now)
//   Now, step[d]                 what differs between the steps of one direction
//   int64_t multiplied(now)      rows whose sum is wanted; others take zero
//   int64_t visited(now)         rows that are looked at
//   int64_t units                of a head; a unit's number below counts those of the heads before its own
//   fetch(d, now, row, unit)     what a unit reads besides its sums: Inputs
//   finish(d, now, row, unit, sums, inputs, pass)   what becomes of them; pass(at, element) for each number that the next step
//                                multiplies, when it is written: its place in states(d, next)
//   states_of(d, turn)           either buffer of states, for cluster.cuh
template <class Step, int kTiles>
__global__ void __launch_bounds__(kMostWarps * kLanes, 1) step_kernel(const __grid_constant__ Step step) {
  using A = typename Step::Arithmetic;
  constexpr int kGates = Step::kGates;
  const int d = blockIdx.z;
  const typename Step::Now& now = step.step[d];
  const BlockPlace place(step.plan);
  const bool multiplies = place.first_row < step.multiplied(now);
  prims::Shared shared;
  BlockSums<A, kGates, kTiles> sums(step.plan, shared);
  const int64_t tile = first_of_head(step.plan.unit_tiles) + place.unit_tile;
  const typename A::Element* weights = step.weights(d) + tile * packed_tile_count<A>(step.plan, kGates);
  prims::let_next_grid_start();  // whose threads wait for the end of this grid before they touch anything that it writes
  if (multiplies) sums.load_weights(weights, sums.part);  // which were packed before the first step
  prims::wait_for_previous_grid();
  if (place.first_row >= step.visited(now)) return;
  if (multiplies) sums.multiply(weights, step.states(d, now) + place.first_row * step.plan.depth_blocks * A::kDepth);
  for (int i = threadIdx.x; i < kUnits * step.plan.block_rows; i += blockDim.x) {
    const int64_t row = place.first_row + i / kUnits, unit = place.unit_tile * kUnits + i % kUnits;
    if (row >= step.visited(now) || unit >= step.units) continue;
    const int64_t own = first_unit(step.units) + unit;
    sums.finish(step, d, now, i, row, own, step.fetch(d, now, row, own), PassNothing{});
  }
}

// overlaps: the grid before this one is a step's too, so that this one may start early.
template <class Step>
void launch_step(const char* name, const Step& step, int directions, bool overlaps, const Queue& queue) {
  Grid grid{step.plan.blocks(), directions, step.plan.threads(), step.plan.shared_bytes, overlaps};
  grid.heads = int(step.p.N);
  if (step.plan.tiles == 1) launch(name, step_kernel<Step, 1>, grid, queue, step);
  else if (step.plan.tiles == 2) launch(name, step_kernel<Step, 2>, grid, queue, step);
  else launch(name, step_kernel<Step, most_tiles(sizeof(typename Step::Sum))>, grid, queue, step);
}

}  // namespace fusedrnn
