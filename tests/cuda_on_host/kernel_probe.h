// What engine_test wants to know of the kernels it is linked with, and of the emulator that they run on.
#pragma once
#include "cuda/engine.h"

namespace test {

// Null where a build leaves the cell out.
const fusedrnn::CudaEngine* engine_of(int cell);

// How the two products of a pass are divided; the second one's plan has no units without a projection.
struct Plans {
  fusedrnn::ProductPlan hidden{}, projection{};
};
Plans forward_plans(const fusedrnn::ForwardParams& p, const fusedrnn::CudaContext& context);
Plans backward_plans(const fusedrnn::CudaBackwardParams& p, const fusedrnn::CudaContext& context);

// The schedules of cuda_on_host::Order by name.
constexpr const char* kOrders[] = {"in order", "reverse", "random", "skewed"};
void schedule(int order, uint64_t seed);
int most_grids_at_once();  // since schedule()

}  // namespace test

// Called by builds of the kernels that have mistakes to make: whether to make this one.
extern "C" bool fusedrnn_test_plant(int mistake);
