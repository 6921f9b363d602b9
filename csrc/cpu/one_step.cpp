// The operators for one step of a cell or of a layer, forward and backward, with as little around the engine as can be: what is asked
// for at every step of an environment, or of a stream.
#include "on_cpu.h"

namespace fusedrnn {
namespace {

// input (B, I) or (I), or of a layer (1, B, I) or (B, 1, I); hx, cx, hy and cy (B, H) or (H), or (1, B, H); null for zeros. cy is empty
// for cells with one state. output: another hy, of a layer, or with save, which is for cell_backward, as are saved, (B, kSaved, H) and so
// on, and states, (B, kStates - 1, H); else they are empty.
constexpr char kCellSchema[] =
    "cell_forward(str cell, Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
    "bool save=False) -> (Tensor hy, Tensor cy, Tensor output, Tensor saved, Tensor states)";
// From what cell_forward was given and gave. grad_pre (B, (kPre + kUnit) * H), B = 1 where there is none: gradients of the gates, those
// that weight_ih makes first. What is not needed is empty.
constexpr char kCellBackwardSchema[] =
    "cell_backward(str cell, Tensor input, Tensor? hx, Tensor? cx, Tensor weight_hh, Tensor output, Tensor saved, Tensor states, "
    "Tensor? grad_hy, Tensor? grad_cy, bool need_grad_hx, bool need_grad_cx, bool need_grad_weight_ih, bool need_grad_weight_hh, bool need_grad_bias) -> "
    "(Tensor grad_pre, Tensor grad_hx, Tensor grad_cx, Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias_ih, "
    "Tensor grad_bias_hh)";

struct CellCall : Call {
  CellCall(const char* op, const std::string& cell_name, const Tensor& weight_hh, const char* name, const Tensor& rows)
      : Call(op, cell_name, {weight_hh}, {}) {
    STD_TORCH_CHECK(cell.multiplies && !cell.norms && !cell.late && cell.states <= 2, op,
                    ": cell must multiply its state first of all, not normalise it, and have no more than two, got ", cell_name);
    set_one_step(name, rows);
  }

  void fill(LayerParams& p, const Tensor& weight_hh, const MaybeTensor& hx, const MaybeTensor& cx) {
    const MaybeTensor none;
    Call::fill(p, {weight_hh}, {}, hx, cx, {none, none, none, none, none});
  }

  Sizes unit_sizes(int64_t numbers) const {
    Sizes sizes = state_sizes(numbers);
    sizes.push_back(H);
    return sizes;
  }
  Sizes inner_sizes() const { return cell.states > 1 ? state_sizes(H) : Sizes{0}; }

  // The input's rows, where they lie.
  Rows input_rows(const Tensor& input) {
    check_kind("input", input);
    const int64_t last = input.dim() - 1, features = input.dim() > 0 ? input.size(last) : 0;
    STD_TORCH_CHECK(features > 0, op, ": input must have features, got ", text(sizes_of(input)));
    const bool fits = size_t(last) == lead.size() && input.numel() == B * features;
    STD_TORCH_CHECK(fits, op, ": input must have ", lead.size() + 1, " dimensions and ", B, " rows, got ", text(sizes_of(input)));
    held.push_back(input.stride(last) == 1 || features == 1 ? input : torch::stable::contiguous(input));
    const Tensor& rows = held.back();
    return {rows.data_ptr(), 0, last == 0 ? 0 : rows.stride(last == 1 || rows.size(0) != 1 ? 0 : 1)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> step_forward(
    std::string cell, Tensor input, MaybeTensor hx, MaybeTensor cx, Tensor weight_ih, Tensor weight_hh, MaybeTensor bias_ih,
    MaybeTensor bias_hh, bool save) {
  CellCall call("fusedrnn::cell_forward", cell, weight_hh, "input", input);
  ForwardParams p{};
  call.fill(p, weight_hh, hx, cx);
  const Call::Rows x = call.input_rows(input);
  const int64_t rows = call.cell.gates * call.H;
  p.I = input.size(input.dim() - 1);
  p.gates_x[0] = x.data;
  p.gates_x_row[0] = x.row;
  p.weight_ih[0] = call.data("weight_ih", weight_ih, {rows, p.I});
  p.bias_ih[0] = call.data("bias_ih", bias_ih, {rows});
  p.bias_hh[0] = call.data("bias_hh", bias_hh, {rows});

  const Tensor hy = allocate(call.first, call.state_sizes(call.P)), cy = allocate(call.first, call.inner_sizes());
  const bool apart = save || call.lead.size() == 2;
  const Tensor output = allocate(call.first, apart ? call.state_sizes(call.P) : Sizes{0});
  const Tensor saved = allocate(call.first, save ? call.unit_sizes(call.cell.saved) : Sizes{0});
  const Tensor states = allocate(call.first, save ? call.unit_sizes(call.cell.states - 1) : Sizes{0});
  if (call.has_steps()) {
    p.hy = hy.data_ptr();
    p.output = apart ? output.data_ptr() : p.hy;  // or the same numbers, in the same places
    p.cy = cy.data_ptr();
    p.save = save ? Save::kAll : Save::kNothing;
    p.saved = saved.data_ptr();
    p.states = states.data_ptr();
    OnCpu(call, false).forward(p);
  }
  return {hy, cy, output, saved, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step_backward(
    std::string cell, Tensor input, MaybeTensor hx, MaybeTensor cx, Tensor weight_hh, Tensor output, Tensor saved, Tensor states,
    MaybeTensor grad_hy, MaybeTensor grad_cy, bool need_grad_hx, bool need_grad_cx, bool need_grad_weight_ih, bool need_grad_weight_hh,
    bool need_grad_bias) {
  CellCall call("fusedrnn::cell_backward", cell, weight_hh, "output", output);
  STD_TORCH_CHECK(call.cell.states > 1 || (!grad_cy && !need_grad_cx), call.op,
                  ": grad_cy and need_grad_cx are for cells of more than one state, such as the lstm");
  GradWeightsParams w{};
  call.fill(w, weight_hh, hx, cx);
  if (need_grad_weight_ih) {
    const Call::Rows x = call.input_rows(input);
    w.I = input.size(input.dim() - 1);
    w.input = x.data;
    w.input_row = x.row;
  }
  w.output = call.data("output", output, call.state_sizes(call.P));
  w.states = call.data("states", states, call.unit_sizes(call.cell.states - 1));

  BackwardParams p{};
  static_cast<LayerParams&>(p) = w;
  p.output = w.output;
  p.states = w.states;
  p.saved = call.data("saved", saved, call.unit_sizes(call.cell.saved));
  p.grad_hy = call.data("grad_hy", grad_hy, call.state_sizes(call.P));
  p.grad_cy = call.data("grad_cy", grad_cy, call.inner_sizes());
  const Tensor grad_pre = allocate(call.first, {call.B, call.cell.grads() * call.H});
  const Tensor grad_hx = allocate(call.first, need_grad_hx ? call.state_sizes(call.P) : Sizes{0});
  const Tensor grad_cx = allocate(call.first, need_grad_cx ? call.inner_sizes() : Sizes{0});
  p.grad_pre = grad_pre.data_ptr();
  p.grad_hx = need_grad_hx ? grad_hx.data_ptr() : nullptr;
  p.grad_cx = need_grad_cx ? grad_cx.data_ptr() : nullptr;
  const Needs needs{need_grad_hx, need_grad_cx, need_grad_weight_ih, need_grad_weight_hh, need_grad_bias, false};
  const OnCpu engine(call, false);
  if (call.has_steps()) engine.backward(p, needs);
  w.grad_pre = p.grad_pre;
  const Tensors grads = engine.grad_weights(w, needs);
  return {grad_pre, grad_hx, grad_cx, grads[0], grads[1], grads[2], grads[3]};
}

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY_FRAGMENT(fusedrnn, m) {
  m.def(fusedrnn::kCellSchema);
  m.def(fusedrnn::kCellBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("cell_forward", TORCH_BOX(&fusedrnn::step_forward));
  m.impl("cell_backward", TORCH_BOX(&fusedrnn::step_backward));
}
