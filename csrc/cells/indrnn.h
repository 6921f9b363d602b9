// The independently recurrent network: each unit has one recurrent weight u, to itself alone,
//   h' = f(W_ih x + b_ih + b_hh + u h),   f = tanh, relu or nothing.
// Source: Li and others, "Independently recurrent neural network (IndRNN)", arXiv:1803.04831 (2018).
#pragma once
#include "cell.h"

namespace fusedrnn {

struct IndRnnCell : PlainCell {
  static constexpr const char* kName = "indrnn";
  static constexpr int kGates = 1, kPre = 1, kStates = 1, kSaved = 0, kUnit = 1;
  static constexpr bool kChooses = true, kMultiplies = false;
  FUSEDRNN_CELL static constexpr int x_pre(int) { return 0; }
  FUSEDRNN_CELL static constexpr int h_pre(int) { return 0; }

  template <class T>
  FUSEDRNN_CELL static void forward(const Given<T, 1>& given, const T (&pre)[1], const T (&state)[1], T (&new_state)[1], T (&)[1]) {
    new_state[0] = value_of(given.choice.output, pre[0] + given.unit[0] * state[0]);
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const Given<T, 1>& given, const T (&)[1], const T (&state)[1], const T (&new_state)[1],
                                     const T (&grad_new_state)[1], T (&grad_pre)[2], T (&grad_state)[1]) {
    grad_pre[0] = value_grad(given.choice.output, new_state[0], grad_new_state[0]);
    grad_pre[1] = grad_pre[0] * state[0];
    grad_state[0] = grad_pre[0] * given.unit[0];
  }
};

}  // namespace fusedrnn
