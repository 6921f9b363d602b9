// The LSTM with exponential gates and a stabiliser: states h (0), c (1), the normaliser n (2), and m (3), the logarithm by which c
// and n are scaled down, so that exp overflows nowhere. Gates in torch's order i, f, g, o:
//   m' = max(log sigmoid(f) + m, i), and i where n = 0;   i' = exp(i - m'),   f' = exp(log sigmoid(f) + m - m')
//   c' = f' c + i' tanh(g),   n' = f' n + i',   h' = sigmoid(o) c' / n'.
// Source: Beck and others, "xLSTM: extended long short-term memory", arXiv:2405.04517 (2024), with the sigmoid as its forget gate.
#pragma once
#include "cell.h"

namespace fusedrnn {

struct SlstmCell : PlainCell {
  static constexpr const char* kName = "slstm";
  enum Gate { I, F, G, O };
  static constexpr int kGates = 4, kPre = 4, kStates = 4, kSaved = 5, kNormaliser = 2;
  FUSEDRNN_CELL static constexpr int x_pre(int gate) { return gate; }
  FUSEDRNN_CELL static constexpr int h_pre(int gate) { return gate; }

  template <class T>
  FUSEDRNN_CELL static void forward(const T (&pre)[4], const T (&state)[4], T (&new_state)[4], T (&saved)[5]) {
    const T &c = state[1], &n = state[2], &m = state[3];
    const T from_past = log_sigmoid(pre[F]) + m;
    const T new_m = where_zero(n, pre[I], greater_of(from_past, pre[I]));
    const T i = exp_of_negative(pre[I] - new_m), f = where_zero(n, T(0), exp_of_negative(from_past - new_m));
    const T g = tanh(pre[G]), o = sigmoid(pre[O]);
    new_state[1] = f * c + i * g;
    new_state[2] = f * n + i;
    new_state[3] = new_m;
    new_state[0] = o * (new_state[1] / new_state[2]);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
    saved[4] = sigmoid(pre[F]);
  }

  // That of m goes to whichever of the two it was the larger one of: the other's exponential is below 1.
  template <class T>
  FUSEDRNN_CELL static void backward(const T (&saved)[5], const T (&state)[4], const T (&new_state)[4], const T (&grad_new_state)[4],
                                     T (&grad_pre)[4], T (&grad_state)[4]) {
    const T &i = saved[0], &f = saved[1], &g = saved[2], &o = saved[3], ratio = new_state[1] / new_state[2];
    const T through_h = grad_new_state[0] * o / new_state[2];
    const T dc = grad_new_state[1] + through_h, dn = grad_new_state[2] - through_h * ratio;
    const T di = (dc * g + dn) * i, df = (dc * state[1] + dn * state[2]) * f;
    const T dm = grad_new_state[3] - di - df;
    const T from_past = df + where_one(f, dm, T(0));
    grad_pre[I] = di + where_one(f, T(0), dm);
    grad_pre[F] = from_past * (T(1) - saved[4]);
    grad_pre[G] = dc * i * (T(1) - g * g);
    grad_pre[O] = grad_new_state[0] * ratio * o * (T(1) - o);
    grad_state[0] = T(0);
    grad_state[1] = dc * f;
    grad_state[2] = dn * f;
    grad_state[3] = from_past;
  }
};

}  // namespace fusedrnn
