// The face of the CUDA kernels: one table of functions per cell, without a CUDA header, so that plain C++ can call them.
#pragma once
#include "../params.h"
#include "plan.h"

namespace fusedrnn {

// Where and how a call runs.
struct CudaContext {
  Chip chip;
  void* stream;     // a cudaStream_t
  bool overlaps;    // whether a grid may start before the one before it has ended
  bool tf32;        // whether products of float32 numbers may go through the matrix units, rounded to TF32
  Regimes regimes;  // that may run it
};

struct CudaBackwardParams : BackwardParams {
  void* hidden_before;                  // (rows, D, P) the hidden states that the steps began with; null: not wanted
};

struct CudaStackBackwardParams : StackBackwardParams {
  void* hidden_before[kMostStacked];    // of each layer, as above
};

// All pointers of the parameters but those of `steps` are to device memory, and so is the workspace.
struct CudaEngine {
  int64_t (*forward_workspace)(const ForwardParams&, const CudaContext&);  // bytes that forward needs
  void (*forward)(const ForwardParams&, const CudaContext&, void* workspace);
  int64_t (*backward_workspace)(const CudaBackwardParams&, const CudaContext&);
  void (*backward)(const CudaBackwardParams&, const CudaContext&, void* workspace);
  int64_t (*stack_workspace)(const StackParams&, const CudaContext&);  // null, as the next, where the cell has no such kernels
  void (*stack)(const StackParams&, const CudaContext&, void* workspace);
  int64_t (*stack_backward_workspace)(const CudaStackBackwardParams&, const CudaContext&);
  void (*stack_backward)(const CudaStackBackwardParams&, const CudaContext&, void* workspace);
};

template <class Cell>
const CudaEngine& cuda_engine();  // instantiated for each cell in a file of its own, cuda/<cell>.cu

}  // namespace fusedrnn
