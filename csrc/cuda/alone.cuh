// All steps of a pass in one grid, for a cell without a product: a unit needs no other one, so that a thread takes one unit of one
// row of the batch through the whole sequence, and waits for nobody. The steps themselves, forward and backward, are those that a
// grid a step runs for other cells (step_forward.cuh, step_backward.cuh), with sums of zero.
#pragma once
#include "plan.h"
#include "prims.cuh"
#include "product.cuh"
#include "walk.h"

namespace fusedrnn {

template <class Step>
__global__ void __launch_bounds__(kAloneThreads, 1) alone_kernel(const __grid_constant__ ManySteps<Step> args) {
  using Now = typename Step::Now;
  using Inputs = typename Step::Inputs;
  const Step& step = args.step;
  const int d = blockIdx.z;
  const int64_t place = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int row = int(place / step.units), unit = int(place % step.units);
  if (row >= step.p.steps.B) return;

  const bool up = goes_up(d, Step::kBackward);
  const int T = int(step.p.steps.T);
  WalkPlace walk = walk_place(args.rows, T, d, args.rows.begin, args.first[d], up);
  auto fetch = [&](const Now& now, Inputs& inputs) {
    if (row < step.visited(now)) step.fetch(d, now, row, unit, inputs);
  };
  Now now = step_at(step.p, d, walk);
  Inputs inputs{};
  step.fetch_constants(d, unit, inputs);
  fetch(now, inputs);
  for (int s = args.rows.begin; s < args.rows.end; ++s) {
    Now next = now;
    Inputs next_inputs = inputs;
    if (s + 1 < args.rows.end) {  // on their way while this step is finished
      go_on(walk, args.rows, T, d, up);
      next = step_at(step.p, d, walk);
      fetch(next, next_inputs);
    }
    const typename Step::Sum sums[Step::kGates] = {};
    if (row < step.visited(now)) step.finish(d, now, row, unit, sums, inputs, PassNothing{});
    step.fetch_left(d, row, unit, next_inputs);
    now = next;
    inputs = next_inputs;
  }
}

}  // namespace fusedrnn
