// The CPU as the operators see it (operators.h, Engine): which engine runs a call, and in what memory.
#pragma once
#include "engine.h"
#include "workspace.h"

namespace fusedrnn {

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
    return grad_weights(p, needs);
  }
  std::vector<Tensor> grad_weights(GradWeightsParams& p, const Needs& needs) const {
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

}  // namespace fusedrnn
