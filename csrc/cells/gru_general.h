// The GRU of gru.h with other functions f of the gates and a of the candidate:
//   r = f(r), z = f(z),   n = a(n_x + r n_h),   h' = n + z (h - n).
// Source: as gru.h; the functions are those that Keras and ONNX let one choose.
#pragma once
#include "gru.h"

namespace fusedrnn {

struct GeneralGruCell : GruCell {  // gates, pre-activations and what is saved are the same
  static constexpr const char* kName = "gru_general";
  static constexpr bool kChooses = true;

  template <class T>
  FUSEDRNN_CELL static void forward(const Given<T, 0>& given, const T (&pre)[4], const T (&state)[1], T (&new_state)[1],
                                    T (&saved)[4]) {
    const T r = gate_of(given.choice, pre[R]), z = gate_of(given.choice, pre[Z]);
    const T n = value_of(given.choice.candidate, pre[NX] + r * pre[NH]);
    new_state[0] = n + z * (state[0] - n);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = pre[NH];
  }

  template <class T>
  FUSEDRNN_CELL static void backward(const Given<T, 0>& given, const T (&saved)[4], const T (&state)[1], const T (&)[1],
                                     const T (&grad_new_state)[1], T (&grad_pre)[4], T (&grad_state)[1]) {
    const T &r = saved[0], &z = saved[1], &n = saved[2], &n_h = saved[3];
    const T dn = value_grad(given.choice.candidate, n, grad_new_state[0] * (T(1) - z));
    grad_pre[R] = gate_grad(given.choice, r, dn * n_h);
    grad_pre[Z] = gate_grad(given.choice, z, grad_new_state[0] * (state[0] - n));
    grad_pre[NX] = dn;
    grad_pre[NH] = dn * r;
    grad_state[0] = grad_new_state[0] * z;
  }
};

}  // namespace fusedrnn
