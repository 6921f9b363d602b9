// One call of an operator on the CUDA kernels: the recurrence is theirs, and the gradients of weights and biases, which are
// products and sums over all rows of the sequence at once, are ATen's, by what torch itself uses and is set to.
//
// A Runtime says where the kernels run:
//   Guard(device)                   while it lives, the device is the current one
//   context(device, allow_tf32)     of a call on its current stream
#pragma once
#include "engine.h"
#include "../stack_operators.h"

namespace fusedrnn {

template <class Runtime>
class OnCuda {
 public:
  static constexpr bool kLengthsOnHost = false, kFeeds = false;
  OnCuda(const Call& call, bool allow_tf32)
      : call_(call), guard_(call.first.get_device_index()),
        context_(Runtime::context(call.first.get_device_index(), allow_tf32)) {
    for_each_cell([&](int id, auto cell) {
      if (id != call.cell.id) return;
      using Cell = decltype(cell);
      engine_ = &cuda_engine<Cell>();
      for (int gate = 0; gate < Cell::kGates; ++gate) h_pre_.push_back(Cell::h_pre(gate));
      if constexpr (Cell::kLate > 0) middle_ = Cell::kMiddle;
    });
  }

  void forward(const ForwardParams& p) const { run(p, engine_->forward_workspace, engine_->forward); }

  void stack(const StackParams& p) const { run(p, engine_->stack_workspace, engine_->stack); }

  void backward(const BackwardParams& params, const Needs& needs) {
    CudaBackwardParams p{};
    static_cast<BackwardParams&>(p) = params;
    p.hidden_before = hidden_before(needs);
    run(p, engine_->backward_workspace, engine_->backward);
  }

  // engines: from the lowest layer up.
  void stack_backward(const StackBackwardParams& params, const Needs& needs, std::deque<OnCuda>& engines) const {
    CudaStackBackwardParams p{};
    static_cast<StackBackwardParams&>(p) = params;
    for (int64_t k = 0; k < p.layers; ++k) p.hidden_before[k] = engines[size_t(p.layers - 1 - k)].hidden_before(needs);
    run(p, engine_->stack_backward_workspace, engine_->stack_backward);
  }

  std::vector<Tensor> grad_weights(const GradWeightsParams& p, const Needs& needs, const GradSources& from) {
    using namespace torch::stable;
    const int64_t rows = call_.rows, H = call_.H, P = call_.P, G = call_.cell.gates, extra = call_.stored();
    const int64_t own = call_.cell.pre * H, width = call_.cell.grads() * H;  // where those of the units' own numbers lie
    const bool need_own = call_.cell.unit && (call_.cell.multiplies ? needs.grad_weight_hr : needs.grad_weight_hh);
    if (!hidden_before_) hidden_before_ = allocate(call_.first, {0, call_.D, P});  // of no rows, of which no kernel ran
    std::vector<Tensor> grads;
    for (int64_t d = 0; d < call_.D; ++d) {
      for (int i = 0; i < 5; ++i) grads.push_back(allocate(call_.first, {0}));
      Tensor* grad = &grads[size_t(5 * d)];  // of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
      const Tensor pre = columns(from.grad_pre, rows, d * width, width);
      if (needs.grad_weight_ih)  // x_pre is the identity
        grad[0] = product(part(pre, 1, 0, G * H), reshape(*from.input, {rows, p.I}));
      if (needs.grad_weight_hh && call_.cell.multiplies) {
        const Tensor h = columns(*hidden_before_, rows, d * P, P);
        // What the late gate multiplied lies in what is saved.
        const int64_t of_direction = call_.cell.saved * H, middle_at = d * of_direction + middle_ * H;
        grad[1] = of_h_halves(pre, 1, call_.cell.heads == 1, [&](const Tensor& gates, bool late) {
          const Tensor fed = late ? columns(from.saved, rows, middle_at, H) : h;
          return call_.cell.heads > 1 ? product_of_heads(gates, fed) : product(gates, fed);
        });
      }
      MaybeTensor total;
      if (needs.grad_bias || need_own) total = sum_of_rows(pre);
      if (need_own) grad[call_.cell.multiplies ? 4 : 1] = reshape(clone(part(*total, 0, own, width - own)), {call_.cell.unit, H});
      if (needs.grad_bias) {
        grad[2] = clone(part(*total, 0, 0, G * H));
        grad[3] = of_h_halves(*total, 0, true, [](const Tensor& gates, bool) { return clone(gates); });
      }
      if (needs.grad_weight_hr && call_.projected) {
        const Tensor unprojected = columns(from.states, rows, (d * extra + extra - 1) * H, H);
        grad[4] = product(columns(*from.grad_proj, rows, d * P, P), unprojected);
      }
    }
    return grads;
  }

 private:
  const Call& call_;
  typename Runtime::Guard guard_;
  const CudaContext context_;
  const CudaEngine* engine_ = nullptr;
  std::vector<int> h_pre_;
  int64_t middle_ = 0;
  MaybeTensor hidden_before_;  // (rows, D, P)

  // Where backward is to leave the hidden states that the steps began with; null: not wanted.
  void* hidden_before(const Needs& needs) {
    if (!needs.grad_weight_hh || !call_.cell.multiplies) return nullptr;
    hidden_before_ = allocate(call_.first, {call_.rows, call_.D, call_.P});
    return hidden_before_->data_ptr();
  }

  template <class Params>
  void run(const Params& p, int64_t (*workspace_of)(const Params&, const CudaContext&),
           void (*engine)(const Params&, const CudaContext&, void*)) const {
    const Tensor workspace = allocate(call_.first, {workspace_of(p, context_)}, ScalarType::Byte);
    engine(p, context_, workspace.data_ptr());
  }

  static Tensor part(Tensor tensor, int64_t dim, int64_t begin, int64_t count) {
    return torch::stable::narrow(tensor, dim, begin, count);
  }
  // Some columns of a dense tensor seen as a matrix of so many rows.
  static Tensor columns(const Tensor& tensor, int64_t rows, int64_t begin, int64_t count) {
    const int64_t width = rows > 0 ? tensor.numel() / rows : begin + count;
    return part(torch::stable::view(tensor, {rows, width}), 1, begin, count);
  }
  // a^T b.
  static Tensor product(const Tensor& a, const Tensor& b) { return torch::stable::matmul(torch::stable::transpose(a, 0, 1), b); }
  static Tensor sum_of_rows(const Tensor& tensor) {
    const int64_t dim = 0;
    return torch::stable::sum(tensor, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
  }
  // a^T b head by head, of a gate: (rows, H) and (rows, H) to (H, H/N).
  Tensor product_of_heads(const Tensor& a, const Tensor& b) const {
    using namespace torch::stable;
    const int64_t N = call_.cell.heads, rows = call_.rows, units = call_.H / N;
    auto heads = [&](const Tensor& tensor) { return transpose(view(tensor, {rows, N, units}), 0, 1); };
    return reshape(matmul(transpose(heads(a), 1, 2), heads(b)), {call_.H, units});
  }

  // fn of the gates' recurrent halves, and whether they are late, which are a part of the pre-activations in dimension `dim`, gate
  // below gate. Halves that lie side by side, and are both late or not, are taken at once, if they may be: for most cells all are.
  template <class Fn>
  Tensor of_h_halves(const Tensor& pre, int64_t dim, bool at_once, const Fn& fn) const {
    const int64_t H = call_.H, gates = int64_t(h_pre_.size()), late = gates - call_.cell.late;
    MaybeTensor all;
    for (int64_t gate = 0, count = 0; gate < gates; gate += count) {
      auto goes_on = [&](int64_t other) {
        return at_once && other != late && h_pre_[size_t(other)] == h_pre_[size_t(gate)] + (other - gate);
      };
      for (count = 1; gate + count < gates && goes_on(gate + count);) ++count;
      const Tensor found = fn(part(pre, dim, h_pre_[size_t(gate)] * H, count * H), gate >= late);
      if (count == gates) return found;
      if (!all) {
        Sizes sizes = sizes_of(found);
        sizes[0] = gates * H;
        all = allocate(call_.first, sizes);
      }
      Tensor place = part(*all, 0, gate * H, count * H);
      torch::stable::copy_(place, found);
    }
    return *all;
  }
};

}  // namespace fusedrnn
