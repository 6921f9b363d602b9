// The LSTM with all that is chosen or added elsewhere: other functions f of the gates, a of the candidate and b of what goes out,
// peepholes p from the cell state to the gates, a limit to the cell state, and instead of a forget gate what the input gate leaves:
//   i = f(i + p_i c), f = f(f + p_f c) or 1 - i,   c' = clip(f c + i a(g)),   o = f(o + p_o c'),   h' = o b(c').
// Gates in the order i, f, g, o, coupled i, g, o; the unit's own numbers p_i, p_f, p_o, coupled p_i, p_o. States h (0) and c (1).
// Source: peepholes: Gers, Schraudolph and Schmidhuber, "Learning precise timing with LSTM recurrent networks" (2002); coupled
// gates: Greff and others, arXiv:1503.04069 (2015); the limit: Sak, Senior and Beaufays, arXiv:1402.1128 (2014).
#pragma once
#include "cell.h"

namespace fusedrnn {

template <bool kCoupled>
struct GeneralLstmCell : PlainCell {
  static constexpr const char* kName = kCoupled ? "lstm_coupled" : "lstm_general";
  static constexpr int I = 0, F = 1, G = kCoupled ? 1 : 2, O = G + 1;           // of gates
  static constexpr int kToI = 0, kToF = 1, kToO = kCoupled ? 1 : 2;             // of peepholes
  static constexpr int kGates = O + 1, kPre = kGates, kStates = 2, kSaved = kGates, kUnit = kToO + 1;
  static constexpr bool kChooses = true;
  FUSEDRNN_CELL static constexpr int x_pre(int gate) { return gate; }
  FUSEDRNN_CELL static constexpr int h_pre(int gate) { return gate; }

  template <class T>
  FUSEDRNN_CELL static void forward(const Given<T, kUnit>& given, const T (&pre)[kPre], const T (&state)[2], T (&new_state)[2],
                                    T (&saved)[kSaved]) {
    const T& c = state[1];
    const T i = gate_of(given.choice, pre[I] + given.unit[kToI] * c), g = value_of(given.choice.candidate, pre[G]);
    T f;
    if constexpr (kCoupled) f = T(1) - i;
    else saved[F] = f = gate_of(given.choice, pre[F] + given.unit[kToF] * c);
    new_state[1] = clip_of(given.choice, f * c + i * g);
    const T o = gate_of(given.choice, pre[O] + given.unit[kToO] * new_state[1]);
    new_state[0] = o * value_of(given.choice.output, new_state[1]);
    saved[I] = i;
    saved[G] = g;
    saved[O] = o;
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const Given<T, kUnit>& given, const T (&saved)[kSaved], const T (&state)[2],
                                     const T (&new_state)[2], const T (&grad_new_state)[2], T (&grad_pre)[kPre + kUnit],
                                     T (&grad_state)[2]) {
    const T &i = saved[I], &g = saved[G], &o = saved[O], &c = state[1], &new_c = new_state[1];
    const T y = value_of(given.choice.output, new_c);
    grad_pre[O] = gate_grad(given.choice, o, grad_new_state[0] * y);
    const T dc = clip_grad(given.choice, new_c,
                           grad_new_state[1] + value_grad(given.choice.output, y, grad_new_state[0] * o) + grad_pre[O] * given.unit[kToO]);
    grad_pre[G] = value_grad(given.choice.candidate, g, dc * i);
    if constexpr (kCoupled) {
      grad_pre[I] = gate_grad(given.choice, i, dc * (g - c));
      grad_state[1] = dc * (T(1) - i) + grad_pre[I] * given.unit[kToI];
    } else {
      grad_pre[I] = gate_grad(given.choice, i, dc * g);
      grad_pre[F] = gate_grad(given.choice, saved[F], dc * c);
      grad_state[1] = dc * saved[F] + grad_pre[I] * given.unit[kToI] + grad_pre[F] * given.unit[kToF];
      grad_pre[kPre + kToF] = grad_pre[F] * c;
    }
    grad_pre[kPre + kToI] = grad_pre[I] * c;
    grad_pre[kPre + kToO] = grad_pre[O] * new_c;
    grad_state[0] = T(0);
  }
};

}  // namespace fusedrnn
