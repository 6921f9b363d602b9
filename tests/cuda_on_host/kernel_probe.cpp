// Compiled as the kernels are, sanitizers included; the rest of engine_test is not.
#include "kernel_probe.h"

#include "cuda/engine.cuh"

namespace test {
namespace {

using namespace fusedrnn;

template <template <class, class> class Pass, class Params, class Fn>
void with_pass(const Params& p, const CudaContext& context, const Fn& fn) {
  for_each_cell([&](int id, auto cell) {
    if (id != p.cell) return;
    with_arithmetic(p, context, [&](auto arithmetic) {
      Arena arena{nullptr};
      fn(Pass<decltype(cell), decltype(arithmetic)>(p, context, arena));
    });
  });
}

}  // namespace

Plans forward_plans(const ForwardParams& p, const CudaContext& context) {
  Plans plans;
  with_pass<ForwardPass>(p, context, [&](const auto& pass) {
    plans.hidden = pass.cell_plan;
    if (pass.projected) plans.projection = pass.projection_plan;
  });
  return plans;
}

Plans backward_plans(const CudaBackwardParams& p, const CudaContext& context) {
  Plans plans;
  with_pass<BackwardPass>(p, context, [&](const auto& pass) {
    plans.hidden = pass.hh_plan;
    if (pass.projected) plans.projection = pass.hr_plan;
  });
  return plans;
}

void schedule(int order, uint64_t seed) { cuda_on_host::configure(order, seed); }

int most_grids_at_once() { return int(cuda_on_host::statistics().most_grids); }

}  // namespace test
