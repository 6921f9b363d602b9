// The engines of the cells that this build has. Without engine.cuh, so that what the linked kernels are is used and not made anew.
#include "cells/cells.h"
#include "kernel_probe.h"

const fusedrnn::CudaEngine* test::engine_of(int cell) {
  const fusedrnn::CudaEngine* engine = nullptr;
  fusedrnn::for_each_cell([&](int id, auto type) {
    if (id == cell) engine = &fusedrnn::cuda_engine<decltype(type)>();
  });
  return engine;
}
