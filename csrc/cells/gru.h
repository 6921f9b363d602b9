// Gated recurrent unit, gates in torch's order r, z, n; the reset gate acts after the recurrent product, so the two
// halves of the candidate, n_x = W_in x + b_in and n_h = W_hn h + b_hn, are pre-activations of their own:
//   n = tanh(n_x + sigmoid(r) n_h),   h' = n + sigmoid(z) (h - n).
// Source: Cho et al., arXiv:1406.1078 (2014), in the form of torch.nn.GRU and cuDNN.
#pragma once
#include "cell.h"

namespace fusedrnn {

struct GruCell : PlainCell {
  static constexpr const char* kName = "gru";
  enum Pre { R, Z, NX, NH };
  static constexpr int kGates = 3, kPre = 4, kStates = 1, kSaved = 4;
  FUSEDRNN_CELL static constexpr int x_pre(int gate) { return gate; }
  FUSEDRNN_CELL static constexpr int h_pre(int gate) { return gate == 2 ? NH : gate; }

  template <class T>
  FUSEDRNN_CELL static void forward(const T (&pre)[4], const T (&state)[1], T (&new_state)[1], T (&saved)[4]) {
    const T r = sigmoid(pre[R]), z = sigmoid(pre[Z]), n = tanh(pre[NX] + r * pre[NH]);
    new_state[0] = n + z * (state[0] - n);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = pre[NH];
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const T (&saved)[4], const T (&state)[1], const T (&)[1],
                                     const T (&grad_new_state)[1], T (&grad_pre)[4], T (&grad_state)[1]) {
    const T r = saved[0], z = saved[1], n = saved[2], n_h = saved[3];
    const T dn = grad_new_state[0] * (T(1) - z) * (T(1) - n * n);
    grad_pre[R] = dn * n_h * r * (T(1) - r);
    grad_pre[Z] = grad_new_state[0] * (state[0] - n) * z * (T(1) - z);
    grad_pre[NX] = dn;
    grad_pre[NH] = dn * r;
    grad_state[0] = grad_new_state[0] * z;
  }
};

}  // namespace fusedrnn
