// Launches the kernels that do all steps of a pass.
#pragma once
#include "block.cuh"
#include "grid.cuh"

namespace fusedrnn {

// As many grids as it takes to list the rows of all steps; one, if all steps have the same.
// done: the words of an exchange, all zero; exchange_words() for each direction.
template <class Step>
void launch_many_steps(const char* name, const Step& step, const Walk& walk, int64_t directions, int64_t steps, uint32_t* done,
                       const Queue& queue) {
  constexpr int64_t kMostArguments = 4096;  // bytes, on every chip and by every CUDA
  static_assert(sizeof(ManySteps<Step>) <= kMostArguments, "a kernel's arguments must be no larger");
  constexpr int kSumBytes = sizeof(typename Step::Sum);
  const ProductPlan& plan = step.plan;
  const bool by_block = plan.regime == Regime::kBlock;
  const auto kernel = by_block             ? (plan.tiles == 1 ? block_kernel<Step, 1> : block_kernel<Step, most_block_tiles(kSumBytes)>)
                      : plan.tiles == 1    ? grid_kernel<Step, 1>
                      : plan.tiles == 2    ? grid_kernel<Step, 2>
                                           : grid_kernel<Step, most_tiles(kSumBytes)>;
  Grid grid{plan.blocks(), int(directions), plan.threads(), plan.shared_bytes, false};
  grid.all_at_once = !by_block;
  for (int64_t begin = 0; begin < steps;) {
    ManySteps<Step> args{step, list_rows(walk, directions, begin, steps), {}, done};
    for (int64_t d = 0; d < directions; ++d) args.first[d] = walk.first(d, begin);
    launch(name, kernel, grid, queue, args);
    begin = args.rows.end;
  }
}

}  // namespace fusedrnn
