// Long short-term memory with a forget gate, gates in torch's order i, f, g, o; states h (0) and c (1):
//   c' = sigmoid(f) c + sigmoid(i) tanh(g),   h' = sigmoid(o) tanh(c').
// Source: Hochreiter and Schmidhuber (1997), Gers, Schmidhuber and Cummins (2000); the form of torch.nn.LSTM.
#pragma once
#include "cell.h"

namespace fusedrnn {

struct LstmCell : PlainCell {
  static constexpr const char* kName = "lstm";
  enum Gate { I, F, G, O };
  static constexpr int kGates = 4, kPre = 4, kStates = 2, kSaved = 4;
  FUSEDRNN_CELL static constexpr int x_pre(int gate) { return gate; }
  FUSEDRNN_CELL static constexpr int h_pre(int gate) { return gate; }

  template <class T>
  FUSEDRNN_CELL static void forward(const T (&pre)[4], const T (&state)[2], T (&new_state)[2], T (&saved)[4]) {
    const T i = sigmoid(pre[I]), f = sigmoid(pre[F]), g = tanh(pre[G]), o = sigmoid(pre[O]);
    const T c = f * state[1] + i * g;
    new_state[0] = o * tanh(c);
    new_state[1] = c;
    saved[I] = i;
    saved[F] = f;
    saved[G] = g;
    saved[O] = o;
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const T (&saved)[4], const T (&state)[2], const T (&new_state)[2],
                                     const T (&grad_new_state)[2], T (&grad_pre)[4], T (&grad_state)[2]) {
    const T i = saved[I], f = saved[F], g = saved[G], o = saved[O], tanh_c = tanh(new_state[1]);
    const T dc = grad_new_state[1] + grad_new_state[0] * o * (T(1) - tanh_c * tanh_c);
    grad_pre[I] = dc * g * i * (T(1) - i);
    grad_pre[F] = dc * state[1] * f * (T(1) - f);
    grad_pre[G] = dc * i * (T(1) - g * g);
    grad_pre[O] = grad_new_state[0] * tanh_c * o * (T(1) - o);
    grad_state[0] = T(0);
    grad_state[1] = dc * f;
  }
};

}  // namespace fusedrnn
