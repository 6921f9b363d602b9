// The recurrence of a layer, forward and backward, as plain loops over steps, rows and units in double: slow and obvious.
// It takes the engine's own parameter structs, with every tensor in double, and calls the same cells.
//
// Products read their operands from parameters of their own, `multiplied`: these are the same once more, or, for an engine
// that rounds what it multiplies, say what it has rounded the weights and its own results to. So the reference need not guess
// which of two neighbours a number was rounded to, and what is left to tolerate is the rounding of sums.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cells/cells.h"
#include "params.h"

namespace test {

using fusedrnn::BackwardParams;
using fusedrnn::ForwardParams;
using fusedrnn::GradWeightsParams;
using fusedrnn::kGrads;
using fusedrnn::LayerParams;
using fusedrnn::slots;

inline const double* in(const void* p) { return static_cast<const double*>(p); }
inline double* out(void* p) { return static_cast<double*>(p); }

// One unit at one step of a row of the batch.
template <class Cell>
struct Unit {
  fusedrnn::Given<double, Cell::kUnit> given;
  double pre[Cell::kPre] = {}, state[Cell::kStates] = {}, new_state[Cell::kStates] = {}, saved[slots(Cell::kSaved)] = {};
  double grad_new[Cell::kStates] = {}, past[Cell::kStates] = {}, grad_pre[kGrads<Cell>] = {}, grad_state[Cell::kStates] = {};
};

// All units of a row, with what the cell is given of each but for what is normalised.
template <class Cell>
std::vector<Unit<Cell>> units_of_row(const LayerParams& p, int64_t d, int64_t b) {
  std::vector<Unit<Cell>> units(static_cast<size_t>(p.H));
  for (int64_t u = 0; u < p.H; ++u) {
    fusedrnn::Given<double, Cell::kUnit>& given = units[size_t(u)].given;
    given = {p.choice, {}, {}, {}, 1, 0};
    for (int k = 0; k < Cell::kUnit && p.unit[d]; ++k) given.unit[k] = in(p.unit[d])[k * p.H + u];
    if (Cell::kLate && p.hidden_mask) given.mask = in(p.hidden_mask)[(d * p.steps.B + b) * p.H + u];
  }
  return units;
}

// The mean of number(u, i) of all units, `each` of a unit.
template <class Number>
double mean_of(int64_t units, int each, const Number& number) {
  double sum = 0;
  for (int64_t u = 0; u < units; ++u)
    for (int i = 0; i < each; ++i) sum += number(u, i);
  return sum / double(units * each);
}
template <class Number>
fusedrnn::Norm<double> norm_of(int64_t units, int each, const Number& number) {
  const double mean = mean_of(units, each, number);
  const double variance = mean_of(units, each, [&](int64_t u, int i) { return (number(u, i) - mean) * (number(u, i) - mean); });
  return {mean, 1 / std::sqrt(variance + fusedrnn::kNormEpsilon)};
}

// The statistics that a normalised cell is given: of its products, which number(u, gate) says; and of state 1 as it made it.
template <class Cell, class Number>
void give_products(std::vector<Unit<Cell>>& units, const Number& number) {
  const auto norm = norm_of(int64_t(units.size()), Cell::kGates, number);
  for (Unit<Cell>& unit : units) unit.given.products = norm;
}
template <class Cell>
void give_inner(std::vector<Unit<Cell>>& units) {
  const auto norm = norm_of(int64_t(units.size()), 1, [&](int64_t u, int) { return units[size_t(u)].new_state[1]; });
  for (Unit<Cell>& unit : units) unit.given.inner = norm;
}

// Position of row b of step t in a sequence stored row after row, direction d of D, `width` numbers a direction.
inline int64_t at(const LayerParams& p, int64_t t, int64_t b, int64_t d, int64_t width) {
  return ((p.steps.row_offset(t) + b) * p.D + d) * width;
}

// The same for rows `row` numbers apart, and `step` from step to step if padded.
inline int64_t at(const LayerParams& p, int64_t t, int64_t b, std::pair<int64_t, int64_t> step_and_row) {
  const auto [step, row] = step_and_row;
  return p.steps.offsets ? (p.steps.row_offset(t) + b) * row : t * step + b * row;
}

// Whether row b of the batch has step t.
inline bool runs(const LayerParams& p, int64_t t, int64_t b) {
  if (p.steps.lengths) return t < p.steps.lengths[b];
  const int64_t count = p.steps.rows(t), *order = p.steps.order;
  return order ? std::find(order, order + count, b) != order + count : b < count;
}

// The step before t in direction d, if row b was there; else -1.
inline int64_t step_before(const LayerParams& p, int64_t t, int64_t b, int64_t d) {
  const int64_t before = d ? t + 1 : t - 1;
  return before >= 0 && before < p.steps.T && runs(p, before, b) ? before : -1;
}

// Whether a sequence of its own begins in row b, in the order of direction d, with step t.
inline bool anew(const LayerParams& p, int64_t t, int64_t b, int64_t d) {
  const int64_t first = d ? step_before(p, t, b, d) : t;  // in the order of time
  return p.steps.reset && first >= 0 && p.steps.reset[p.steps.row_offset(first) + b];
}

// A number of the states that the caller gave, (D, B, width) for each k; null: zero.
inline double given(const LayerParams& p, const void* states, int64_t k, int64_t d, int64_t b, int64_t width, int64_t u) {
  return states ? in(states)[((k * p.D + d) * p.steps.B + b) * width + u] : 0;
}

// How much of state k stays what it was.
inline double stays(const LayerParams& p, int64_t t, int64_t b, int64_t d, int states, int k, int64_t u) {
  const int64_t row = p.steps.row_offset(t) + b;
  return p.zoneout ? in(p.zoneout)[row * p.zoneout_row + (d * states + k) * p.H + u] : 0;
}

// The hidden state that step t multiplies by weight_hh, from `output`, `hx` and `reset_hx`, which may say what was rounded; null: zeros.
inline const double* hidden_before(const LayerParams& p, const void* output, const void* hx, const void* reset_hx, int64_t t, int64_t b,
                                   int64_t d, std::vector<double>& masked) {
  const int64_t before = step_before(p, t, b, d);
  const bool begins = anew(p, t, b, d);
  const void* first = begins ? reset_hx : hx;
  const double* h = before >= 0 && !begins ? in(output) + at(p, before, b, d, p.P) : first ? in(first) + (d * p.steps.B + b) * p.P : nullptr;
  if (!h || !p.hidden_mask) return h;
  masked.assign(h, h + p.P);
  for (int64_t u = 0; u < p.P; ++u) masked[size_t(u)] *= in(p.hidden_mask)[(d * p.steps.B + b) * p.P + u];
  return masked.data();
}

// Zeros where row b has no step t, if the engine writes there, too.
inline void clear_step(const LayerParams& p, void* sequence, int64_t t, int64_t b, int64_t d, int64_t width) {
  for (int64_t i = 0; p.steps.lengths && sequence && i < width; ++i) out(sequence)[at(p, t, b, d, width) + i] = 0;
}

template <class Cell>
void reference_forward(const ForwardParams& p, const ForwardParams& multiplied) {
  constexpr int G = Cell::kGates, kInner = Cell::kStates - 1;
  const int64_t H = p.H, P = p.P, T = p.steps.T, B = p.steps.B;
  const bool projected = p.weight_hr[0];
  for (int64_t d = 0; d < p.D; ++d)
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> h(static_cast<size_t>(P)), c(static_cast<size_t>(kInner * H)), masked;
      auto begin = [&](const void* hx, const void* cx) {
        for (int64_t u = 0; u < P; ++u) h[u] = given(p, hx, 0, d, b, P, u);
        for (int64_t i = 0; i < kInner * H; ++i) c[i] = given(p, cx, i / H, d, b, H, i % H);
      };
      begin(p.hx, p.cx);
      for (int64_t s = 0; s < T; ++s) {
        const int64_t t = d ? T - 1 - s : s;
        if (!runs(p, t, b)) {
          clear_step(p, p.output, t, b, d, P);
          clear_step(p, p.save != fusedrnn::Save::kNothing ? p.saved : nullptr, t, b, d, Cell::kSaved * H);
          clear_step(p, p.save != fusedrnn::Save::kNothing ? p.states : nullptr, t, b, d, p.stored * H);
          continue;
        }
        if (anew(p, t, b, d)) begin(p.reset_hx, p.reset_cx);
        const double* h_before = hidden_before(p, multiplied.output, p.hx ? multiplied.hx : nullptr,
                                               p.reset_hx ? multiplied.reset_hx : nullptr, t, b, d, masked);
        const double* gates_x = in(p.gates_x[d]) + at(p, t, b, {p.gates_x_step[d], p.gates_x_row[d]});
        std::vector<Unit<Cell>> units = units_of_row<Cell>(p, d, b);
        // Some gates' products of what is multiplied, if there is something.
        auto multiply = [&](int first_gate, int end_gate, const double* what) {
          for (int64_t u = 0; u < H; ++u)
            for (int g = first_gate; g < end_gate; ++g) {
              const double* weights = in(multiplied.weight_hh[d]) + (g * H + u) * P;
              double sum = p.bias_hh[d] ? in(p.bias_hh[d])[g * H + u] : 0;
              for (int64_t k = 0; k < P && what && Cell::kMultiplies; ++k) sum += weights[k] * what[k];
              units[size_t(u)].pre[Cell::h_pre(g)] += sum;
            }
        };
        for (int64_t u = 0; u < H; ++u) {
          Unit<Cell>& unit = units[size_t(u)];
          for (int g = 0; g < G; ++g) {
            double sum = p.bias_ih[d] ? in(p.bias_ih[d])[g * H + u] : 0;
            for (int64_t k = 0; k < p.I && p.weight_ih[d]; ++k) sum += in(p.weight_ih[d])[(g * H + u) * p.I + k] * gates_x[k];
            unit.pre[Cell::x_pre(g)] += p.weight_ih[d] ? sum : gates_x[g * H + u];
          }
          unit.state[0] = projected ? 0 : h[u];
          for (int k = 0; k < kInner; ++k) unit.state[k + 1] = c[k * H + u];
        }
        multiply(0, G - Cell::kLate, h_before);
        if constexpr (Cell::kLate > 0) {
          std::vector<double> middle;
          for (const Unit<Cell>& unit : units) middle.push_back(Cell::middle(unit.given, unit.pre, unit.state));
          const int64_t at_middle = at(p, t, b, d, Cell::kSaved * H) + Cell::kMiddle * H;
          const bool saves = p.save != fusedrnn::Save::kNothing;
          if (saves) std::copy(middle.begin(), middle.end(), out(p.saved) + at_middle);
          multiply(G - Cell::kLate, G, saves ? in(multiplied.saved) + at_middle : middle.data());
        }
        auto product = [&](int64_t u, int g) { return units[size_t(u)].pre[Cell::h_pre(g)]; };
        auto run_cells = [&] {
          for (Unit<Cell>& unit : units) fusedrnn::cell_forward<Cell>(unit.given, unit.pre, unit.state, unit.new_state, unit.saved);
        };
        if constexpr (Cell::kNorms > 0) give_products(units, product);
        if constexpr (Cell::kNorms == 2) {
          run_cells();  // for the sake of state 1
          give_inner(units);
        }
        run_cells();
        std::vector<double> h_new(static_cast<size_t>(H));
        for (int64_t u = 0; u < H; ++u) {
          Unit<Cell>& unit = units[size_t(u)];
          auto &state = unit.state, &new_state = unit.new_state, &saved = unit.saved;
          for (int k = 0; k < Cell::kStates && p.zoneout && p.save != fusedrnn::Save::kNothing; ++k)
            out(p.states)[at(p, t, b, d, p.stored * H) + (kInner + k) * H + u] = new_state[k];
          for (int k = 0; k < Cell::kStates && p.zoneout; ++k)
            new_state[k] = fusedrnn::zoneout(stays(p, t, b, d, Cell::kStates, k, u), state[k], new_state[k]);
          h_new[u] = new_state[0];
          for (int k = 0; k < kInner; ++k) c[k * H + u] = new_state[k + 1];
          if (p.save == fusedrnn::Save::kNothing) continue;
          for (int k = 0; k < Cell::kSaved; ++k) out(p.saved)[at(p, t, b, d, Cell::kSaved * H) + k * H + u] = saved[k];
          double* states = p.stored ? out(p.states) + at(p, t, b, d, p.stored * H) : nullptr;
          for (int k = 0; k < kInner; ++k) states[k * H + u] = new_state[k + 1];
          if (projected) states[kInner * H + u] = new_state[0];
        }
        const double* unprojected = h_new.data();
        if (projected && p.save != fusedrnn::Save::kNothing) unprojected = in(multiplied.states) + at(p, t, b, d, (kInner + 1) * H) + kInner * H;
        for (int64_t u = 0; u < P; ++u) {
          h[u] = projected ? 0 : h_new[u];
          if (projected)
            for (int64_t k = 0; k < H; ++k) h[u] += in(multiplied.weight_hr[d])[u * H + k] * unprojected[k];
          out(p.output)[at(p, t, b, d, P) + u] = h[u];
        }
      }
      for (int64_t u = 0; u < P; ++u) out(p.hy)[(d * B + b) * P + u] = h[u];
      for (int64_t i = 0; i < kInner * H; ++i) out(p.cy)[((i / H * p.D + d) * B + b) * H + i % H] = c[i];
    }
}

template <class Cell>
void reference_backward(const BackwardParams& p, const BackwardParams& multiplied) {
  constexpr int G = Cell::kGates, kInner = Cell::kStates - 1;
  const int64_t H = p.H, P = p.P, T = p.steps.T, B = p.steps.B;
  const bool projected = p.weight_hr[0];
  for (int64_t d = 0; d < p.D; ++d)
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> dh(static_cast<size_t>(P)), dc(static_cast<size_t>(kInner * H));
      for (int64_t u = 0; u < P; ++u) dh[u] = p.grad_hy ? in(p.grad_hy)[(d * B + b) * P + u] : 0;
      for (int64_t u = 0; u < P && p.grad_reset_hx; ++u) out(p.grad_reset_hx)[(d * B + b) * P + u] = 0;
      for (int64_t i = 0; i < kInner * H && p.grad_reset_cx; ++i) out(p.grad_reset_cx)[((i / H * p.D + d) * B + b) * H + i % H] = 0;
      for (int64_t i = 0; i < kInner * H; ++i) dc[i] = p.grad_cy ? in(p.grad_cy)[((i / H * p.D + d) * B + b) * H + i % H] : 0;
      for (int64_t s = 0; s < T; ++s) {
        const int64_t t = d ? s : T - 1 - s, before = step_before(p, t, b, d);
        const bool begins = anew(p, t, b, d);
        if (!runs(p, t, b)) {
          clear_step(p, p.grad_pre, t, b, d, kGrads<Cell> * H);
          clear_step(p, projected ? p.grad_proj : nullptr, t, b, d, P);
          continue;
        }
        for (int64_t u = 0; u < P; ++u) {
          if (p.grad_output) dh[u] += in(p.grad_output)[at(p, t, b, d, P) + u];
          if (projected) out(p.grad_proj)[at(p, t, b, d, P) + u] = dh[u];
        }
        std::vector<Unit<Cell>> units = units_of_row<Cell>(p, d, b);
        for (int64_t u = 0; u < H; ++u) {
          Unit<Cell>& unit = units[size_t(u)];
          auto &state = unit.state, &new_state = unit.new_state, &grad_new = unit.grad_new;
          for (int k = 0; k < Cell::kSaved; ++k) unit.saved[k] = in(p.saved)[at(p, t, b, d, Cell::kSaved * H) + k * H + u];
          if (!projected) {
            state[0] = before >= 0 && !begins ? in(p.output)[at(p, before, b, d, P) + u]
                                              : given(p, begins ? p.reset_hx : p.hx, 0, d, b, P, u);
            new_state[0] = in(p.output)[at(p, t, b, d, P) + u];
            grad_new[0] = dh[u];
          } else {
            const double* grad_proj = in(multiplied.grad_proj) + at(p, t, b, d, P);
            for (int64_t k = 0; k < P; ++k) grad_new[0] += in(multiplied.weight_hr[d])[k * H + u] * grad_proj[k];
          }
          for (int k = 0; k < kInner; ++k) {
            state[k + 1] = before >= 0 && !begins ? in(p.states)[at(p, before, b, d, p.stored * H) + k * H + u]
                                                  : given(p, begins ? p.reset_cx : p.cx, k, d, b, H, u);
            new_state[k + 1] = in(p.states)[at(p, t, b, d, p.stored * H) + k * H + u];
            grad_new[k + 1] = dc[k * H + u];
            if (p.grad_states) grad_new[k + 1] += in(p.grad_states)[at(p, t, b, d, p.stored * H) + k * H + u];
          }
          if (p.zoneout) {
            for (int k = 0; k < Cell::kStates; ++k) {
              const double z = stays(p, t, b, d, Cell::kStates, k, u);
              new_state[k] = in(p.states)[at(p, t, b, d, p.stored * H) + (kInner + k) * H + u];
              unit.past[k] = z * grad_new[k];
              grad_new[k] *= 1 - z;
            }
          }
        }
        double* grad_pre_row = out(p.grad_pre) + at(p, t, b, d, kGrads<Cell> * H);
        const double* grad_multiplied = in(multiplied.grad_pre) + at(p, t, b, d, kGrads<Cell> * H);
        if constexpr (Cell::kLate > 0) {
          constexpr int kLast = G - 1;
          for (int64_t u = 0; u < H; ++u) {
            const Unit<Cell>& unit = units[size_t(u)];
            grad_pre_row[Cell::h_pre(kLast) * H + u] = Cell::late_backward(unit.given, unit.saved, unit.state, unit.grad_new);
          }
          const double *grad = grad_multiplied + Cell::h_pre(kLast) * H, *weights = in(multiplied.weight_hh[d]) + kLast * H * P;
          for (int64_t k = 0; k < H; ++k)
            for (int64_t u = 0; u < H; ++u) units[size_t(k)].given.middle += grad[u] * weights[u * P + k];
        }
        auto product = [&](int64_t u, int g) { return units[size_t(u)].saved[Cell::kSaved - G + g]; };
        if constexpr (Cell::kNorms > 0) give_products(units, product);
        if constexpr (Cell::kNorms == 2) {
          give_inner(units);
          std::vector<double> grad, y;
          for (const Unit<Cell>& unit : units) {
            grad.push_back(Cell::out_backward(unit.given, unit.saved, unit.new_state, unit.grad_new));
            y.push_back(unit.given.inner.of(unit.new_state[1]));
          }
          const double mean = mean_of(H, 1, [&](int64_t u, int) { return grad[size_t(u)]; });
          const double mean_y = mean_of(H, 1, [&](int64_t u, int) { return grad[size_t(u)] * y[size_t(u)]; });
          for (size_t u = 0; u < units.size(); ++u) units[u].grad_new[1] += units[u].given.inner.grad(grad[u], y[u], mean, mean_y);
        }
        for (auto& [given, pre, state, new_state, saved, grad_new, past, grad_pre, grad_state] : units)
          fusedrnn::cell_backward<Cell>(given, saved, state, new_state, grad_new, grad_pre, grad_state);
        if constexpr (Cell::kNorms > 0) {
          auto grad = [&](int64_t u, int g) -> double& { return units[size_t(u)].grad_pre[Cell::h_pre(g)]; };
          auto y = [&](int64_t u, int g) { return units[size_t(u)].given.products.of(product(u, g)); };
          const double mean = mean_of(H, G, grad), mean_y = mean_of(H, G, [&](int64_t u, int g) { return grad(u, g) * y(u, g); });
          const bool nothing = begins ? !p.reset_hx : before < 0 && !p.hx;  // was multiplied, and nobody wants the gradient
          for (int64_t u = 0; u < H; ++u)
            for (int g = 0; g < G; ++g)
              grad(u, g) = nothing ? 0 : units[size_t(u)].given.products.grad(grad(u, g), y(u, g), mean, mean_y);
        }
        std::vector<double> dh_before(static_cast<size_t>(P));
        for (int64_t u = 0; u < H; ++u) {
          Unit<Cell>& unit = units[size_t(u)];
          auto& grad_state = unit.grad_state;
          for (int k = 0; k < Cell::kStates; ++k) grad_state[k] += unit.past[k];
          for (int k = 0; k < kGrads<Cell>; ++k) grad_pre_row[k * H + u] = unit.grad_pre[k];
          if (!projected) dh_before[u] += grad_state[0];
          for (int k = 0; k < kInner; ++k) {
            dc[k * H + u] = begins ? 0 : grad_state[k + 1];
            if (begins && p.grad_reset_cx) out(p.grad_reset_cx)[((k * p.D + d) * B + b) * H + u] += grad_state[k + 1];
          }
          for (int g = 0; g < G - Cell::kLate; ++g) {
            const double grad_gate = grad_multiplied[Cell::h_pre(g) * H + u];
            for (int64_t k = 0; k < P && Cell::kMultiplies; ++k) {
              const double mask = p.hidden_mask ? in(p.hidden_mask)[(d * B + b) * P + k] : 1;
              dh_before[k] += grad_gate * in(multiplied.weight_hh[d])[(g * H + u) * P + k] * mask;
            }
          }
        }
        if (begins) {
          for (int64_t u = 0; u < P && p.grad_reset_hx; ++u) out(p.grad_reset_hx)[(d * B + b) * P + u] += dh_before[u];
          std::fill(dh_before.begin(), dh_before.end(), 0);
        }
        dh = dh_before;
      }
      for (int64_t u = 0; u < P && p.grad_hx; ++u) out(p.grad_hx)[(d * B + b) * P + u] = dh[u];
      for (int64_t i = 0; i < kInner * H && p.grad_cx; ++i) out(p.grad_cx)[((i / H * p.D + d) * B + b) * H + i % H] = dc[i];
    }
}

template <class Cell>
void reference_grad_weights(const GradWeightsParams& p) {
  const int64_t H = p.H, P = p.P, I = p.I, B = p.steps.B;
  auto clear = [](void* p, int64_t count) {
    for (int64_t i = 0; p && i < count; ++i) out(p)[i] = 0;
  };
  for (int64_t d = 0; d < p.D; ++d) {
    clear(p.grad_weight_ih[d], Cell::kGates * H * I), clear(p.grad_weight_hh[d], Cell::kGates * H * P);
    clear(p.grad_bias_ih[d], Cell::kGates * H), clear(p.grad_bias_hh[d], Cell::kGates * H), clear(p.grad_weight_hr[d], P * H);
    clear(p.grad_unit[d], Cell::kUnit * H);
    for (int64_t t = 0; t < p.steps.T; ++t)
      for (int64_t b = 0; b < B; ++b) {
        if (!runs(p, t, b)) continue;
        const double* x = in(p.input) + at(p, t, b, {p.input_step, p.input_row});
        std::vector<double> masked;
        const double* h = hidden_before(p, p.output, p.hx, p.reset_hx, t, b, d, masked);
        const double* grad_pre = in(p.grad_pre) + at(p, t, b, d, kGrads<Cell> * H);
        const double* middle = nullptr;  // what the late gate multiplied
        if constexpr (Cell::kLate > 0) middle = in(p.saved) + at(p, t, b, d, Cell::kSaved * H) + Cell::kMiddle * H;
        for (int64_t i = 0; i < Cell::kUnit * H && p.grad_unit[d]; ++i) out(p.grad_unit[d])[i] += grad_pre[Cell::kPre * H + i];
        for (int g = 0; g < Cell::kGates; ++g)
          for (int64_t u = 0; u < H; ++u) {
            const double grad_x = grad_pre[Cell::x_pre(g) * H + u], grad_h = grad_pre[Cell::h_pre(g) * H + u];
            for (int64_t k = 0; k < I && p.grad_weight_ih[d]; ++k) out(p.grad_weight_ih[d])[(g * H + u) * I + k] += grad_x * x[k];
            const double* fed = g < Cell::kGates - Cell::kLate ? h : middle;
            for (int64_t k = 0; k < P && p.grad_weight_hh[d] && fed; ++k)
              out(p.grad_weight_hh[d])[(g * H + u) * P + k] += grad_h * fed[k];
            if (p.grad_bias_ih[d]) out(p.grad_bias_ih[d])[g * H + u] += grad_x;
            if (p.grad_bias_hh[d]) out(p.grad_bias_hh[d])[g * H + u] += grad_h;
          }
        if (!p.grad_weight_hr[d]) continue;
        const double* grad = in(p.grad_proj) + at(p, t, b, d, P);
        const double* unprojected = in(p.states) + at(p, t, b, d, Cell::kStates * H) + (Cell::kStates - 1) * H;
        for (int64_t u = 0; u < P; ++u)
          for (int64_t k = 0; k < H; ++k) out(p.grad_weight_hr[d])[u * H + k] += grad[u] * unprojected[k];
      }
  }
}

}  // namespace test
