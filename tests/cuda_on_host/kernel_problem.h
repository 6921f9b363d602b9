// One call of the CUDA kernels and of the reference on the same numbers, and the calls that engine_test makes.
#pragma once
#include <string>
#include <vector>

#include "engine_problem.h"
#include "cuda/walk.h"
#include "kernel_probe.h"

namespace test {

// The kinds of arithmetic that csrc/cuda/arithmetic.cuh has, and what each makes of a number before it multiplies it.
struct Arithmetic {
  const char* name;
  Dtype dtype;
  bool tf32;
  Operand operand;
};

// To 10 bits behind the leading one, ties away from zero.
inline double to_tf32(double x) {
  if (!std::isfinite(x)) return x;
  const double step = spacing(Precision{10, -126, 127}, x), rounded = std::round(x / step) * step;
  return std::fabs(rounded) >= 0x1p128 ? std::copysign(INFINITY, x) : rounded;
}
inline double as_it_is(double x) { return x; }

constexpr Arithmetic kArithmetics[] = {
    {"f32", Dtype::kFloat32, false, nullptr},      {"tf32", Dtype::kFloat32, true, to_tf32},
    {"f64", Dtype::kFloat64, false, nullptr},      {"bf16", Dtype::kBFloat16, false, as_it_is},
    {"f16", Dtype::kFloat16, false, as_it_is},
};

// From one on which every layer is large to one on which few are, and whose threads the emulator can all have at once; with
// and without clusters and grids that overlap; and three whose blocks have so little shared memory that it limits their warps,
// or what these leave there.
constexpr fusedrnn::Chip kChips[] = {
    {1, 227 << 10, 9}, {4, 99 << 10, 9}, {16, 163 << 10, 9}, {31, 227 << 10, 8}, {1, 24 << 10, 9}, {16, 12 << 10, 9}, {8, 20 << 10, 9},
};

inline fusedrnn::CellKind kind_of(int cell) {
  fusedrnn::CellKind kind{};
  fusedrnn::for_each_cell([&](int id, auto type) {
    if (id == cell) kind = fusedrnn::kKindOf<decltype(type)>;
  });
  return kind;
}

struct KernelCase : Case {
  const Arithmetic* arithmetic = nullptr;
  const fusedrnn::Chip* chip = nullptr;
  int order = 0;  // of the threads
  fusedrnn::Regime regime = fusedrnn::Regime::kStep;  // where it can be
  int64_t layers = 1;  // more: one upon the other, in one launch, and forward alone

  fusedrnn::CudaContext context() const {
    const fusedrnn::Regimes regimes = fusedrnn::regimes_named(fusedrnn::kRegimeNames[int(regime)]);
    return {*chip, nullptr, chip->major >= 9, arithmetic->tf32, regimes};
  }
};

inline std::string text(const KernelCase& c, size_t number) {
  const fusedrnn::Chip& chip = *c.chip;
  return std::string(c.arithmetic->name) + ", regime " + fusedrnn::kRegimeNames[int(c.regime)] + ", " +
         std::to_string(chip.multiprocessors) + " multiprocessors of " +
         std::to_string(chip.major) + ".x with " + std::to_string(chip.shared_bytes >> 10) + " KiB, " + kOrders[c.order] +
         ", " + std::to_string(c.layers) + " layers, " + text(static_cast<const Case&>(c), number);
}

// Every cell, arithmetic, direction count, packed or padded, with units and rows that fill tiles or do not, then larger ones:
// rows for several warps, sums deep enough for all warps of a block. Chips and orders by lot. Of cells beyond torch's only some:
// what their kernels share with the others' is proven there.
inline std::vector<KernelCase> kernel_cases() {
  std::vector<KernelCase> cases;
  auto add = [&](int cell, const Arithmetic& arithmetic, int64_t D, bool packed, int64_t B, int64_t H, bool project,
                 int64_t most_steps) {
    const uint64_t seed = cases.size();
    Random random{seed + 2000000};
    KernelCase c{random_case(cell, arithmetic.dtype, D, packed, B, H, project, seed)};
    c.T = std::min(c.T, most_steps);
    c.uneven = !packed && random.below(4) == 0;
    // Where operands are rounded, the reference must see what was rounded.
    c.save = c.save || ((project || traits_of(cell).late) && arithmetic.operand);
    c.arithmetic = &arithmetic;
    c.chip = &kChips[random.below(std::size(kChips))];
    c.order = int(random.below(std::size(kOrders)));
    c.regime = fusedrnn::Regime(random.below(fusedrnn::kChosenRegimes));
    cases.push_back(c);
  };
  auto add_some = [&](int cell, const Arithmetic& arithmetic, int64_t D, bool packed) {
    constexpr int64_t kRows[] = {1, 7, 9, 17, 33}, kWidths[] = {1, 16, 19, 33, 67};
    for (size_t i = 0; i < 10; ++i)
      add(cell, arithmetic, D, packed, kRows[(i + i / 5 + cases.size() / 10) % 5], kWidths[i % 5], false, 6);
    for (auto [B, H] : {std::pair<int, int>{125, 31}, {40, 131}}) add(cell, arithmetic, D, packed, B, H, false, 2);
    if (traits_of(cell).norms) add(cell, arithmetic, D, packed, 3, fusedrnn::kRowThreads + 7, false, 2);
    add(cell, arithmetic, D, packed, 3, 7, false, 6);
    if (!packed) return;
    cases.back().T = fusedrnn::ListedRows::kMost + 14;  // more steps than a kernel's argument lists
    // By which what has no bounds would have grown until each rounding makes another sequence of it.
    cases.back().choice.candidate = cases.back().choice.output = fusedrnn::Function::kTanh;
  };
  for (int cell = 0; traits_of(cell).gates > 0; ++cell)
    for (const Arithmetic& arithmetic : kArithmetics) {
      const bool projects = traits_of(cell).projects();
      for (int64_t D : {1, 2})
        for (bool packed : {false, true}) {
          if (!kind_of(cell).of_torch) {
            add_some(cell, arithmetic, D, packed);
            continue;
          }
          for (int64_t H : {1, 7, 16, 19, 33, 67})
            for (int64_t B : {1, 2, 7, 8, 9, 17, 33})
              for (bool project : {false, true})
                if (projects || !project) add(cell, arithmetic, D, packed, B, H, project, 6);
          if (packed) {  // more steps than a kernel's argument lists
            const fusedrnn::Regime regime = fusedrnn::Regime(1 + cases.size() % 3);
            add(cell, arithmetic, D, packed, 3, regime == fusedrnn::Regime::kCluster ? 17 : 7, false, 6);
            cases.back().T = fusedrnn::ListedRows::kMost + 14;
            cases.back().regime = regime;
            if (regime == fusedrnn::Regime::kCluster) cases.back().chip = &kChips[2];
          }
          add(cell, arithmetic, D, packed, 125, 19, false, 2);  // so many rows that the warps of a cluster's block divide them
          cases.back().regime = fusedrnn::Regime::kCluster;
          cases.back().chip = &kChips[1];
          for (auto [B, H] : {std::pair<int, int>{61, 33}, {125, 31}, {257, 17}, {3, 263}, {40, 131}})
            for (bool project : {false, true})
              if (projects || !project) add(cell, arithmetic, D, packed, B, H, project, 2);
        }
    }
  // Layers in one launch: with blocks of several units and rows, and with so little shared memory that parts of a sum take turns.
  for (int cell = 0; kind_of(cell).of_torch; ++cell)
    for (const Arithmetic& arithmetic : kArithmetics)
      for (bool packed : {false, true})
        for (int64_t H : {1, 7, 16, 19, 33})
          for (int64_t B : {1, 9, 33}) {
            add(cell, arithmetic, 1, packed, B, H, false, 6);
            KernelCase& c = cases.back();
            c.layers = 2 + int64_t(cases.size() % 4);
            constexpr int kChoice[] = {2, 5, 6};  // no more blocks than ThreadSanitizer has threads for
            c.chip = &kChips[H > 16 ? 2 : kChoice[cases.size() / 4 % 3]];
            c.T = 1 + int64_t(cases.size() / 2 % 9);
            c.uneven = c.reset = c.zoneout = c.hidden_mask = c.extreme = c.reset_hx = c.reset_cx = false;
            c.save = c.save || arithmetic.operand;
            if (packed && H == 7 && B == 9) c.T = fusedrnn::ListedRows::kMost + 14;  // more steps than a kernel's argument lists
          }
  return cases;
}

class KernelProblem : public Problem {
 public:
  explicit KernelProblem(const KernelCase& c) : Problem(c, c.arithmetic->operand, true), context_(c.context()), above_(size_t(c.layers - 1)) {
    for (Above& above : above_) {
      above.weight_ih = random_tensor(G * c.H * c.H, 1.5 / std::sqrt(double(c.H)));
      above.weight_hh = random_tensor(G * c.H * c.H, 1.5 / std::sqrt(double(c.H)));
      above.bias_ih = random_tensor(G * c.H, 1);
      if (c.bias) above.bias_hh = random_tensor(G * c.H, 1);
      if (c.hx) above.hx = random_tensor(c.B * c.H, 1);
      if (c.cx && traits.states > 1) above.cx = random_tensor(c.B * c.H, 1);
      above.output = result(rows * c.H);
      above.hy = result(c.B * c.H);
      if (traits.states > 1) above.cy = result(c.B * c.H);
      if (!c.save) continue;
      above.saved = result(rows * traits.saved * c.H);
      above.states = result(rows * extra * c.H);
      if (c.grad_hy) above.grad_hy = random_tensor(c.B * c.H, 1);
      if (c.grad_cy && traits.states > 1) above.grad_cy = random_tensor(c.B * c.H, 1);
      above.grad_pre = result(rows * traits.pre * c.H);
      if (c.need_grad_hx) above.grad_hx = result(c.B * c.H);
      if (c.need_grad_cx && traits.states > 1) above.grad_cx = result(c.B * c.H);
      if (c.need_grad_weight_hh) above.hidden_before = result(rows * c.H);
    }
    if (c.save && c.need_grad_weight_hh && traits.multiplies) hidden_before_ = result(rows * c.D * P);
  }

  // As Problem::run, but for the gradients of the weights, which are not the kernels'.
  double run(const fusedrnn::CudaEngine& engine, const std::string& spoiled) {
    auto forward_bytes = [&](const ForwardParams& p) { return engine.forward_workspace(p, context_); };
    auto backward_bytes = [&](const BackwardParams& p) { return engine.backward_workspace(with_more(p), context_); };
    auto forward = [&](const ForwardParams& p, void* workspace) { engine.forward(p, context_, workspace); };
    auto backward = [&](const BackwardParams& p, void* workspace) { engine.backward(with_more(p), context_, workspace); };
    double worst = run_forward(forward_bytes, forward, spoiled);
    if (c.save) {
      worst = std::max(worst, run_backward(backward_bytes, backward, spoiled));
      find_hidden_before(backward_params(references), hidden_before_);
      worst = std::max(worst, judge({{"hidden_before", &hidden_before_}}, spoiled));
    }
    check_inputs();
    return worst;
  }

  // All layers in one launch; the reference goes layer by layer, on what the engine left of the one below.
  double run_stack(const fusedrnn::CudaEngine& engine, const std::string& spoiled) {
    const fusedrnn::StackParams p = stack_params();
    run_guarded(engine.stack_workspace(p, context_), [&](void* workspace) { engine.stack(p, context_, workspace); });
    note_operands({&weight_hh[0], &hx, &output, &states, &saved});
    for (Above& above : above_) note_operands({&above.weight_ih, &above.weight_hh, &above.hx, &above.output});
    double worst = 0;
    for (int64_t k = 0; k <= int64_t(above_.size()); ++k) {
      const std::vector<double> gates_x = k ? gates_of(k) : std::vector<double>{};
      ForwardParams exact = of_layer(k, references), rounded = of_layer(k, operands());
      if (k) exact.gates_x[0] = gates_x.data(), exact.gates_x_row[0] = G * c.H, exact.gates_x_step[0] = c.B * G * c.H;
      fusedrnn::for_each_cell([&](int id, auto cell) {
        if (id == c.cell) reference_forward<decltype(cell)>(exact, rounded);
      });
      if (k == 0) worst = judge({{"output", &output}, {"hy", &hy}, {"cy", &cy}, {"saved", &saved}, {"states", &states}}, spoiled);
      else {
        Above& of = above_[size_t(k - 1)];
        const auto results = {std::pair<const char*, Tensor*>{"output", &of.output}, {"hy", &of.hy}, {"cy", &of.cy},
                              {"saved", &of.saved}, {"states", &of.states}};
        worst = std::max(worst, judge(results, spoiled));
      }
    }
    if (c.save) worst = std::max(worst, run_stack_backward(engine, spoiled));
    check_inputs();
    for (const Above& of : above_)
      for (const Tensor* tensor : {&of.weight_ih, &of.weight_hh, &of.bias_ih, &of.bias_hh, &of.hx, &of.cx, &of.grad_hy, &of.grad_cy,
                                   &of.output, &of.saved, &of.states})
        CHECK(unchanged(*tensor), "wrote to a weight, a bias, a state, an incoming gradient or what forward saved");
    return worst;
  }

  // Likewise, from the highest layer down: what comes from the layer above is made of the gradients that the engine left of it.
  double run_stack_backward(const fusedrnn::CudaEngine& engine, const std::string& spoiled) {
    for (Tensor* tensor : {&output, &saved, &states}) freeze(*tensor);
    for (Above& above : above_)
      for (Tensor* tensor : {&above.output, &above.saved, &above.states}) freeze(*tensor);
    const fusedrnn::CudaStackBackwardParams p = stack_backward_params();
    run_guarded(engine.stack_backward_workspace(p, context_), [&](void* workspace) { engine.stack_backward(p, context_, workspace); });
    note_operands({&grad_pre});
    for (Above& above : above_) note_operands({&above.grad_pre});
    double worst = 0;
    for (int64_t k = int64_t(above_.size()); k >= 0; --k) {
      const bool highest = k == int64_t(above_.size());
      const std::vector<double> from_above = highest ? std::vector<double>{} : grad_output_of(k);
      BackwardParams exact = backward_of_layer(k, references), rounded = backward_of_layer(k, operands());
      if (!highest) exact.grad_output = rounded.grad_output = from_above.data();
      fusedrnn::for_each_cell([&](int id, auto cell) {
        if (id == c.cell) reference_backward<decltype(cell)>(exact, rounded);
      });
      find_hidden_before(exact, k ? above_[size_t(k - 1)].hidden_before : hidden_before_);
      if (k == 0) {
        worst = std::max(worst, judge({{"grad_pre", &grad_pre}, {"grad_hx", &grad_hx}, {"grad_cx", &grad_cx},
                                       {"hidden_before", &hidden_before_}}, spoiled));
      } else {
        Above& of = above_[size_t(k - 1)];
        worst = std::max(worst, judge({{"grad_pre", &of.grad_pre}, {"grad_hx", &of.grad_hx}, {"grad_cx", &of.grad_cx},
                                       {"hidden_before", &of.hidden_before}}, spoiled));
      }
    }
    return worst;
  }

  // Regime kStep if the chip has no room for so many layers.
  fusedrnn::ProductPlan stack_plan(bool backward) const {
    return plan_stacked(context_.chip, forward_params(engines), kind_of(c.cell), context_.tf32, int64_t(above_.size()) + 1, backward);
  }

  fusedrnn::StepPlan plan() const {
    return plan_step(context_.chip, forward_params(engines), kind_of(c.cell), context_.tf32, context_.regimes);
  }

 private:
  struct Above {  // a layer above the first
    Tensor weight_ih, bias_ih, weight_hh, bias_hh, hx, cx, output, hy, cy, saved, states;
    Tensor grad_hy, grad_cy, grad_pre, grad_hx, grad_cx, hidden_before;
  };
  const fusedrnn::CudaContext context_;
  std::vector<Above> above_;
  Tensor hidden_before_;

  template <class Pointer>
  ForwardParams of_layer(int64_t k, const Pointer& pointer) const {
    ForwardParams p = forward_params(pointer);
    if (k == 0) return p;
    const Above& of = above_[size_t(k - 1)];
    p.weight_hh[0] = pointer(of.weight_hh), p.bias_hh[0] = pointer(of.bias_hh);
    p.gates_x[0] = pointer(of.bias_ih), p.gates_x_step[0] = p.gates_x_row[0] = 0;
    p.hx = pointer(of.hx), p.cx = pointer(of.cx);
    p.output = pointer(of.output), p.hy = pointer(of.hy), p.cy = pointer(of.cy);
    p.saved = pointer(of.saved), p.states = pointer(of.states);
    return p;
  }
  fusedrnn::StackParams stack_params() const {
    fusedrnn::StackParams p{};
    p.layers = int64_t(above_.size()) + 1;
    for (int64_t k = 0; k < p.layers; ++k) p.of[k] = of_layer(k, engines);
    for (size_t k = 0; k < above_.size(); ++k) p.weight_ih[k + 1] = engines(above_[k].weight_ih);
    static_cast<LayerParams&>(p) = p.of[0];
    return p;
  }
  template <class Pointer>
  BackwardParams backward_of_layer(int64_t k, const Pointer& pointer) const {
    BackwardParams p = backward_params(pointer);
    p.grad_states = nullptr;
    if (k < int64_t(above_.size())) p.grad_output = nullptr;
    if (k == 0) return p;
    const Above& of = above_[size_t(k - 1)];
    p.weight_hh[0] = pointer(of.weight_hh);
    p.hx = pointer(of.hx), p.cx = pointer(of.cx);
    p.output = pointer(of.output), p.saved = pointer(of.saved), p.states = pointer(of.states);
    p.grad_hy = pointer(of.grad_hy), p.grad_cy = pointer(of.grad_cy);
    p.grad_pre = pointer(of.grad_pre), p.grad_hx = pointer(of.grad_hx), p.grad_cx = pointer(of.grad_cx);
    return p;
  }
  fusedrnn::CudaStackBackwardParams stack_backward_params() const {
    fusedrnn::CudaStackBackwardParams p{};
    p.layers = int64_t(above_.size()) + 1;
    for (int64_t i = 0; i < p.layers; ++i) {
      const int64_t k = p.layers - 1 - i;
      p.of[i] = backward_of_layer(k, engines);
      p.hidden_before[i] = engines(k ? above_[size_t(k - 1)].hidden_before : hidden_before_);
      if (i) p.weight_ih[i] = engines(above_[size_t(k)].weight_ih);
    }
    static_cast<LayerParams&>(p) = p.of[0];
    return p;
  }
  // What a layer's output gets from the gates of the layer above.
  std::vector<double> grad_output_of(int64_t k) const {
    const Above& of = above_[size_t(k)];
    const std::vector<double>& weights = operand ? of.weight_ih.multiplied : of.weight_ih.exact;
    const std::vector<double>& grads = operand ? of.grad_pre.multiplied : of.grad_pre.exact;
    std::vector<double> found(size_t(rows * c.H), 0);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < G * c.H; ++i)  // x_pre is the identity
        for (int64_t u = 0; u < c.H; ++u)
          found[size_t(row * c.H + u)] += weights[size_t(i * c.H + u)] * grads[size_t(row * traits.pre * c.H + i)];
    return found;
  }
  // The input's half of the gates of a layer above the first, for all rows.
  std::vector<double> gates_of(int64_t k) const {
    const Above& of = above_[size_t(k - 1)];
    const Tensor& below = k > 1 ? above_[size_t(k - 2)].output : output;
    const std::vector<double>& weights = operand ? of.weight_ih.multiplied : of.weight_ih.exact;
    const std::vector<double>& h = operand ? below.multiplied : below.exact;
    std::vector<double> gates;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < G * c.H; ++i) {
        gates.push_back(of.bias_ih.exact[size_t(i)]);
        for (int64_t u = 0; u < c.H; ++u) gates.back() += weights[size_t(i * c.H + u)] * h[size_t(row * c.H + u)];
      }
    return gates;
  }

  fusedrnn::CudaBackwardParams with_more(const BackwardParams& p) const { return {p, engines(hidden_before_)}; }

  void find_hidden_before(const BackwardParams& p, Tensor& found) const {
    std::vector<double> masked;
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t b = 0; b < p.steps.rows(t); ++b)
        for (int64_t d = 0; d < c.D; ++d) {
          const double* h = runs(p, t, b) ? hidden_before(p, p.output, p.hx, p.reset_hx, t, b, d, masked) : nullptr;
          for (int64_t u = 0; u < P && !found.exact.empty(); ++u)
            found.exact[size_t(at(p, t, b, d, P) + u)] = h ? h[u] : 0;
        }
  }
};

}  // namespace test
