// Compiled with the cells and the sanitizers of the kernels, as the rest of engine_test is not. Without engine.cuh, so that
// the kernels that are linked are used, and not made anew.
#include "kernel_probe.h"

#include "cells/cells.h"
#include "cuda_on_host.h"

namespace test {

const fusedrnn::CudaEngine* engine_of(int cell) {
  const fusedrnn::CudaEngine* engine = nullptr;
  fusedrnn::for_each_cell([&](int id, auto type) {
    if (id == cell) engine = &fusedrnn::cuda_engine<decltype(type)>();
  });
  return engine;
}

void schedule(int order, uint64_t seed) { cuda_on_host::configure(order, seed); }

int most_grids_at_once() { return int(cuda_on_host::statistics().most_grids); }

}  // namespace test
