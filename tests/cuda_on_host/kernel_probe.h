// What engine_test wants of the kernels that it is linked with, and of the emulator that they run on.
#pragma once
#include "cuda/engine.h"

namespace test {

// Null where a build leaves the cell out.
const fusedrnn::CudaEngine* engine_of(int cell);

// The schedules of cuda_on_host::Order by name.
constexpr const char* kOrders[] = {"in order", "reverse", "random", "skewed"};
void schedule(int order, uint64_t seed);
int most_grids_at_once();  // since schedule()

}  // namespace test

// Called by builds of the kernels that have mistakes to make: whether to make this one.
extern "C" bool fusedrnn_test_plant(int mistake);
