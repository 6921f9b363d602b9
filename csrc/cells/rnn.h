// The Elman cell, h' = act(W_ih x + b_ih + W_hh h + b_hh), with act = tanh or relu.
// Source: Elman, "Finding structure in time", Cognitive Science 14 (1990); the form of torch.nn.RNN.
#pragma once
#include "cell.h"

namespace fusedrnn {

struct RnnTanhCell : PlainCell {
  static constexpr const char* kName = "rnn_tanh";
  static constexpr int kGates = 1, kPre = 1, kStates = 1, kSaved = 0;
  FUSEDRNN_CELL static constexpr int x_pre(int) { return 0; }
  FUSEDRNN_CELL static constexpr int h_pre(int) { return 0; }

  template <class T>
  FUSEDRNN_CELL static void forward(const T (&pre)[1], const T (&)[1], T (&new_state)[1], T (&)[1]) {
    new_state[0] = tanh(pre[0]);
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const T (&)[1], const T (&)[1], const T (&new_state)[1], const T (&grad_new_state)[1],
                                     T (&grad_pre)[1], T (&grad_state)[1]) {
    grad_pre[0] = grad_new_state[0] * (T(1) - new_state[0] * new_state[0]);
    grad_state[0] = T(0);
  }
};

struct RnnReluCell : PlainCell {
  static constexpr const char* kName = "rnn_relu";
  static constexpr int kGates = 1, kPre = 1, kStates = 1, kSaved = 0;
  FUSEDRNN_CELL static constexpr int x_pre(int) { return 0; }
  FUSEDRNN_CELL static constexpr int h_pre(int) { return 0; }

  template <class T>
  FUSEDRNN_CELL static void forward(const T (&pre)[1], const T (&)[1], T (&new_state)[1], T (&)[1]) {
    new_state[0] = relu(pre[0]);
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const T (&)[1], const T (&)[1], const T (&new_state)[1], const T (&grad_new_state)[1],
                                     T (&grad_pre)[1], T (&grad_state)[1]) {
    grad_pre[0] = relu_grad(new_state[0], grad_new_state[0]);
    grad_state[0] = T(0);
  }
};

}  // namespace fusedrnn
