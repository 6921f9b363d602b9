// All steps of a pass in one grid whose blocks are all on the chip at once. Each keeps the weights of 16 units, all gates, in
// shared memory for the whole sequence, and multiplies them with the states of its rows of the batch. The blocks of the same
// rows exchange their part of the new states once a step, through the second-level cache. The steps themselves, forward and
// backward, are those that a grid a step runs too (step_forward.cuh, step_backward.cuh).
#pragma once
#include "exchange.cuh"
#include "product.cuh"
#include "walk.h"

namespace fusedrnn {

// Words of one direction in which blocks say what they have done.
inline int64_t exchange_words(const ProductPlan& plan) {
  return plan.regime == Regime::kGrid ? plan.unit_tiles * plan.batch_tiles : 0;
}

template <class Step, int kTiles>
__global__ void __launch_bounds__(kMostWarps * kLanes, 1) grid_kernel(const __grid_constant__ ManySteps<Step> args) {
  using A = typename Step::Arithmetic;
  using Element = typename A::Element;
  constexpr int kGates = Step::kGates;
  const Step& step = args.step;
  const ProductPlan& plan = step.plan;
  const int d = blockIdx.z;
  const BlockPlace place(plan);

  const int64_t count = packed_tile_count<A>(plan, kGates);
  prims::Shared shared;
  Element* weights = shared.template take<Element>(count);
  BlockSums<A, kGates, kTiles> sums(plan, shared);
  copy_in(weights, step.weights(d) + place.unit_tile * count, count);
  const int64_t batch_tile = place.first_row / plan.block_rows;
  const Exchange exchange{args.done + (d * plan.batch_tiles + batch_tile) * plan.unit_tiles, int(plan.unit_tiles), int(place.unit_tile)};
  prims::block_sync();  // the weights are there

  const int places = kUnits * plan.block_rows;  // (row, unit) of the block, of which a thread has the same at every step
  int64_t first = args.first[d];
  for (int64_t s = args.rows.begin; s < args.rows.end; ++s) {
    const typename Step::Now now = step_at(step.p, args.rows, d, s, first);
    auto row_of = [&](int i) { return place.first_row + i / kUnits; };
    auto unit_of = [&](int i) { return place.unit_tile * kUnits + i % kUnits; };
    auto is_place = [&](int i) { return i < places && row_of(i) < step.visited(now) && unit_of(i) < step.units; };
    auto fetch = [&](int i) { return is_place(i) ? step.fetch(d, now, row_of(i), unit_of(i)) : typename Step::Inputs{}; };

    typename Step::Inputs next = fetch(threadIdx.x);  // on its way while others finish the last step
    exchange.wait(s);
    if (place.first_row < step.multiplied(now)) {
      sums.load_weights(weights, sums.part);
      sums.multiply(weights, step.states(d, now) + place.first_row * plan.depth_blocks * A::kDepth);
    }
    for (int i = threadIdx.x; i < places; i += blockDim.x) {
      const typename Step::Inputs inputs = next;
      next = fetch(i + blockDim.x);
      if (is_place(i)) sums.finish(step, d, now, i, row_of(i), unit_of(i), inputs);
    }
    exchange.say(s + 1);
    first = first_of_next(args.rows, d, s, first, goes_up(d, Step::kBackward));
  }
}

}  // namespace fusedrnn
