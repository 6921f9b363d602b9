// The body of each cuda/<cell>.cu: picks the passes for the formats of a call.
#pragma once
#include "../cells/cells.h"
#include "stack_backward.cuh"
#include "step_backward.cuh"
#include "step_forward.cuh"

namespace fusedrnn {

static_assert(Float32::kDepth == block_depth(Dtype::kFloat32, false) && Tf32::kDepth == block_depth(Dtype::kFloat32, true) &&
                  Float64::kDepth == block_depth(Dtype::kFloat64, false) &&
                  BFloat16::kDepth == block_depth(Dtype::kBFloat16, false) &&
                  Float16::kDepth == block_depth(Dtype::kFloat16, false),
              "the plan and the kernels must mean the same blocks");

// Calls fn(A{}) with the arithmetic of a call.
template <class Fn>
void with_arithmetic(const LayerParams& p, const CudaContext& context, const Fn& fn) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return context.tf32 ? fn(Tf32{}) : fn(Float32{});
    case Dtype::kFloat64:
      return fn(Float64{});
    case Dtype::kBFloat16:
      return fn(BFloat16{});
    case Dtype::kFloat16:
      return fn(Float16{});
  }
}

// The context without what the code that this device runs cannot do.
template <class A>
CudaContext as_compiled(CudaContext context) {
  const bool modern = context.chip.major >= 9 && is_made_for_sm_90(pack_kernel<A, 1>);  // any kernel: all are compiled alike
  context.overlaps = context.overlaps && modern;
  context.regimes.cluster = context.regimes.cluster && modern;
  return context;
}

template <class Cell, template <class, class> class Pass, class Params>
int64_t cuda_workspace(const Params& p, const CudaContext& context) {
  int64_t bytes = 0;
  with_arithmetic(p, context, [&](auto arithmetic) {
    using A = decltype(arithmetic);
    Arena arena{nullptr};
    Pass<Cell, A>(p, as_compiled<A>(context), arena);
    bytes = arena.used;
  });
  return bytes;
}

template <class Cell, template <class, class> class Pass, class Params>
void run_cuda(const Params& p, const CudaContext& context, void* workspace) {
  with_arithmetic(p, context, [&](auto arithmetic) {
    using A = decltype(arithmetic);
    Arena arena{static_cast<char*>(workspace)};
    Pass<Cell, A>(p, as_compiled<A>(context), arena).run();
  });
  end_of_launches();
}

template <class Cell>
const CudaEngine& cuda_engine() {
  static const CudaEngine engine = [] {
    CudaEngine made{cuda_workspace<Cell, ForwardPass, ForwardParams>, run_cuda<Cell, ForwardPass, ForwardParams>,
                    cuda_workspace<Cell, BackwardPass, CudaBackwardParams>, run_cuda<Cell, BackwardPass, CudaBackwardParams>,
                    nullptr, nullptr, nullptr, nullptr};
    if constexpr (is_of_torch<Cell>) {
      made.stack_workspace = cuda_workspace<Cell, StackPass, StackParams>;
      made.stack = run_cuda<Cell, StackPass, StackParams>;
      made.stack_backward_workspace = cuda_workspace<Cell, StackBackwardPass, CudaStackBackwardParams>;
      made.stack_backward = run_cuda<Cell, StackBackwardPass, CudaStackBackwardParams>;
    }
    return made;
  }();
  return engine;
}

}  // namespace fusedrnn
