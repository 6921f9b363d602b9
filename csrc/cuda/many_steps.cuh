// Launches the kernels that do all steps of a pass.
#pragma once
#include "alone.cuh"
#include "block.cuh"
#include "cluster.cuh"
#include "grid.cuh"

namespace fusedrnn {

template <class Step, template <class> class Meeting>
auto kernel_of_tiles(int tiles) {
  return tiles == 1   ? together_kernel<Step, 1, Meeting>
         : tiles == 2 ? together_kernel<Step, 2, Meeting>
                      : together_kernel<Step, most_tiles(sizeof(typename Step::Sum)), Meeting>;
}
template <class Step>
auto kernel_of_many_steps(const ProductPlan& plan) {
  if (plan.regime == Regime::kCluster) return kernel_of_tiles<Step, ByCluster>(plan.tiles);
  if (plan.regime == Regime::kGrid) return kernel_of_tiles<Step, ByGrid>(plan.tiles);
  return plan.tiles == 1 ? block_kernel<Step, 1> : block_kernel<Step, most_block_tiles(sizeof(typename Step::Sum), Step::kInner + 1)>;
}

// As many grids as it takes to list the rows of all steps; one, if all steps have the same.
template <class Step>
void launch_walk(const char* name, void (*kernel)(ManySteps<Step>), const Grid& grid, const Step& step, const Walk& walk,
                 int64_t steps, uint32_t* done, const Queue& queue) {
  constexpr int64_t kMostArguments = 4096;  // bytes, on every chip and by every CUDA
  static_assert(sizeof(ManySteps<Step>) <= kMostArguments, "a kernel's arguments must be no larger");
  const int directions = int(step.p.D);
  for (int begin = 0; begin < steps;) {
    ManySteps<Step> args{step, list_rows(walk, directions, begin, steps), {}, done};
    for (int64_t d = 0; d < directions; ++d) args.first[d] = walk.first(d, begin);
    launch(name, kernel, grid, queue, args);
    begin = args.rows.end;
  }
}

// done: the words of an exchange, all zero; exchange_words() for each strand.
template <class Step>
void launch_many_steps(const char* name, const Step& step, const Walk& walk, int64_t directions, int64_t steps, uint32_t* done,
                       const Queue& queue) {
  const ProductPlan& plan = step.plan;
  Grid grid{plan.blocks(), int(directions), plan.threads(), plan.shared_bytes, false};
  grid.heads = int(step.p.N);
  grid.all_at_once = plan.regime == Regime::kGrid;
  grid.cluster = plan.regime == Regime::kCluster ? int(plan.sharers) : 1;
  launch_walk<Step>(name, kernel_of_many_steps<Step>(plan), grid, step, walk, steps, done, queue);
}

template <class Step>
void launch_alone(const char* name, const Step& step, const Walk& walk, int64_t directions, int64_t steps, const Queue& queue) {
  const Grid grid{step.plan.blocks(), int(directions), step.plan.threads(), 0, false};
  launch_walk<Step>(name, alone_kernel<Step>, grid, step, walk, steps, nullptr, queue);
}

}  // namespace fusedrnn
