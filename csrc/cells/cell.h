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
// and, where they are not as PlainCell has them,
//   kUnit        numbers that each unit has of its own, at all steps the same, such as peepholes
//   kChooses     whether a call chooses among functions (Choice)
//   kMultiplies  whether there is a weight_hh that multiplies the hidden state
//   kNormaliser  the state that others are divided by, and that is never negative, if not 0
//   kNorms       what of a step is normalised over the units: nothing (0), the products (1), or also state 1 on its way out (2)
//   kLate        how many gates, the last ones, are multiplied with what the cell's `middle` makes instead of h (0 or 1)
// A cell with one of the first two takes `given`, which has both, as the first argument of forward and backward, and leaves the
// gradients of its own numbers behind those of the pre-activations.
//
// Normalised (kNorms): an engine takes the mean and the variance of a row and hands them on in `given`. Forward sees the products and
// normalises them; backward leaves, in the places of h_pre, the gradients of the normalised ones, which the engine takes further.
// What is normalised on its way out has functions of its own besides,
//   out          (given, saved, new_state) -> state 0, which forward then leaves alone
//   out_backward (given, saved, new_state, grad_new_state) -> the gradient of the normalised state 1
// from which the engine makes that of the state and adds it to grad_new_state[1] before it calls backward.
//
// Late (kLate): two more functions,
//   middle        (given, pre, state) -> what the late gate multiplies; of pre only what belongs to the other gates is there
//   late_backward (given, saved, state, grad_new_state) -> the gradient of the late gate's pre-activation
// and given.middle is, in backward, the gradient of what `middle` made.
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

struct PlainCell {
  static constexpr int kUnit = 0, kNormaliser = 0, kNorms = 0, kLate = 0;
  static constexpr bool kChooses = false, kMultiplies = true;
};

// The functions that a call may choose. Each follows from its value what its slope is.
enum class Function : int { kSigmoid, kHardSigmoid, kHardSigmoidOfFifths, kTanh, kRelu, kIdentity };

// What a call chooses of a cell that has a choice: the function of the gates, that of what they let in, that of what goes out; and how
// far an inner state may go from zero, if not 0.
struct Choice {
  Function gate = Function::kSigmoid, candidate = Function::kTanh, output = Function::kTanh;
  double clip = 0;
};

// Layer normalisation, Ba, Kiros and Hinton, arXiv:1607.06450 (2016): what brings the numbers of a row to mean 0 and variance 1.
constexpr double kNormEpsilon = 1e-5;  // added to the variance, as torch.nn.LayerNorm does
template <class T>
struct Norm {
  T mean, scale;
  FUSEDRNN_CELL T of(const T& x) const { return (x - mean) * scale; }
  // The gradient of x from that of y = of(x). Over the row, the means of the gradients, and of each times its y.
  FUSEDRNN_CELL T grad(const T& grad_y, const T& y, const T& mean_grad, const T& mean_grad_y) const {
    return scale * (grad_y - mean_grad - y * mean_grad_y);
  }
};

template <class T, int kUnit>
struct Given {
  Choice choice;
  T unit[kUnit > 0 ? kUnit : 1];
  Norm<T> products, inner;  // of kNorms: of the row's products, and of its state 1
  T mask, middle;           // of kLate: what h is multiplied by where a product takes it; see above
};

// How many gradients a cell's backward gives for a unit: of pre-activations, then of its own numbers.
template <class Cell>
constexpr int kGrads = Cell::kPre + Cell::kUnit;

// Whether a cell asks of an engine no more than torch's cells do.
template <class Cell>
constexpr bool is_of_torch = Cell::kUnit == 0 && !Cell::kChooses && Cell::kMultiplies && Cell::kStates <= 2 && Cell::kNorms == 0;

// Whether its units may be in heads, whose hidden states are multiplied each by themselves.
template <class Cell>
constexpr bool may_have_heads = Cell::kMultiplies && Cell::kNorms == 0;

// Whether a step is one product and what follows from it for each unit by itself, as kernels that go through all steps have it.
template <class Cell>
constexpr bool is_of_one_product = Cell::kMultiplies && Cell::kNorms == 0 && Cell::kLate == 0;

// Whether its hidden state may be projected.
template <class Cell>
constexpr bool can_project = is_of_torch<Cell> && Cell::kStates == 2;

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

FUSEDRNN_CELL float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
FUSEDRNN_CELL double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }
// grad where low < y < high, else 0.
FUSEDRNN_CELL float clamp_grad(float y, float low, float high, float grad) { return y <= low || y >= high ? 0.0f : grad; }
FUSEDRNN_CELL double clamp_grad(double y, double low, double high, double grad) { return y <= low || y >= high ? 0.0 : grad; }

// Of the normalised cell. exp_of_negative: of what is not above 0. greater_of gives a NaN if one of them is.
FUSEDRNN_CELL float log_sigmoid(float x) { return (x < 0.0f ? x : 0.0f) - ::log1pf(::expf(-::fabsf(x))); }
FUSEDRNN_CELL double log_sigmoid(double x) { return (x < 0.0 ? x : 0.0) - ::log1p(::exp(-::fabs(x))); }
FUSEDRNN_CELL float exp_of_negative(float x) { return ::expf(x); }
FUSEDRNN_CELL double exp_of_negative(double x) { return ::exp(x); }
FUSEDRNN_CELL float greater_of(float a, float b) { return a != a || a > b ? a : b; }
FUSEDRNN_CELL double greater_of(double a, double b) { return a != a || a > b ? a : b; }
FUSEDRNN_CELL float where_zero(float x, float yes, float no) { return x == 0.0f ? yes : no; }
FUSEDRNN_CELL double where_zero(double x, double yes, double no) { return x == 0.0 ? yes : no; }
FUSEDRNN_CELL float where_one(float x, float yes, float no) { return x == 1.0f ? yes : no; }
FUSEDRNN_CELL double where_one(double x, double yes, double no) { return x == 1.0 ? yes : no; }

// A hard sigmoid's slope: a sixth as in torch and Keras 3, a fifth as in ONNX and Keras before.
FUSEDRNN_CELL constexpr double hard_slope(Function function) { return function == Function::kHardSigmoid ? 1.0 / 6 : 0.2; }

// Of a gate, and its gradient from its value y.
template <class T>
FUSEDRNN_CELL T gate_of(const Choice& choice, const T& x) {
  if (choice.gate == Function::kSigmoid) return sigmoid(x);
  return clamp(x * T(hard_slope(choice.gate)) + T(0.5), T(0), T(1));
}
template <class T>
FUSEDRNN_CELL T gate_grad(const Choice& choice, const T& y, const T& grad) {
  if (choice.gate == Function::kSigmoid) return grad * y * (T(1) - y);
  return clamp_grad(y, T(0), T(1), grad * T(hard_slope(choice.gate)));
}

// Of a candidate or an output, and its gradient from its value y.
template <class T>
FUSEDRNN_CELL T value_of(Function function, const T& x) {
  return function == Function::kTanh ? tanh(x) : function == Function::kRelu ? relu(x) : x;
}
template <class T>
FUSEDRNN_CELL T value_grad(Function function, const T& y, const T& grad) {
  return function == Function::kTanh ? grad * (T(1) - y * y) : function == Function::kRelu ? relu_grad(y, grad) : grad;
}

// Of an inner state that may not go further than choice.clip.
template <class T>
FUSEDRNN_CELL T clip_of(const Choice& choice, const T& x) {
  return choice.clip > 0 ? clamp(x, T(-choice.clip), T(choice.clip)) : x;
}
template <class T>
FUSEDRNN_CELL T clip_grad(const Choice& choice, const T& y, const T& grad) {
  return choice.clip > 0 ? clamp_grad(y, T(-choice.clip), T(choice.clip), grad) : grad;
}

// Zoneout, Krueger and others, arXiv:1606.01305 (2016): of a state, the part z stays what it was. Either all of it or nothing while
// training, and then exactly; and otherwise the probability of that.
template <class T>
FUSEDRNN_CELL T zoneout(const T& z, const T& state, const T& fresh) { return z * state + (T(1) - z) * fresh; }

// A cell's functions as an engine calls them, with what is given to those that take it. The first is `forward` without what is
// normalised on its way out, for which all units' state 1 must be there.
template <class Cell, class T, class... Arguments>
FUSEDRNN_CELL void cell_until_out(const Given<T, Cell::kUnit>& given, Arguments&... arguments) {
  if constexpr (Cell::kUnit > 0 || Cell::kChooses) Cell::forward(given, arguments...);
  else Cell::forward(arguments...);
}
template <class Cell, class T>
FUSEDRNN_CELL void cell_forward(const Given<T, Cell::kUnit>& given, const T (&pre)[Cell::kPre], const T (&state)[Cell::kStates],
                                T (&new_state)[Cell::kStates], T (&saved)[slots(Cell::kSaved)]) {
  cell_until_out<Cell>(given, pre, state, new_state, saved);
  if constexpr (Cell::kNorms == 2) new_state[0] = Cell::out(given, saved, new_state);
}
template <class Cell, class T, class... Arguments>
FUSEDRNN_CELL void cell_backward(const Given<T, Cell::kUnit>& given, Arguments&... arguments) {
  if constexpr (Cell::kUnit > 0 || Cell::kChooses) Cell::backward(given, arguments...);
  else Cell::backward(arguments...);
}

}  // namespace fusedrnn
