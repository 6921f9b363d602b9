// What a recurrent cell is: the arithmetic of one hidden unit at one time step. A cell belongs to no device and to no
// vector width: every engine calls these very functions with its own number type T (float, double, a SIMD vector, a
// dual number in the tests), so a formula stands once in the project.
//
// A cell is a struct with
//   kName        the name under which the operators know it
//   kGates       rows of weight_ih and weight_hh per hidden unit (G)
//   kPre         pre-activations per unit; more than kGates where a gate keeps its input and its recurrent half apart
//   kStates      state 0 is the hidden state, the one that is multiplied by weight_hh; the others stay with the unit
//   kSaved       numbers the backward step needs besides the states
//   x_pre(gate)  which pre-activation the input half of a gate adds to
//   h_pre(gate)  which pre-activation the recurrent half of a gate adds to
//   forward      (pre, state) -> (new_state, saved)
//   backward     (saved, state, new_state, grad_new_state) -> (grad_pre, grad_state), where grad_state holds only what
//                flows past the pre-activations; the engine adds the product of grad_pre and weight_hh
#pragma once
#include <cmath>

#if defined(__CUDACC__)
#define FUSEDRNN_CELL __host__ __device__ __forceinline__
#else
#define FUSEDRNN_CELL inline __attribute__((always_inline))
#endif

namespace fusedrnn {

// C++ has no arrays of length zero: a cell that saves nothing is handed one unused slot.
FUSEDRNN_CELL constexpr int slots(int count) { return count > 0 ? count : 1; }

// The scalar forms. exp overflows to infinity and 1 / infinity is 0, so both ends saturate without a NaN.
FUSEDRNN_CELL float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
FUSEDRNN_CELL double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
FUSEDRNN_CELL float tanh(float x) { return ::tanhf(x); }
FUSEDRNN_CELL double tanh(double x) { return ::tanh(x); }

// relu and its gradient from the output y, written so that a NaN passes through, as in torch.
FUSEDRNN_CELL float relu(float x) { return x < 0.0f ? 0.0f : x; }
FUSEDRNN_CELL double relu(double x) { return x < 0.0 ? 0.0 : x; }
FUSEDRNN_CELL float relu_grad(float y, float grad) { return y <= 0.0f ? 0.0f : grad; }
FUSEDRNN_CELL double relu_grad(double y, double grad) { return y <= 0.0 ? 0.0 : grad; }

// Zoneout, Krueger and others, arXiv:1606.01305 (2016): of a state, the part z stays what it was. Either all of it or nothing while
// training, and then exactly; and otherwise the probability of that.
template <class T>
FUSEDRNN_CELL T zoneout(const T& z, const T& state, const T& fresh) { return z * state + (T(1) - z) * fresh; }

}  // namespace fusedrnn
