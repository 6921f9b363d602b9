// The GRU whose recurrent products, all gates of a row together, are normalised (N):
//   r, z = sigmoid(x half + gain N(W_hh h)),   n = tanh(x half + r (gain_n N(W_hn h) + shift_n)),   h' = n + z (h - n).
// Gates in the order r, z, n; the unit's own numbers: their gains, then shift_n. What r and z are shifted by comes with the input's
// half.
// Source: Ba, Kiros and Hinton, "Layer normalization", arXiv:1607.06450 (2016), for the GRU of torch.nn.
#pragma once
#include "gru.h"

namespace fusedrnn {

struct NormGruCell : PlainCell {
  static constexpr const char* kName = "gru_norm";
  static constexpr int kGates = 3, kPre = 6, kStates = 1, kSaved = 7, kUnit = 4, kNorms = 1;
  static constexpr int kShift = 3;         // of the unit's numbers
  static constexpr int kValues = 4;        // that the GRU saves; the products lie behind them
  FUSEDRNN_CELL static constexpr int x_pre(int gate) { return gate; }
  FUSEDRNN_CELL static constexpr int h_pre(int gate) { return kGates + gate; }

  template <class T>
  FUSEDRNN_CELL static void forward(const Given<T, kUnit>& given, const T (&pre)[kPre], const T (&state)[1], T (&new_state)[1],
                                    T (&saved)[kSaved]) {
    T normed[kGates], values[kValues];
    for (int g = 0; g < kGates; ++g) {
      saved[kValues + g] = pre[h_pre(g)];
      normed[g] = given.unit[g] * given.products.of(pre[h_pre(g)]);
    }
    const T gates[GruCell::kPre] = {pre[0] + normed[0], pre[1] + normed[1], pre[2], normed[2] + given.unit[kShift]};
    GruCell::forward(gates, state, new_state, values);
    for (int k = 0; k < kValues; ++k) saved[k] = values[k];
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const Given<T, kUnit>& given, const T (&saved)[kSaved], const T (&state)[1],
                                     const T (&new_state)[1], const T (&grad_new_state)[1], T (&grad_pre)[kPre + kUnit],
                                     T (&grad_state)[1]) {
    const T values[kValues] = {saved[0], saved[1], saved[2], saved[3]};
    T gates[GruCell::kPre];
    GruCell::backward(values, state, new_state, grad_new_state, gates, grad_state);
    for (int g = 0; g < kGates; ++g) {
      const T& grad = gates[GruCell::h_pre(g)];
      grad_pre[g] = gates[GruCell::x_pre(g)];
      grad_pre[h_pre(g)] = grad * given.unit[g];
      grad_pre[kPre + g] = grad * given.products.of(saved[kValues + g]);
    }
    grad_pre[kPre + kShift] = gates[GruCell::NH];
  }
};

}  // namespace fusedrnn
