// All steps of a pass in one grid, where the weights fit into the shared memory of a block: they are read once and stay, and a
// block goes through the whole sequence with rows of the batch of its own. Blocks never wait for each other, and the threads
// of a block meet once a step. The steps themselves, forward and backward, are those that a grid a step runs too
// (step_forward.cuh, step_backward.cuh).
#pragma once
#include "product.cuh"
#include "walk.h"

namespace fusedrnn {

// A warp takes 16 units, all gates of each, and kTiles tiles of the block's rows, and keeps their sums in registers: a lane has
// all gates of a unit, and runs the cell on them. The same lane comes back to the same units at every step.
template <class Step, int kTiles>
__global__ void __launch_bounds__(kMostWarps * kLanes, 1) block_kernel(const __grid_constant__ ManySteps<Step> args) {
  using A = typename Step::Arithmetic;
  using Sum = typename A::Sum;
  using Element = typename A::Element;
  [[maybe_unused]] constexpr int kTogether = Step::kGates == 1 ? 4 : 2;  // blocks of the depth to a turn. Not measured yet.
  constexpr int kGates = Step::kGates, kWeights = kRows * A::kDepth, kStates = kColumns * A::kDepth;
  const Step& step = args.step;
  const ProductPlan& plan = step.plan;
  const int d = blockIdx.z, lane = threadIdx.x % kLanes;
  const int first_row = int(blockIdx.x) * plan.block_rows, first_own = first_unit(step.units);

  const int64_t count = plan.unit_tiles * packed_tile_count<A>(plan, kGates);
  prims::Shared shared;
  Element* weights = shared.template take<Element>(count);
  copy_in(weights, step.weights(d) + first_of_head(count), count);
  prims::block_sync();  // the weights are there

  const bool up = goes_up(d, Step::kBackward);
  const int T = int(step.p.steps.T);
  WalkPlace walk = walk_place(args.rows, T, d, args.rows.begin, args.first[d], up);
  for (int s = args.rows.begin; s < args.rows.end; ++s, go_on(walk, args.rows, T, d, up)) {
    const typename Step::Now now = step_at(step.p, d, walk);
    const Element* states = step.states(d, now) + first_row * (plan.depth_blocks * A::kDepth);
    const int unit_tiles = int(plan.unit_tiles), items = unit_tiles * plan.groups;
    for (int item = threadIdx.x / kLanes; item < items; item += plan.warps) {
      const int unit_tile = item % unit_tiles, tile = item / unit_tiles * kTiles;
      const int item_row = first_row + tile * kTileRows;
      if (item_row >= step.visited(now)) break;  // so are the groups of rows behind it
      auto unit_of = [&](int i) { return unit_tile * kUnits + lane / 4 + 8 * (i / 2); };
      auto each = [&](const auto& fn) {  // fn(its place in the sums, row, unit) for what this lane has
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = item_row + n * kTileRows + 2 * (lane % 4) + i % 2;
            if (row < step.visited(now) && unit_of(i) < step.units) fn(n, i, row, first_own + unit_of(i));
          }
      };
      typename Step::Inputs inputs[kTiles][4];  // on their way while the product is made
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        if (unit_of(i) < step.units) step.fetch_constants(d, first_own + unit_of(i), inputs[0][i]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) inputs[n][i] = inputs[0][i / 2 * 2];
      each([&](int n, int i, int row, int unit) { step.fetch(d, now, row, unit, inputs[n][i]); });

      prims::warp_sync();  // lanes without rows or units of their own multiply with the others

      Sum sum[kGates][kTiles][4] = {};
      const int depth_blocks = int(plan.depth_blocks), turns = item_row < step.multiplied(now) ? depth_blocks : 0;
      const Element* states_next = states + int64_t(tile) * depth_blocks * kStates + A::States::share(lane);
      const Element* weights_next = weights + unit_tile * depth_blocks * kGates * kWeights + A::Weights::share(lane);
#pragma unroll kTogether
      for (int left = turns; left > 0; --left, states_next += kStates, weights_next += kGates * kWeights) {
        typename A::States state[kTiles];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) state[n].load(states_next + n * depth_blocks * kStates);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          typename A::Weights weight;
          weight.load(weights_next + gate * kWeights);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) A::multiply_add(sum[gate][n], weight, state[n]);
        }
      }
      each([&](int n, int i, int row, int unit) {
        Sum total[kGates];  // nothing for rows that have not begun, even where zero times a weight is not zero
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) total[gate] = row < step.multiplied(now) ? sum[gate][n][i] : Sum(0);
        step.finish(d, now, row, unit, total, inputs[n][i], PassNothing{});
      });
    }
    prims::block_sync();  // all rows have the states that the next step multiplies
  }
}

}  // namespace fusedrnn
