// The GRU whose reset gate multiplies before the recurrent product, with functions f of its gates and a of its candidate to choose:
//   r, z = f(W_ih x + b_ih + W_hh h + b_hh),   n = a(W_in x + b_in + W_hn (r h) + b_hn),   h' = n + z (h - n).
// Gates in the order r, z, n. So n's product waits for r: n is a late gate.
// Source: Cho et al., arXiv:1406.1078 (2014), in their own form; reset_after=False of Keras, linear_before_reset=0 of ONNX.
#pragma once
#include "cell.h"

namespace fusedrnn {

struct ResetBeforeGruCell : PlainCell {
  static constexpr const char* kName = "gru_reset_before";
  enum Gate { R, Z, N };
  static constexpr int kGates = 3, kPre = 3, kStates = 1, kSaved = 4, kLate = 1;
  static constexpr int kMiddle = 3;  // of what is saved
  static constexpr bool kChooses = true;
  FUSEDRNN_CELL static constexpr int x_pre(int gate) { return gate; }
  FUSEDRNN_CELL static constexpr int h_pre(int gate) { return gate; }

  template <class T>
  FUSEDRNN_CELL static T middle(const Given<T, 0>& given, const T (&pre)[3], const T (&state)[1]) {
    return gate_of(given.choice, pre[R]) * (state[0] * given.mask);
  }

  template <class T>
  FUSEDRNN_CELL static void forward(const Given<T, 0>& given, const T (&pre)[3], const T (&state)[1], T (&new_state)[1],
                                    T (&saved)[4]) {
    const T z = gate_of(given.choice, pre[Z]), n = value_of(given.choice.candidate, pre[N]);
    new_state[0] = n + z * (state[0] - n);
    saved[R] = gate_of(given.choice, pre[R]);
    saved[Z] = z;
    saved[N] = n;
    saved[kMiddle] = middle(given, pre, state);
  }

  template <class T>
  FUSEDRNN_CELL static T late_backward(const Given<T, 0>& given, const T (&saved)[4], const T (&)[1], const T (&grad_new_state)[1]) {
    return value_grad(given.choice.candidate, saved[N], grad_new_state[0] * (T(1) - saved[Z]));
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const Given<T, 0>& given, const T (&saved)[4], const T (&state)[1], const T (&)[1],
                                     const T (&grad_new_state)[1], T (&grad_pre)[3], T (&grad_state)[1]) {
    const T &r = saved[R], &z = saved[Z], &n = saved[N], fed = given.middle * given.mask;
    grad_pre[R] = gate_grad(given.choice, r, fed * state[0]);
    grad_pre[Z] = gate_grad(given.choice, z, grad_new_state[0] * (state[0] - n));
    grad_pre[N] = late_backward(given, saved, state, grad_new_state);
    grad_state[0] = grad_new_state[0] * z + fed * r;
  }
};

}  // namespace fusedrnn
