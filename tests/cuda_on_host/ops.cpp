// The CUDA kernels, compiled for the CPU, as operators on CPU tensors: torch.ops.fusedrnn_on_host has those of torch.ops.fusedrnn, with
// the same checks, allocations and kernels as a GPU's, so that the tests of the one run on the other.
#include "cuda/on_cuda.h"
#include "cuda_on_host.h"

namespace {

fusedrnn::Chip chip{4, 99 << 10, 9};  // few multiprocessors, so that small shapes already meet the layouts of large ones
fusedrnn::Regimes regimes;

struct Host {
  struct Guard {
    explicit Guard(int) {}
  };
  static fusedrnn::CudaContext context(int, bool allow_tf32) {
    return {chip, nullptr, chip.major >= 9, allow_tf32, regimes};
  }
};

// The order in which threads run (cuda_on_host::Order), its seed, the chip for which work is planned, and whether kernels that
// do all steps may be chosen, by a block, by a cluster and by a grid.
void configure(int64_t order, int64_t seed, int64_t multiprocessors, int64_t major, bool block, bool cluster, bool grid) {
  cuda_on_host::configure(int(order), uint64_t(seed));
  chip.multiprocessors = int(multiprocessors);
  chip.major = int(major);
  regimes = {block, cluster, grid};
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedrnn_on_host, m) {
  m.def(fusedrnn::kForwardSchema);
  m.def(fusedrnn::kBackwardSchema);
  m.def(fusedrnn::kStackSchema);
  m.def(fusedrnn::kStackBackwardSchema);
  m.def("configure(int order, int seed, int multiprocessors, int major, bool block, bool cluster, bool grid) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn_on_host, CPU, m) {
  m.impl("recurrence_forward", TORCH_BOX(&fusedrnn::recurrence_forward<fusedrnn::OnCuda<Host>>));
  m.impl("recurrence_backward", TORCH_BOX(&fusedrnn::recurrence_backward<fusedrnn::OnCuda<Host>>));
  m.impl("stack_forward", TORCH_BOX(&fusedrnn::stack_forward<fusedrnn::OnCuda<Host>>));
  m.impl("stack_backward", TORCH_BOX(&fusedrnn::stack_backward<fusedrnn::OnCuda<Host>>));
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn_on_host, CompositeExplicitAutograd, m) { m.impl("configure", TORCH_BOX(&configure)); }
