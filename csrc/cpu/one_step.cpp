// The operator for the one step of a cell of torch.nn's, with as little around the engine as can be: what is asked for at every step of
// an environment, or of a stream.
#include "engine.h"
#include "workspace.h"

namespace fusedrnn {
namespace {

// input (B, I) or (I); hx and cx (B, H) or (H), null for zeros. cy is empty for cells with one state. Without derivatives.
constexpr char kCellSchema[] =
    "cell_forward(str cell, Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh)"
    " -> (Tensor hy, Tensor cy)";

std::tuple<Tensor, Tensor> one_step(std::string cell, Tensor input, MaybeTensor hx, MaybeTensor cx, Tensor weight_ih, Tensor weight_hh,
                                    MaybeTensor bias_ih, MaybeTensor bias_hh) {
  Call call("fusedrnn::cell_forward", cell, {weight_hh}, {});
  STD_TORCH_CHECK(call.cell.multiplies && !call.cell.norms && !call.cell.late, call.op,
                  ": cell must multiply its state first of all, and not normalise it, got ", cell);
  call.set_one_step("input", input);
  ForwardParams p{};
  const MaybeTensor none;
  call.fill(p, {weight_hh}, {}, hx, cx, {none, none, none, none, none});
  call.check_kind("input", input);
  const int64_t rows = call.cell.gates * call.H, last = input.dim() - 1;
  p.I = input.size(last);
  STD_TORCH_CHECK(p.I > 0, call.op, ": input must have features, got ", text(sizes_of(input)));
  const Tensor dense = input.stride(last) == 1 || p.I == 1 ? input : torch::stable::contiguous(input);
  p.gates_x[0] = dense.data_ptr();
  p.gates_x_row[0] = call.batched ? dense.stride(0) : 0;
  p.weight_ih[0] = call.data("weight_ih", weight_ih, {rows, p.I});
  p.bias_ih[0] = call.data("bias_ih", bias_ih, {rows});
  p.bias_hh[0] = call.data("bias_hh", bias_hh, {rows});

  const Tensor hy = allocate(call.first, call.state_sizes(call.P));
  const Tensor cy = allocate(call.first, call.cell.states > 1 ? call.inner_sizes() : Sizes{0});
  if (call.has_steps()) {
    p.output = p.hy = hy.data_ptr();  // the same numbers, in the same places
    p.cy = cy.data_ptr();
    const CpuEngine& engine = cpu_engine(selected_isa());
    run_in_workspace(call.first, p, engine.forward_workspace, engine.forward);
  }
  return {hy, cy};
}

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY_FRAGMENT(fusedrnn, m) { m.def(fusedrnn::kCellSchema); }

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { m.impl("cell_forward", TORCH_BOX(&fusedrnn::one_step)); }
