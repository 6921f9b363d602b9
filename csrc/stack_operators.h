// The bodies of the operators of several layers in one call, each on the output of the one below, beside those of one (operators.h).
//
// An Engine for them has besides
//   stack(StackParams)
//   stack_backward(StackBackwardParams, needs, engines): engines has one for each layer, from the lowest up
#pragma once
#include <deque>

#include "operators.h"

namespace fusedrnn {

// Several layers of one of torch's cells, each on the output of the one below, in one direction: what recurrence_forward gives for each,
// in lists. gates_x are the first layer's; weight_ih (G*H, H) and bias_ih are of the others alone. hx and cx: (L, B, H).
constexpr char kStackSchema[] =
    "stack_forward(str cell, Tensor gates_x, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[]? bias_ih, Tensor[]? bias_hh, Tensor? hx, "
    "Tensor? cx, Tensor? batch_sizes, int save, bool allow_tf32) -> "
    "(Tensor[] output, Tensor[] hy, Tensor[] cy, Tensor[] saved, Tensor[] states)";
// Its gradients, as recurrence_backward's for each layer, but for grad_pre, which is the first layer's alone. input: of the first layer.
// grad_output: of the last layer's. grad_hy, grad_cy, grad_hx and grad_cx: (L, B, H).
constexpr char kStackBackwardSchema[] =
    "stack_backward(str cell, Tensor? input, Tensor[] weight_ih, Tensor[] weight_hh, Tensor? hx, Tensor? cx, Tensor[] output, "
    "Tensor[] saved, Tensor[] states, Tensor? batch_sizes, Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, bool need_grad_hx, "
    "bool need_grad_cx, bool need_grad_weight_ih, bool need_grad_weight_hh, bool need_grad_bias, bool allow_tf32) -> "
    "(Tensor grad_pre, Tensor grad_hx, Tensor grad_cx, Tensor[] grad_weights)";

// The calls of a stack, one for each layer. What is said of its lists is checked.
struct StackCall {
  const char* op;
  const int64_t layers;
  std::deque<Call> calls;

  StackCall(const char* op, const std::string& cell, const Tensors& weight_ih, const Tensors& weight_hh, const Tensor& sequence,
            const char* name, const MaybeTensor& hx, const MaybeTensor& batch_sizes)
      : op(op), layers(int64_t(weight_hh.size())) {
    STD_TORCH_CHECK(layers >= 2 && layers <= kMostStacked, op, ": weight_hh must hold from 2 to ", kMostStacked,
                    " tensors, one a layer, got ", layers);
    check_count("weight_ih", weight_ih, layers - 1);
    STD_TORCH_CHECK(!batch_sizes || sequence.dim() == 2, op, ": batch_sizes are for packed sequences, with ", name,
                    " of (rows, features), got ", text(sizes_of(sequence)));
    for (const Tensor& weight : weight_hh) {
      Call& call = calls.emplace_back(op, cell, Tensors{weight}, Tensors{});
      bool stacks = false;
      for_each_cell([&](int id, auto type) { stacks = stacks || (id == call.cell.id && is_of_torch<decltype(type)>); });
      STD_TORCH_CHECK(stacks && call.cell.heads == 1, op, ": cell must be one of torch's, without heads, got '", cell, "'");
      calls[0].check_kind("weight_hh", weight);
      calls[0].check_sizes("weight_hh", weight, calls[0].weight_hh_sizes());
      call.set_steps(name, sequence, batch_sizes, hx, true);
    }
  }
  void check_count(const char* name, const Tensors& tensors, int64_t count) const {
    STD_TORCH_CHECK(int64_t(tensors.size()) == count, op, ": ", name, " must hold ", count, " tensors, got ", tensors.size());
  }
  // A layer's part of (L, B, H).
  MaybeTensor part(const char* name, const MaybeTensor& states, int64_t k) const {
    if (!states) return {};
    calls[0].check_sizes(name, *states, {layers, calls[0].B, calls[0].H});
    Tensor all = *states;
    return torch::stable::narrow(all, 0, k, 1);
  }
  void fill(LayerParams& p, int64_t k, const Tensors& weight_hh, const MaybeTensor& hx, const MaybeTensor& cx) {
    const MaybeTensor none;
    calls[size_t(k)].fill(p, {weight_hh[size_t(k)]}, {}, part("hx", hx, k), part("cx", cx, k), {none, none, none, none, none});
  }
  int64_t rows() const { return calls[0].cell.gates * calls[0].H; }  // of a weight
};

template <class Engine>
std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors> stack_forward(
    std::string cell, Tensor gates_x, Tensors weight_ih, Tensors weight_hh, MaybeTensors bias_ih, MaybeTensors bias_hh, MaybeTensor hx,
    MaybeTensor cx, MaybeTensor batch_sizes, int64_t save, bool allow_tf32) {
  StackCall stack("fusedrnn::stack_forward", cell, weight_ih, weight_hh, gates_x, "gates_x", hx, batch_sizes);
  const int64_t layers = stack.layers, rows = stack.rows();
  if (bias_ih) stack.check_count("bias_ih", *bias_ih, layers - 1);
  if (bias_hh) stack.check_count("bias_hh", *bias_hh, layers);
  STD_TORCH_CHECK(save >= 0 && save <= 2, stack.op, ": save must be 0, 1 or 2, got ", save);

  StackParams p{};
  p.layers = layers;
  MaybeTensor no_bias;
  std::tuple<Tensors, Tensors, Tensors, Tensors, Tensors> results;
  auto& [outputs, hys, cys, saveds, all_states] = results;
  for (int64_t k = 0; k < layers; ++k) {
    Call& call = stack.calls[size_t(k)];
    const int64_t H = call.H, B = call.B;
    ForwardParams& of = p.of[k];
    stack.fill(of, k, weight_hh, hx, cx);
    of.bias_hh[0] = bias_hh ? call.data("bias_hh", (*bias_hh)[size_t(k)], {rows}) : nullptr;
    if (k == 0) {
      const Call::Rows gates = call.rows_of("gates_x", gates_x, rows);
      of.gates_x[0] = gates.data;
      of.gates_x_step[0] = gates.step;
      of.gates_x_row[0] = gates.row;
      if (!bias_ih) no_bias = torch::stable::new_zeros(call.first, {rows});
    } else {
      p.weight_ih[k] = call.data("weight_ih", weight_ih[size_t(k - 1)], {rows, H});
      of.gates_x[0] = bias_ih ? call.data("bias_ih", (*bias_ih)[size_t(k - 1)], {rows}) : no_bias->data_ptr();
    }
    auto result = [&](Tensors& list, bool wanted, const Sizes& sizes) {
      list.push_back(allocate(call.first, wanted ? sizes : Sizes{0}));
      return list.back().data_ptr();
    };
    const int64_t inner = call.cell.states - 1;
    of.output = result(outputs, true, call.sequence_sizes({H}));
    of.hy = result(hys, true, {1, B, H});
    of.cy = result(cys, inner > 0, {1, B, H});
    of.saved = result(saveds, save == 2, call.sequence_sizes({1, call.cell.saved, H}));
    of.states = result(all_states, save > 0, call.sequence_sizes({1, inner, H}));
    of.save = Save(save);
  }
  static_cast<LayerParams&>(p) = p.of[0];
  if (stack.calls[0].has_steps()) Engine(stack.calls[0], allow_tf32).stack(p);
  return results;
}

template <class Engine>
std::tuple<Tensor, Tensor, Tensor, Tensors> stack_backward(
    std::string cell, MaybeTensor input, Tensors weight_ih, Tensors weight_hh, MaybeTensor hx, MaybeTensor cx, Tensors output,
    Tensors saved, Tensors states, MaybeTensor batch_sizes, MaybeTensor grad_output, MaybeTensor grad_hy, MaybeTensor grad_cy,
    bool need_grad_hx, bool need_grad_cx, bool need_grad_weight_ih, bool need_grad_weight_hh, bool need_grad_bias, bool allow_tf32) {
  STD_TORCH_CHECK(!output.empty(), "fusedrnn::stack_backward: output must hold a tensor for each layer, got 0");
  StackCall stack("fusedrnn::stack_backward", cell, weight_ih, weight_hh, output[0], "output", hx, batch_sizes);
  const int64_t layers = stack.layers, H = stack.calls[0].H, B = stack.calls[0].B, inner = stack.calls[0].cell.states - 1;
  stack.check_count("output", output, layers);
  stack.check_count("saved", saved, layers);
  stack.check_count("states", states, layers);
  STD_TORCH_CHECK(inner || (!grad_cy && !need_grad_cx), stack.op, ": grad_cy and need_grad_cx are for cells of more than one state");
  STD_TORCH_CHECK(input || !need_grad_weight_ih, stack.op, ": need_grad_weight_ih needs the input");

  const Tensor& like = stack.calls[0].first;
  Tensor grad_hx = allocate(like, need_grad_hx ? Sizes{layers, B, H} : Sizes{0});
  Tensor grad_cx = allocate(like, need_grad_cx ? Sizes{layers, B, H} : Sizes{0});
  const Needs needs{need_grad_hx, need_grad_cx, need_grad_weight_ih, need_grad_weight_hh, need_grad_bias, false};
  struct Engines : std::deque<Engine> {  // each holds its device while it is there, and gives back the one before: the last goes first
    ~Engines() {
      while (!this->empty()) this->pop_back();
    }
  } engines;
  Tensors grad_pre;
  std::deque<GradWeightsParams> of_weights;
  StackBackwardParams p{};
  p.layers = layers;
  for (int64_t k = 0; k < layers; ++k) {
    Call& call = stack.calls[size_t(k)];
    engines.emplace_back(call, allow_tf32);
    GradWeightsParams& w = of_weights.emplace_back();
    stack.fill(w, k, weight_hh, hx, cx);
    if (need_grad_weight_ih) {
      const Tensor& fed = k ? output[size_t(k - 1)] : *input;
      w.I = fed.size(fed.dim() - 1);
      const Call::Rows rows = call.rows_of("input", fed, w.I);
      w.input = rows.data, w.input_step = rows.step, w.input_row = rows.row;
    }
    BackwardParams& of = p.of[layers - 1 - k];
    static_cast<LayerParams&>(of) = w;
    of.output = w.output = call.data("output", output[size_t(k)], call.sequence_sizes({H}));
    of.states = w.states = call.data("states", states[size_t(k)], call.sequence_sizes({1, inner, H}));
    of.saved = w.saved = call.data("saved", saved[size_t(k)], call.sequence_sizes({1, call.cell.saved, H}));
    if (k == layers - 1) of.grad_output = call.data("grad_output", grad_output, call.sequence_sizes({H}));
    of.grad_hy = call.data("grad_hy", stack.part("grad_hy", grad_hy, k), {1, B, H});
    of.grad_cy = call.data("grad_cy", stack.part("grad_cy", grad_cy, k), {1, B, H});
    grad_pre.push_back(allocate(like, call.sequence_sizes({1, call.cell.grads(), H})));
    w.grad_pre = of.grad_pre = grad_pre.back().data_ptr();
    auto part_of = [&](bool wanted, const Tensor& tensor) -> void* {
      return wanted ? static_cast<char*>(tensor.data_ptr()) + size_t(k * B * H * tensor.element_size()) : nullptr;
    };
    of.grad_hx = part_of(need_grad_hx, grad_hx);
    of.grad_cx = part_of(need_grad_cx, grad_cx);
    if (k > 0) p.weight_ih[layers - k] = call.data("weight_ih", weight_ih[size_t(k - 1)], {stack.rows(), H});
  }
  static_cast<LayerParams&>(p) = p.of[0];
  if (stack.calls[0].has_steps()) engines[0].stack_backward(p, needs, engines);
  Tensors grad_weights;
  for (int64_t k = 0; k < layers; ++k) {
    const size_t at = size_t(k);
    const MaybeTensor fed = k ? MaybeTensor(output[at - 1]) : input, none;
    for (const Tensor& grad : engines[at].grad_weights(of_weights[at], needs, {fed, none, saved[at], states[at], grad_pre[at]}))
      grad_weights.push_back(grad);
  }
  return {grad_pre[0], grad_hx, grad_cx, grad_weights};
}

}  // namespace fusedrnn
