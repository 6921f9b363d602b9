// One call of an engine and of the reference on the same numbers: the tensors of a case, each once in the case's format
// between guard pages and once in double, and the comparison of what came out.
#pragma once
#include <algorithm>
#include <array>
#include <initializer_list>
#include <utility>

#include "cpu/engine.h"
#include "engine_case.h"
#include "guarded.h"
#include "reference.h"

namespace test {

// For results: every number in memory is NaN until the engine writes it.
struct Tensor {
  Guarded memory;             // in the case's format; the engine's
  std::vector<double> exact;  // the reference's
  std::vector<double> multiplied;  // what an engine that rounds operands takes it for in a product
  std::vector<unsigned char> before;  // the memory of an input, which nobody may change
  explicit Tensor(Dtype dtype = Dtype::kFloat32, int64_t count = 0)
      : memory(count * bytes_of(dtype)), exact(size_t(count), NAN) {}
};

// What an engine makes of a number of memory before it multiplies it.
using Operand = double (*)(double);

struct Problem {
  const Case c;
  const Operand operand;  // null: what is multiplied is not rounded, not even to the format of memory
  const Traits traits;
  const bool projected;
  const int64_t P, G, extra;
  const bool on_device;  // lengths are given as such
  std::vector<int64_t> batch_sizes, offsets, order, lengths;
  std::vector<uint8_t> reset;
  int64_t rows = 0;
  std::array<Tensor, 2> weight_hh, weight_hr, unit, bias_hh, gates_x, weight_ih, bias_ih;
  std::array<int64_t, 2> gates_x_step{}, gates_x_row{};
  Tensor input;
  int64_t input_step = 0, input_row = 0;
  std::array<Tensor, 2> grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh, grad_weight_hr, grad_unit;
  Tensor hx, cx, output, hy, cy, saved, states, grad_output, grad_hy, grad_cy, grad_pre, grad_hx, grad_cx, grad_proj;
  Tensor zoneout, hidden_mask, grad_states, reset_hx, reset_cx, grad_reset_hx, grad_reset_cx;

  explicit Problem(const Case& c, Operand operand = nullptr, bool on_device = false)
      : c(c), operand(operand), traits(traits_of(c.cell)), projected(c.P > 0), P(projected ? c.P : c.H), G(traits.gates),
        extra(traits.states - 1 + projected + (c.zoneout ? traits.states : 0)), on_device(on_device), random_{c.seed + 1000000} {
    const int64_t B = c.B, H = c.H, D = c.D;
    const int64_t inner = traits.states - 1;
    make_steps();
    for (int64_t d = 0; d < D; ++d) {
      if (traits.multiplies) weight_hh[d] = random_tensor(G * H * P, 1.5 / std::sqrt(double(P)));
      if (traits.unit && c.unit) unit[d] = random_tensor(traits.unit * H, 1);
      if (projected) weight_hr[d] = random_tensor(P * H, 1.5 / std::sqrt(double(H)));
      if (c.bias) bias_hh[d] = random_tensor(G * H, 1);
      gates_x[d] = random_rows(c.feeds ? c.I : G * H, c.layout + d, gates_x_step[d], gates_x_row[d]);
      if (c.feeds) weight_ih[d] = random_tensor(G * H * c.I, 1.5 / std::sqrt(double(c.I)));
      if (c.feeds && c.bias) bias_ih[d] = random_tensor(G * H, 1);
    }
    if (c.hx) hx = random_tensor(D * B * P, 1);
    if (c.cx && inner) cx = random_tensor(inner * D * B * H, 1);
    if (c.cx && traits.normaliser) move_up(cx, (traits.normaliser - 1) * D * B * H, D * B * H);
    if (c.reset_hx) reset_hx = random_tensor(D * B * P, 1);
    if (c.reset_cx && inner) reset_cx = random_tensor(inner * D * B * H, 1);
    if (c.reset_cx && traits.normaliser) move_up(reset_cx, (traits.normaliser - 1) * D * B * H, D * B * H);
    for (int64_t i = 0; c.reset && i < rows; ++i) reset.push_back(random_.below(3) == 0);
    // Of which products are exact, and all or nothing stays, or a part.
    if (c.zoneout) zoneout = chosen_tensor((c.alike ? 1 : rows) * D * traits.states * H, {0, 0, 1, 0.25});
    if (c.hidden_mask) hidden_mask = chosen_tensor(D * B * H, {0, 1, 2});
    output = result(rows * D * P);
    hy = result(D * B * P);
    if (inner) cy = result(inner * D * B * H);
    if (!c.save) return;
    saved = result(rows * D * traits.saved * H);
    states = result(rows * D * extra * H);
    if (c.grad_output) grad_output = random_tensor(rows * D * P, 1);
    if (c.grad_hy) grad_hy = random_tensor(D * B * P, 1);
    if (c.grad_cy && inner) grad_cy = random_tensor(inner * D * B * H, 1);
    if (c.grad_states && inner) grad_states = random_tensor(rows * D * extra * H, 1);
    grad_pre = result(rows * D * (traits.pre + traits.unit) * H);
    if (c.need_grad_hx) grad_hx = result(D * B * P);
    if (c.need_grad_cx && inner) grad_cx = result(inner * D * B * H);
    if (c.reset_hx && c.need_grad_hx) grad_reset_hx = result(D * B * P);
    if (c.reset_cx && c.need_grad_cx && inner) grad_reset_cx = result(inner * D * B * H);
    if (projected) grad_proj = result(rows * D * P);
    input = random_rows(c.I, c.layout + 2, input_step, input_row);
    for (int64_t d = 0; d < D; ++d) {
      if (c.need_grad_weight_ih) grad_weight_ih[d] = result(G * H * c.I);
      if (c.need_grad_weight_hh && traits.multiplies) grad_weight_hh[d] = result(G * H * P);
      if (c.need_grad_weight_hr && traits.unit) grad_unit[d] = result(traits.unit * H);
      if (c.need_grad_bias) grad_bias_ih[d] = result(G * H), grad_bias_hh[d] = result(G * H);
      if (c.need_grad_weight_hr && projected) grad_weight_hr[d] = result(P * H);
    }
  }

  // The parameters, with pointer(tensor) for every tensor.
  template <class Pointer>
  ForwardParams forward_params(const Pointer& pointer) const {
    ForwardParams p{};
    fill(p, pointer);
    for (int64_t d = 0; d < c.D; ++d) {
      p.gates_x[d] = pointer(gates_x[d]);
      p.gates_x_step[d] = gates_x_step[d];
      p.gates_x_row[d] = gates_x_row[d];
      p.bias_hh[d] = pointer(bias_hh[d]);
      p.weight_ih[d] = pointer(weight_ih[d]), p.bias_ih[d] = pointer(bias_ih[d]), p.I = c.I;
    }
    p.output = pointer(output), p.hy = pointer(hy), p.cy = pointer(cy);
    p.save = c.save ? fusedrnn::Save::kAll : fusedrnn::Save::kNothing, p.saved = pointer(saved), p.states = pointer(states);
    return p;
  }
  template <class Pointer>
  BackwardParams backward_params(const Pointer& pointer) const {
    BackwardParams p{};
    fill(p, pointer);
    p.output = pointer(output), p.saved = pointer(saved), p.states = pointer(states);
    p.grad_output = pointer(grad_output), p.grad_hy = pointer(grad_hy), p.grad_cy = pointer(grad_cy);
    p.grad_states = pointer(grad_states);
    p.grad_pre = pointer(grad_pre), p.grad_hx = pointer(grad_hx), p.grad_cx = pointer(grad_cx);
    p.grad_reset_hx = pointer(grad_reset_hx), p.grad_reset_cx = pointer(grad_reset_cx);
    p.grad_proj = pointer(grad_proj);
    return p;
  }
  template <class Pointer>
  GradWeightsParams grad_weights_params(const Pointer& pointer) const {
    GradWeightsParams p{};
    fill(p, pointer);
    p.input = pointer(input), p.I = c.I, p.input_step = input_step, p.input_row = input_row;
    p.output = pointer(output), p.states = pointer(states), p.grad_pre = pointer(grad_pre), p.grad_proj = pointer(grad_proj);
    if (traits.late) p.saved = pointer(saved);
    for (int64_t d = 0; d < c.D; ++d) {
      p.grad_weight_ih[d] = pointer(grad_weight_ih[d]), p.grad_weight_hh[d] = pointer(grad_weight_hh[d]);
      p.grad_bias_ih[d] = pointer(grad_bias_ih[d]), p.grad_bias_hh[d] = pointer(grad_bias_hh[d]);
      p.grad_weight_hr[d] = pointer(grad_weight_hr[d]), p.grad_unit[d] = pointer(grad_unit[d]);
    }
    return p;
  }
  static void* engines(const Tensor& tensor) { return tensor.memory.data(); }
  static void* references(const Tensor& tensor) { return pointer_to(tensor.exact); }

  // Runs both, compares forward, hands the engine's own results to both backwards, and compares these. Returns the largest
  // error in units of the tolerance. `spoiled` names a result whose last number is made wrong by 1 % on the way.
  double run(const fusedrnn::CpuEngine& engine, const std::string& spoiled = "") {
    double worst = run_forward(engine.forward_workspace, engine.forward, spoiled);
    if (c.save) {
      worst = std::max(worst, run_backward(engine.backward_workspace, engine.backward, spoiled));
      worst = std::max(worst, run_grad_weights(engine, spoiled));
    }
    check_inputs();
    return worst;
  }

 protected:
  // A pass of the engine, given by the bytes of workspace that it wants and by what runs it, and of the reference.
  template <class Bytes, class Run>
  double run_forward(const Bytes& workspace_bytes, const Run& run, const std::string& spoiled) {
    const ForwardParams p = forward_params(engines);
    run_guarded(workspace_bytes(p), [&](void* workspace) { run(p, workspace); });
    note_operands({&weight_hh[0], &weight_hh[1], &weight_hr[0], &weight_hr[1], &hx, &reset_hx, &output, &states, &saved});
    fusedrnn::for_each_cell([&](int id, auto cell) {
      if (id == c.cell) reference_forward<decltype(cell)>(forward_params(references), forward_params(operands()));
    });
    return judge({{"output", &output}, {"hy", &hy}, {"cy", &cy}, {"saved", &saved}, {"states", &states}}, spoiled);
  }

  template <class Bytes, class Run>
  double run_backward(const Bytes& workspace_bytes, const Run& run, const std::string& spoiled) {
    for (Tensor* tensor : {&output, &saved, &states}) freeze(*tensor);
    const BackwardParams p = backward_params(engines);
    run_guarded(workspace_bytes(p), [&](void* workspace) { run(p, workspace); });
    note_operands({&grad_pre, &grad_proj});
    fusedrnn::for_each_cell([&](int id, auto cell) {
      if (id == c.cell) reference_backward<decltype(cell)>(backward_params(references), backward_params(operands()));
    });
    return judge({{"grad_pre", &grad_pre}, {"grad_hx", &grad_hx}, {"grad_cx", &grad_cx}, {"grad_proj", &grad_proj},
                  {"grad_reset_hx", &grad_reset_hx}, {"grad_reset_cx", &grad_reset_cx}}, spoiled);
  }

  double run_grad_weights(const fusedrnn::CpuEngine& engine, const std::string& spoiled) {
    clear_behind(grad_pre);
    for (Tensor* tensor : {&grad_pre, &grad_proj}) freeze(*tensor);
    const GradWeightsParams p = grad_weights_params(engines);
    run_guarded(engine.grad_weights_workspace(p), [&](void* workspace) { engine.grad_weights(p, workspace); });
    fusedrnn::for_each_cell([&](int id, auto cell) {
      if (id == c.cell) reference_grad_weights<decltype(cell)>(grad_weights_params(references));
    });
    double worst = 0;
    for (size_t d = 0; d < 2; ++d)
      worst = std::max(worst, judge({{"grad_weight_ih", &grad_weight_ih[d]}, {"grad_weight_hh", &grad_weight_hh[d]},
                                     {"grad_bias_ih", &grad_bias_ih[d]}, {"grad_bias_hh", &grad_bias_hh[d]},
                                     {"grad_weight_hr", &grad_weight_hr[d]}, {"grad_unit", &grad_unit[d]}}, spoiled));
    return worst;
  }

  // Compares results; returns the largest error.
  double judge(std::initializer_list<std::pair<const char*, Tensor*>> results, const std::string& spoiled) const {
    double worst = 0;
    for (auto [name, tensor] : results) {
      if (spoiled == name) spoil(*tensor);
      worst = std::max(worst, compare(name, *tensor));
    }
    return worst;
  }

  void check_inputs() const {
    for (const auto* pair : {&weight_hh, &weight_hr, &unit, &bias_hh, &gates_x, &weight_ih, &bias_ih})
      for (const Tensor& tensor : *pair) CHECK(unchanged(tensor), "wrote to a weight, a bias or gates_x");
    for (const Tensor* tensor : {&input, &hx, &cx, &reset_hx, &reset_cx, &zoneout, &hidden_mask, &grad_output, &grad_hy, &grad_cy, &grad_states, &grad_pre,
                                 &grad_proj})
      CHECK(unchanged(*tensor), "wrote to the input, hx, cx or an incoming gradient");
    for (const Tensor* tensor : {&output, &saved, &states}) CHECK(unchanged(*tensor), "backward wrote to what forward saved");
  }

  Tensor result(int64_t count) const { return Tensor(c.dtype, count); }

  Random random_;

  static void* pointer_to(const std::vector<double>& numbers) {
    return numbers.empty() ? nullptr : const_cast<double*>(numbers.data());
  }
  // What is in memory, as the engine multiplies it.
  void note_operands(std::initializer_list<Tensor*> tensors) const {
    if (!operand) return;
    for (Tensor* tensor : tensors) {
      tensor->multiplied.resize(tensor->exact.size());
      for (size_t i = 0; i < tensor->exact.size(); ++i)
        tensor->multiplied[i] = operand(decode(c.dtype, tensor->memory.data(), int64_t(i)));
    }
  }
  auto operands() const {
    return [exact = !operand](const Tensor& tensor) { return pointer_to(exact ? tensor.exact : tensor.multiplied); };
  }
  // What is in memory is from here on an input, the same for the reference.
  void freeze(Tensor& tensor) const {
    for (size_t i = 0; i < tensor.exact.size(); ++i) tensor.exact[i] = decode(c.dtype, tensor.memory.data(), int64_t(i));
    const auto* bytes = static_cast<const unsigned char*>(tensor.memory.data());
    tensor.before.assign(bytes, bytes + tensor.memory.bytes());
  }
  // Zeros where a sequence has ended, as the operator has them: the gradients of biases are sums of all rows.
  void clear_behind(Tensor& sequence) const {
    if (!c.uneven || on_device) return;
    const int64_t width = int64_t(sequence.exact.size()) / rows;
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t b = batch_sizes[size_t(t)]; b < c.B; ++b)
        for (int64_t i = 0; i < width; ++i)
          encode(c.dtype, sequence.memory.data(), (t * c.B + order[size_t(b)]) * width + i, 0);
  }
  Tensor random_tensor(int64_t count, double limit) {
    Tensor tensor(c.dtype, count);
    for (int64_t i = 0; i < count; ++i) encode(c.dtype, tensor.memory.data(), i, random_.uniform(-limit, limit));
    freeze(tensor);
    return tensor;
  }

  Tensor chosen_tensor(int64_t count, std::initializer_list<double> values) {
    Tensor tensor(c.dtype, count);
    for (int64_t i = 0; i < count; ++i)
      encode(c.dtype, tensor.memory.data(), i, values.begin()[random_.below(int64_t(values.size()))]);
    freeze(tensor);
    return tensor;
  }

  // Numbers from -1 to 1 become such from a half to 1.5.
  void move_up(Tensor& tensor, int64_t begin, int64_t count) const {
    for (int64_t i = begin; i < begin + count; ++i)
      encode(c.dtype, tensor.memory.data(), i, 1 + decode(c.dtype, tensor.memory.data(), i) / 2);
    freeze(tensor);
  }

  void spoil(Tensor& tensor) const {
    if (tensor.exact.empty()) return;
    const int64_t last = int64_t(tensor.exact.size()) - 1;
    encode(c.dtype, tensor.memory.data(), last, decode(c.dtype, tensor.memory.data(), last) * 1.01 + 1e-3);
  }

  void make_steps() {
    for (int64_t t = 0, size = c.B; t < c.T; ++t) {
      if ((c.packed || (c.uneven && !on_device)) && t > 0 && random_.below(3)) size = 1 + random_.below(size);
      batch_sizes.push_back(size);
      offsets.push_back(rows);
      rows += c.packed ? size : c.B;
    }
    for (int64_t b = 0; c.uneven && b < c.B; ++b)
      on_device ? lengths.push_back(random_.below(c.T + 2)) : void(order.insert(order.begin() + random_.below(b + 1), b));
  }

  // A sequence of rows in one of three layouts; what lies between its rows is NaN.
  Tensor random_rows(int64_t width, int64_t layout, int64_t& step_stride, int64_t& row_stride) {
    layout %= 3;
    row_stride = layout == 2 ? width + 3 : width;
    step_stride = c.B * row_stride + (layout == 2 ? 5 : 0);
    if (layout == 1 && !c.packed) {
      step_stride = width;
      row_stride = c.T * width;
    }
    auto position = [&](int64_t t, int64_t b) {
      return c.packed ? (offsets[size_t(t)] + b) * row_stride : t * step_stride + b * row_stride;
    };
    const int64_t last_row = (c.packed ? batch_sizes.back() : c.B) - 1;
    Tensor tensor(c.dtype, position(c.T - 1, last_row) + width);
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t b = 0; b < batch_sizes[size_t(t)]; ++b)
        for (int64_t i = 0; i < width && (lengths.empty() || t < lengths[size_t(b)]); ++i) {
          double x = random_.uniform(-2, 2);
          if (c.extreme && random_.below(3) == 0) x = std::copysign(c.dtype == Dtype::kFloat16 ? 6e4 : 1e30, x);
          encode(c.dtype, tensor.memory.data(), position(t, order.empty() ? b : order[size_t(b)]) + i, x);
        }
    freeze(tensor);
    return tensor;
  }

  template <class Pointer>
  void fill(LayerParams& p, const Pointer& pointer) const {
    p.cell = c.cell, p.dtype = c.dtype;
    auto data = [](const auto& vector) { return vector.empty() ? nullptr : vector.data(); };
    p.steps = {c.T, c.B, c.packed || !order.empty() ? batch_sizes.data() : nullptr, c.packed ? offsets.data() : nullptr,
               data(order), data(lengths), data(reset)};
    p.H = c.H, p.P = P, p.D = c.D, p.threads = c.threads;
    for (int64_t d = 0; d < c.D; ++d) p.weight_hh[d] = pointer(weight_hh[d]), p.weight_hr[d] = pointer(weight_hr[d]);
    p.choice = c.choice;
    for (int64_t d = 0; d < c.D; ++d) p.unit[d] = pointer(unit[d]);
    p.hx = pointer(hx), p.cx = pointer(cx);
    p.reset_hx = pointer(reset_hx), p.reset_cx = pointer(reset_cx);
    p.stored = extra;
    p.zoneout = pointer(zoneout), p.zoneout_row = c.alike ? 0 : c.D * traits.states * c.H;
    p.hidden_mask = pointer(hidden_mask);
  }

  template <class Run>
  static void run_guarded(int64_t bytes, const Run& run) {
    const Guarded workspace(bytes);
    CHECK(bytes > 0 && bytes % 64 == 0, "a workspace of %d bytes", int(bytes));
    run(workspace.data());
    CHECK(workspace.intact(), "wrote before the workspace");
  }

  // Every number within half a unit of its format (the last rounding) and a few dozen units of the arithmetic, on the
  // scale of the tensor. Returns the largest error as a part of that.
  double compare(const char* name, const Tensor& tensor) const {
    CHECK(tensor.memory.intact(), "wrote before %s", name);
    const bool half = bytes_of(c.dtype) == 2;
    const double unit = std::ldexp(1.0, c.dtype == Dtype::kFloat64 ? -52 : -23);
    double scale = 1, worst = 0;
    for (double want : tensor.exact)
      if (std::isfinite(want)) scale = std::max(scale, std::fabs(want));
    size_t wrong = 0, first = 0;
    for (size_t i = 0; i < tensor.exact.size(); ++i) {
      const double got = decode(c.dtype, tensor.memory.data(), int64_t(i)), want = tensor.exact[i];
      if (got == round_to(c.dtype, want)) continue;    // infinities of a narrow format, too
      if (std::isnan(got) && std::isnan(want)) continue;  // the products of such infinities with 0
      const double rounding = half ? spacing(precision(c.dtype), want) / 2 : 0;
      const double error = (std::fabs(got - want) - rounding) / (kUnits * unit * scale);
      if (!(error <= 1) && wrong++ == 0) first = i;
      worst = std::max(worst, error);
    }
    if (wrong == 0) checks += long(tensor.exact.size());
    else
      CHECK(false, "%s[%zu] is %.17g, should be %.17g; %zu of %zu are wrong", name, first,
            decode(c.dtype, tensor.memory.data(), int64_t(first)), tensor.exact[first], wrong, tensor.exact.size());
    return worst;
  }
  static constexpr double kUnits = 32;

  static bool unchanged(const Tensor& tensor) {
    return tensor.memory.intact() &&
           (tensor.before.empty() || std::memcmp(tensor.memory.data(), tensor.before.data(), tensor.before.size()) == 0);
  }
};

}  // namespace test
