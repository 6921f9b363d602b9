// The operators of the CPU, and the schemas of all devices.
#include "cpu/engine.h"
#include "cpu/workspace.h"
#include "stack_operators.h"

namespace fusedrnn {

const CpuEngine& cpu_engine(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return avx2::kEngine;
  if (isa == Isa::kAvx512) return avx512::kEngine;
#endif
  (void)isa;
  return baseline::kEngine;
}

namespace {

class OnCpu {
 public:
  static constexpr bool kLengthsOnHost = true, kFeeds = true;
  OnCpu(const Call& call, bool) : call_(call), engine_(cpu_engine(selected_isa())) {}

  void forward(const ForwardParams& p) const {
    run_in_workspace(call_.first, p, engine_.forward_workspace, engine_.forward);
  }

  void backward(const BackwardParams& p, const Needs&) const {
    run_in_workspace(call_.first, p, engine_.backward_workspace, engine_.backward);
  }

  std::vector<Tensor> grad_weights(GradWeightsParams& p, const Needs& needs, const GradSources&) const {
    const int64_t rows = call_.cell.gates * call_.H;
    std::vector<Tensor> grads;
    auto wanted = [&](bool need, const Sizes& sizes) {
      grads.push_back(allocate(call_.first, need ? sizes : Sizes{0}));
      return need ? grads.back().data_ptr() : nullptr;
    };
    for (int64_t d = 0; d < call_.D; ++d) {
      p.grad_weight_ih[d] = wanted(needs.grad_weight_ih, {rows, p.I});
      void* weights = wanted(needs.grad_weight_hh, call_.weight_hh_sizes());
      p.grad_bias_ih[d] = wanted(needs.grad_bias, {rows});
      p.grad_bias_hh[d] = wanted(needs.grad_bias, {rows});
      void* others = wanted(needs.grad_weight_hr, call_.weight_hr_sizes());
      p.grad_weight_hh[d] = call_.cell.multiplies ? weights : nullptr;
      p.grad_weight_hr[d] = call_.projected ? others : nullptr;
      p.grad_unit[d] = call_.projected ? nullptr : call_.cell.multiplies ? others : weights;
    }
    if (needs.any_weight()) run_in_workspace(call_.first, p, engine_.grad_weights_workspace, engine_.grad_weights);
    return grads;
  }

 private:
  const Call& call_;
  const CpuEngine& engine_;
};

// The layers of a stack are in one grid of a GPU's; a CPU has no such kernel, and runs them one after the other.
struct NoStack : OnCpu {
  using OnCpu::OnCpu;
  static void refuse(const char* op) { STD_TORCH_CHECK(false, op, ": weight_hh must be on a CUDA device, got one on the CPU"); }
  void stack(const StackParams&) const { refuse("fusedrnn::stack_forward"); }
  void stack_backward(const StackBackwardParams&, const Needs&, std::deque<NoStack>&) const { refuse("fusedrnn::stack_backward"); }
};

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY(fusedrnn, m) {
  m.def(fusedrnn::kForwardSchema);
  m.def(fusedrnn::kBackwardSchema);
  m.def(fusedrnn::in_place_schema().c_str());
  m.def(fusedrnn::kStackSchema);
  m.def(fusedrnn::kStackBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("recurrence_forward", TORCH_BOX(&fusedrnn::recurrence_forward<fusedrnn::OnCpu>));
  m.impl("recurrence_backward", TORCH_BOX(&fusedrnn::recurrence_backward<fusedrnn::OnCpu>));
  m.impl("recurrence_backward_", TORCH_BOX((&fusedrnn::recurrence_backward<fusedrnn::OnCpu, true>)));
  m.impl("stack_forward", TORCH_BOX(&fusedrnn::stack_forward<fusedrnn::NoStack>));
  m.impl("stack_backward", TORCH_BOX(&fusedrnn::stack_backward<fusedrnn::NoStack>));
}
