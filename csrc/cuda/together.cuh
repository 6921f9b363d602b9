// All steps of a pass in one grid, where several blocks keep the weights together. Each keeps those of some tiles of 16 units, all
// gates, in shared memory for the whole sequence, and multiplies them with the states of its rows of the batch. The blocks of the same
// rows pass their part of the new states to each other once a step. The steps themselves, forward and backward, are those that a
// grid a step runs too (step_forward.cuh, step_backward.cuh).
//
// A Meeting is how the states are passed, and is made for a call (grid.cuh, cluster.cuh):
//   kOneTile            whether a block has no more than one tile of units
//   begin()             after which all weights and first states are there
//   wait(s)             until all blocks have done the steps before step s; by all threads of the block, as everything here
//   states(now)         of the block's rows, for the step
//   pass(now)           what is called with each number that the next step multiplies
//   say(s)              that this block has done step s
//   end()               before the block goes
#pragma once
#include "product.cuh"
#include "walk.h"

namespace fusedrnn {

template <class Step, int kTiles, template <class> class Meeting>
__global__ void __launch_bounds__(kMostWarps * kLanes, 1) together_kernel(const __grid_constant__ ManySteps<Step> args) {
  using A = typename Step::Arithmetic;
  using Element = typename A::Element;
  constexpr int kGates = Step::kGates;
  const Step& step = args.step;
  const ProductPlan& plan = step.plan;
  const int d = blockIdx.z;
  const BlockPlace place(plan);

  const int tile_size = int(packed_tile_count<A>(plan, kGates));
  prims::Shared shared;
  Element* weights = shared.template take<Element>(int(plan.unit_tiles_each) * tile_size);
  BlockSums<A, kGates, kTiles, true> sums(plan, shared);
  const Meeting<Step> meeting(args, place, int(plan.depth_blocks) * A::kDepth, shared);
  if (place.unit_tile < place.end_tile)
    copy_in(weights, step.weights(d) + (first_of_head(plan.unit_tiles) + place.unit_tile) * tile_size,
            (place.end_tile - place.unit_tile) * tile_size);
  meeting.begin();

  const int first_own = first_unit(step.units);
  const int places = kUnits * plan.block_rows;  // (row, unit) of a tile, of which a thread has the same at every step
  const int threads = blockDim.x, own_unit = threadIdx.x % kUnits;  // places of a thread are of one unit, since 16 divides `threads`
  typename Step::Inputs next;
  auto fetch_constants = [&](int tile) {
    if (tile * kUnits + own_unit < step.units) step.fetch_constants(d, first_own + tile * kUnits + own_unit, next);
  };
  if (Meeting<Step>::kOneTile) fetch_constants(place.unit_tile);
  const bool up = goes_up(d, Step::kBackward);
  const int T = int(step.p.steps.T);
  WalkPlace walk = walk_place(args.rows, T, d, args.rows.begin, args.first[d], up);
  for (int s = args.rows.begin; s < args.rows.end; ++s, go_on(walk, args.rows, T, d, up)) {
    const typename Step::Now now = step_at(step.p, d, walk);
    const bool multiplies = place.first_row < step.multiplied(now);
    const auto pass = meeting.pass(now);
    int tile = place.unit_tile;
    auto row_of = [&](int i) { return place.first_row + int(unsigned(i) / kUnits); };
    auto unit = [&] { return tile * kUnits + own_unit; };
    auto is_place = [&](int i) {
      return i < places && tile < place.end_tile && row_of(i) < step.visited(now) && unit() < step.units;
    };
    auto fetch = [&](int i) {
      if (is_place(i)) step.fetch(d, now, row_of(i), first_own + unit(), next);
    };
    auto begin_tile = [&] {  // on its way while others finish the last step, or tile
      if (!Meeting<Step>::kOneTile) fetch_constants(tile);
      fetch(threadIdx.x);
    };

    begin_tile();
    meeting.wait(s);
    while (tile < place.end_tile) {
      if (multiplies) {
        const Element* tile_weights = weights + (tile - place.unit_tile) * tile_size;
        sums.multiply(tile_weights, meeting.states(now));
      }
      for (int i = threadIdx.x; i < places; i += threads) {
        const typename Step::Inputs inputs = next;
        if (i + threads < places) fetch(i + threads);
        if (is_place(i)) sums.finish(step, d, now, i, row_of(i), first_own + unit(), inputs, pass);
      }
      if (Meeting<Step>::kOneTile || ++tile == place.end_tile) break;
      begin_tile();
      prims::block_sync();  // nobody reads this tile's sums any more
    }
    meeting.say(s);
  }
  meeting.end();
}

}  // namespace fusedrnn
