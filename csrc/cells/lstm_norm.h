// The LSTM whose recurrent products, all gates of a row together, and whose cell state on its way out are normalised (N):
//   gates = W_x x + b + gain N(W_hh h),   c' as the LSTM's,   h' = o tanh(gain_c N(c') + shift_c).
// Gates in the order i, f, g, o; the unit's own numbers: the gains of i, f, g and o, then gain_c and shift_c. What the gates are
// shifted by comes with the input's half. States h (0) and c (1).
// Source: Ba, Kiros and Hinton, "Layer normalization", arXiv:1607.06450 (2016), supplement, equations 20 to 22.
#pragma once
#include "lstm.h"

namespace fusedrnn {

struct NormLstmCell : PlainCell {
  static constexpr const char* kName = "lstm_norm";
  static constexpr int kGates = 4, kPre = 8, kStates = 2, kSaved = 8, kUnit = 6, kNorms = 2;
  static constexpr int kGainOut = 4, kShiftOut = 5;  // of the unit's numbers
  FUSEDRNN_CELL static constexpr int x_pre(int gate) { return gate; }
  FUSEDRNN_CELL static constexpr int h_pre(int gate) { return kGates + gate; }

  // tanh of the normalised c.
  template <class T>
  FUSEDRNN_CELL static T squashed(const Given<T, kUnit>& given, const T& normed) {
    return tanh(given.unit[kGainOut] * normed + given.unit[kShiftOut]);
  }

  template <class T>
  FUSEDRNN_CELL static void forward(const Given<T, kUnit>& given, const T (&pre)[kPre], const T (&state)[2], T (&new_state)[2],
                                    T (&saved)[kSaved]) {
    T gates[kGates], values[kGates], made[2];
    for (int g = 0; g < kGates; ++g) {
      saved[kGates + g] = pre[h_pre(g)];
      gates[g] = pre[g] + given.unit[g] * given.products.of(pre[h_pre(g)]);
    }
    LstmCell::forward(gates, state, made, values);
    for (int g = 0; g < kGates; ++g) saved[g] = values[g];
    new_state[1] = made[1];
  }

  template <class T>
  FUSEDRNN_CELL static T out(const Given<T, kUnit>& given, const T (&saved)[kSaved], const T (&new_state)[2]) {
    return saved[LstmCell::O] * squashed(given, given.inner.of(new_state[1]));
  }

  template <class T>
  FUSEDRNN_CELL static T out_backward(const Given<T, kUnit>& given, const T (&saved)[kSaved], const T (&new_state)[2],
                                      const T (&grad_new_state)[2]) {
    const T y = squashed(given, given.inner.of(new_state[1]));
    return grad_new_state[0] * saved[LstmCell::O] * (T(1) - y * y) * given.unit[kGainOut];
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const Given<T, kUnit>& given, const T (&saved)[kSaved], const T (&state)[2],
                                     const T (&new_state)[2], const T (&grad_new_state)[2], T (&grad_pre)[kPre + kUnit],
                                     T (&grad_state)[2]) {
    const T normed = given.inner.of(new_state[1]), y = squashed(given, normed), &o = saved[LstmCell::O];
    const T values[kGates] = {saved[0], saved[1], saved[2], saved[3]}, of_c[2] = {T(0), grad_new_state[1]};
    T gates[kGates];
    LstmCell::backward(values, state, new_state, of_c, gates, grad_state);
    gates[LstmCell::O] = grad_new_state[0] * y * o * (T(1) - o);
    for (int g = 0; g < kGates; ++g) {
      grad_pre[g] = gates[g];
      grad_pre[h_pre(g)] = gates[g] * given.unit[g];
      grad_pre[kPre + g] = gates[g] * given.products.of(saved[kGates + g]);
    }
    grad_pre[kPre + kShiftOut] = grad_new_state[0] * o * (T(1) - y * y);
    grad_pre[kPre + kGainOut] = grad_pre[kPre + kShiftOut] * normed;
  }
};

}  // namespace fusedrnn
