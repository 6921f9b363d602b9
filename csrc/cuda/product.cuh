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
FUSEDRNN_DEVICE int64_t packed_state_at(int depth_blocks, unsigned row, unsigned k) {
  const unsigned block = row / kTileRows * unsigned(depth_blocks) + k / A::kDepth;
  return int64_t(block) * (kColumns * A::kDepth) + A::state_at(int(row % kTileRows), int(k % A::kDepth));
}

// ---- Strands: a block's direction is blockIdx.z, its head blockIdx.y ----

FUSEDRNN_DEVICE int strand_of(int d) { return d * int(gridDim.y) + int(blockIdx.y); }
// Where heads of so many numbers, or units, lie side by side, the first of the block's.
FUSEDRNN_DEVICE int64_t first_of_head(int64_t each) { return blockIdx.y * each; }
FUSEDRNN_DEVICE int first_unit(int units) { return int(blockIdx.y) * units; }
// The same for a cell, and the number of its unit u in the head: nothing to compute where there are no heads.
template <class Cell>
FUSEDRNN_DEVICE int strand_of(int d) {
  if constexpr (may_have_heads<Cell>) return strand_of(d);
  else return d;
}
template <class Cell>
FUSEDRNN_DEVICE int unit_in_head(int u, int units) {
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
  int sharer, batch_tile, unit_tile, end_tile, first_row;
  FUSEDRNN_DEVICE BlockPlace(const ProductPlan& plan)
      : sharer(int(blockIdx.x % unsigned(plan.sharers))), batch_tile(int(blockIdx.x / unsigned(plan.sharers))),
        unit_tile(sharer * int(plan.unit_tiles_each)), end_tile(unit_tile + int(plan.unit_tiles_each)),
        first_row(batch_tile * plan.block_rows) {
    if (end_tile > plan.unit_tiles) end_tile = int(plan.unit_tiles);
  }
};

// Blocks of the depth whose states are on their way at once, if those of one take so many bytes of a lane's registers.
constexpr int states_ahead(int bytes, int gates) { return gates == 1 ? std::clamp(256 / bytes, 2, 8) : std::clamp(128 / bytes, 2, 4); }

// The sums of a block, in shared memory: (slots, groups, gates, rows of a group, kColumnPitch) numbers, of which 16 to a row are in
// use. So from gate to gate, and from row to row of a warp, it is as far in every plan.
//
// kStay: the weights are in shared memory, from which they come when they are wanted; else in memory, and asked for ahead, as the
// states are. kSums: sums of a unit, where those of several products are not one to a gate (stack.cuh).
template <class A, int kGates, int kTiles, bool kStay, int kSums = kGates>
struct BlockSums {
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  static constexpr int kWeights = kRows * A::kDepth, kStates = kColumns * A::kDepth;  // numbers of a block of either
  static constexpr int kWarpRows = kTiles * kColumns, kGatePitch = kWarpRows * kColumnPitch, kWarpPitch = kSums * kGatePitch;
  // Blocks of the depth that are on their way at once: as many as have room in the registers. Not measured yet.
  static constexpr int kBlockBytes = int(sizeof(typename A::Weights)) * kGates + int(sizeof(typename A::States)) * kTiles;
  static constexpr int kSumBytes = int(sizeof(Sum)) * kGates * kTiles * 4, kRoom = 640;
  static constexpr int kAhead = kStay ? states_ahead(int(sizeof(typename A::States)) * kTiles, kGates)
                                : 2 * kBlockBytes + kSumBytes <= kRoom ? 2 : 1;

  const int lane, part, group;  // of this thread: in its warp; its warp's share of the depth, and of the rows
  const int split, turns;       // turns: blocks of the depth that are the warp's
  const int slots, slot, round; // where its sums go, and when: several warps may have the same slot
  const int depth_blocks, slot_pitch;
  Sum* memory;
  // What is multiplied next, on its way while something else is done.
  typename A::Weights weight[kStay ? 1 : kAhead][kGates];
  typename A::States state[kAhead][kTiles];

  FUSEDRNN_DEVICE BlockSums(const ProductPlan& plan, prims::Shared& shared)
      : lane(threadIdx.x % kLanes), part(int(threadIdx.x / kLanes) % plan.split), group(int(threadIdx.x / kLanes) / plan.split),
        split(plan.split), turns((int(plan.depth_blocks) - part + split - 1) / split), slots(plan.slots), slot(part % slots),
        round(part / slots), depth_blocks(int(plan.depth_blocks)), slot_pitch(plan.groups * kWarpPitch) {
    memory = shared.template take<Sum>(int64_t(plan.slots) * kSums * plan.block_rows * kColumnPitch);
  }

  // This lane's share of the first block of the depth that is the warp's.
  FUSEDRNN_DEVICE const Element* own(const Element* weights) const {
    return weights + part * kGates * kWeights + A::Weights::share(lane);
  }
  FUSEDRNN_DEVICE void load_block(int j, const Element* from) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) weight[j][gate].load(from + gate * kWeights);
  }
  FUSEDRNN_DEVICE void load_weights(const Element* weights) {
    if constexpr (!kStay)
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (j < turns) load_block(j, own(weights) + j * split * kGates * kWeights);
  }
  FUSEDRNN_DEVICE void load_states(int j, const Element* from) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) state[j][n].load(from + n * depth_blocks * kStates);
  }

  using Sums = Sum[kSums][kTiles][4];  // a lane's
  struct GateByGate {
    FUSEDRNN_DEVICE static constexpr int of(int gate) { return gate; }
  };

  // That of a gate to sum Into::of(gate).
  template <class Into>
  static FUSEDRNN_DEVICE void add_products(Sums& sum, const typename A::Weights (&weight)[kGates],
                                           const typename A::States (&state)[kTiles]) {
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) A::multiply_add(sum[Into::of(gate)][n], weight[gate], state[n]);
  }

  // weights: the unit tile's, of which load_weights has begun to load; states: from the block's first row on.
  // Ends with a barrier: all sums are there.
  FUSEDRNN_DEVICE void multiply(const Element* weights, const Element* states) {
    Sums sum = {};
    add<GateByGate>(sum, weights, states);
    share(sum);
  }

  // Adds a product to the warp's sums.
  template <class Into>
  FUSEDRNN_DEVICE void add(Sums& sum, const Element* weights, const Element* states) {
    prims::warp_sync();  // lanes may come from different ends of a step
    const int weights_step = split * kGates * kWeights, states_step = split * kStates;
    const Element* weights_next = own(weights) + (kStay ? 0 : kAhead * weights_step);
    const Element* states_next = states + (group * kTiles * depth_blocks + part) * kStates + A::States::share(lane);
#pragma unroll
    for (int j = 0; j < kAhead; ++j, states_next += states_step)
      if (j < turns) load_states(j, states_next);
#pragma unroll 1
    for (int left = turns; left > 0; left -= kAhead)
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (j >= left) break;
        if (kStay) load_block(0, weights_next);
        const auto load_ahead = [&] {
          if (j + kAhead < left) {
            if (!kStay) load_block(j, weights_next);
            load_states(j, states_next);
          }
        };
        if constexpr (kAhead > 1) {
          add_products<Into>(sum, weight[kStay ? 0 : j], state[j]);
          load_ahead();
        } else {  // the next block is on its way while this one is multiplied, and takes its registers over one by one
          typename A::Weights weight_now[kGates];
          typename A::States state_now[kTiles];
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) weight_now[gate] = weight[0][gate];
#pragma unroll
          for (int n = 0; n < kTiles; ++n) state_now[n] = state[0][n];
          load_ahead();
          add_products<Into>(sum, weight_now, state_now);
        }
        weights_next += weights_step;
        states_next += states_step;
      }
  }

  // Leaves the warps' sums to all threads of the block. Ends with a barrier.
  FUSEDRNN_DEVICE void share(const Sums& sum) {
    if (round == 0) leave(sum, false);
    prims::block_sync();  // the sums are there, or the first of them
    for (int now = 1; now * slots < split; ++now) {  // never, where all parts have a slot
      if (round == now) leave(sum, true);
      prims::block_sync();
    }
  }

  // Stores the warp's sums, or adds them to those that are there.
  FUSEDRNN_DEVICE void leave(const Sums& sum, bool adds) {
    Sum* own = memory + slot * slot_pitch + group * kWarpPitch + 2 * (lane % 4) * kColumnPitch + lane / 4;
#pragma unroll
    for (int gate = 0; gate < kSums; ++gate)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Sum& place = own[gate * kGatePitch + (n * kColumns + i % 2) * kColumnPitch + 8 * (i / 2)];
          place = adds ? place + sum[gate][n][i] : sum[gate][n][i];
        }
  }

  // The sums of the i-th (row, unit) of the block: their parts, in an order that never changes.
  FUSEDRNN_DEVICE void total(int i, Sum (&sum)[kSums]) const {
    const unsigned row = unsigned(i) / kUnits;
    const Sum* parts = memory + row / kWarpRows * kWarpPitch + row % kWarpRows * kColumnPitch + unsigned(i) % kUnits;
#pragma unroll
    for (int gate = 0; gate < kSums; ++gate) sum[gate] = parts[gate * kGatePitch];
    for (int other = 1; other < slots; ++other) {
      parts += slot_pitch;
#pragma unroll
      for (int gate = 0; gate < kSums; ++gate) sum[gate] += parts[gate * kGatePitch];
    }
  }

  // The end of a step for the i-th (row, unit) of the block.
  template <class Step, class Pass>
  FUSEDRNN_DEVICE void finish(const Step& step, int d, const typename Step::Now& now, int i, int row, int unit,
                              const typename Step::Inputs& inputs, const Pass& pass) const {
    Sum sums[kGates] = {};  // nothing for rows that have not begun
    if (row < step.multiplied(now)) total(i, sums);
    step.finish(d, now, row, unit, sums, inputs, pass);
  }
};

// All that a unit reads besides its sums.
template <class Step>
FUSEDRNN_DEVICE typename Step::Inputs fetch_all(const Step& step, int d, const typename Step::Now& now, int row, int unit) {
  typename Step::Inputs in;
  step.fetch_constants(d, unit, in);
  step.fetch(d, now, row, unit, in);
  return in;
}

// For kernels whose next step reads the states from memory.
struct PassNothing {
  static constexpr bool kInput = false;
  template <class Places, class Elements>
  FUSEDRNN_DEVICE void operator()(const Places&, const Elements&) const {}
};

// One kernel of a step. A Step is what differs from kernel to kernel, and is its argument:
//   Arithmetic, kGates           of its product
//   ProductPlan plan, and p with the sizes of the call
//   kBackward                    the order of its walk, for kernels that do all steps
//   const Element* weights(d), states(d, now)
//   Now, step[d]                 what differs between the steps of one direction
//   int multiplied(now)          rows whose sum is wanted; others take zero
//   int visited(now)             rows that are looked at
//   int units                    of a head; a unit's number below counts those of the heads before its own
//   Inputs                       what a unit reads besides its sums
//   fetch_constants(d, unit, inputs)   what it has of that at every step
//   fetch(d, now, row, unit, inputs)   the rest
//   finish(d, now, row, unit, sums, inputs, pass)   what becomes of them; pass(places, elements) with the numbers that the next step
//                                multiplies, when they are written: arrays, of their places in states(d, next) and of themselves;
//                                pass.input(place, element), if Pass::kInput, with those of the input's halves (stack_backward.cuh)
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
  BlockSums<A, kGates, kTiles, false> sums(step.plan, shared);
  const int64_t tile = first_of_head(step.plan.unit_tiles) + place.unit_tile;
  const typename A::Element* weights = step.weights(d) + tile * packed_tile_count<A>(step.plan, kGates);
  prims::let_next_grid_start();  // whose threads wait for the end of this grid before they touch anything that it writes
  if (multiplies) sums.load_weights(weights);  // which were packed before the first step
  prims::wait_for_previous_grid();
  if (place.first_row >= step.visited(now)) return;
  if (multiplies) sums.multiply(weights, step.states(d, now) + place.first_row * (step.plan.depth_blocks * A::kDepth));
  for (int i = threadIdx.x; i < kUnits * step.plan.block_rows; i += blockDim.x) {
    const int row = place.first_row + i / kUnits, unit = place.unit_tile * kUnits + i % kUnits;
    if (row >= step.visited(now) || unit >= step.units) continue;
    const int own = first_unit(step.units) + unit;
    sums.finish(step, d, now, i, row, own, fetch_all(step, d, now, row, own), PassNothing{});
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
