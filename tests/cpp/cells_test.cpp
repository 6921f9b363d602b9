// Proves the cells of csrc/cells: that each backward is the derivative of its forward (dual numbers, to rounding), that
// float agrees with double, that pre-activations of 1e30 give no NaN in either direction, and that a NaN is never lost.
// What a row is normalised by has mean 0 and scale 1 here: then what a cell leaves of the normalised numbers is of the numbers.
//
//   cells_test               all of it
//   cells_test --plant N     the derivatives, the N-th of all cells wrong by 1e-6: must fail; exits 2 past the last
#include <algorithm>
#include <cfloat>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "cells/cells.h"
#include "check.h"
#include "dual.h"

namespace {

using fusedrnn::slots;
using test::Dual;
using test::Random;

// A cell whose backward can be made wrong: derivative number `wrong`, of the pre-activations, of the unit's own numbers, and then of
// the states.
template <class Cell>
struct Plantable : Cell {
  static inline int wrong = -1;
};

// All that goes into and comes out of one step of one unit.
template <class Cell, class T>
struct Step {
  static constexpr int kNumbers = fusedrnn::kGrads<Cell>, kInputs = kNumbers + Cell::kStates;
  fusedrnn::Given<T, Cell::kUnit> given;
  T pre[Cell::kPre], state[Cell::kStates], new_state[Cell::kStates], saved[slots(Cell::kSaved)] = {};
  T grad_new[Cell::kStates], grad_pre[kNumbers], grad_state[Cell::kStates];

  Step() {
    given.products = given.inner = {T(0), T(1)};
    given.mask = given.middle = T(1);
  }
  T& input(int i) { return i < Cell::kPre ? pre[i] : i < kNumbers ? given.unit[i - Cell::kPre] : state[i - kNumbers]; }
  T& grad_input(int i) { return i < kNumbers ? grad_pre[i] : grad_state[i - kNumbers]; }
  void forward() { fusedrnn::cell_forward<Cell>(given, pre, state, new_state, saved); }
  // What the late gate multiplies, of a cell that has one.
  T middle() {
    if constexpr (Cell::kLate > 0) return Cell::middle(given, pre, state);
    else return T(0);
  }
  void backward() {
    T grads[Cell::kStates];
    for (int j = 0; j < Cell::kStates; ++j) grads[j] = grad_new[j];
    if constexpr (Cell::kNorms == 2) grads[1] = grads[1] + Cell::out_backward(given, saved, new_state, grads);
    fusedrnn::cell_backward<Cell>(given, saved, state, new_state, grads, grad_pre, grad_state);
    if (Cell::wrong >= 0 && Cell::wrong < kInputs) grad_input(Cell::wrong) = grad_input(Cell::wrong) + T(1e-6);
  }

  // The same inputs in another number type.
  template <class U>
  Step<Cell, U> as() {
    Step<Cell, U> other;
    other.given.choice = given.choice;
    other.given.mask = U(given.mask), other.given.middle = U(given.middle);
    for (int i = 0; i < kInputs; ++i) other.input(i) = U(input(i));
    for (int j = 0; j < Cell::kStates; ++j) other.grad_new[j] = U(grad_new[j]);
    return other;
  }
};

fusedrnn::Choice random_choice(Random& random) {
  auto function = [&](int first) { return fusedrnn::Function(first + random.below(3)); };
  return {function(0), function(3), function(3), random.below(2) ? 0.0 : 0.7};
}

template <class Cell>
Step<Cell, double> random_step(Random& random) {
  Step<Cell, double> step;
  for (int i = 0; i < step.kInputs; ++i) {
    double& x = step.input(i) = random.uniform(-3, 3);
    if (std::fabs(x) < 1e-3) x = 1e-3;  // relu has no derivative at 0
  }
  if (Cell::kChooses) step.given.choice = random_choice(random);
  if (Cell::kNormaliser) step.state[Cell::kNormaliser] = random.uniform(0.5, 2);
  for (double& grad : step.grad_new) grad = random.uniform(-1, 1);
  if (Cell::kLate) step.given.mask = random.uniform(0, 2), step.given.middle = random.uniform(-1, 1);
  return step;
}

// The derivative of new state j with respect to input i; or, behind the last state, of what the late gate multiplies.
template <class Cell>
double slope(Step<Cell, double> step, int i, int j) {
  Step<Cell, Dual> dual = step.template as<Dual>();
  dual.input(i).slope = 1;
  dual.forward();
  return j < Cell::kStates ? dual.new_state[j].slope : dual.middle().slope;
}

template <class Cell>
void check_derivatives(Random& random) {
  for (int round = 0; round < 200; ++round) {
    Step<Cell, double> step = random_step<Cell>(random);
    step.forward();
    step.backward();
    for (int i = 0; i < step.kInputs; ++i) {
      double want = 0;
      for (int j = 0; j < Cell::kStates; ++j) want += step.grad_new[j] * slope(step, i, j);
      if (Cell::kLate) want += step.given.middle * slope(step, i, Cell::kStates);
      const double got = step.grad_input(i);
      CHECK(std::fabs(got - want) <= 1e-14, "derivative %d of %d: backward %.17g, dual numbers %.17g", i, step.kInputs, got, want);
    }
  }
}

// The gradient of the late gate, which is wanted before all others, and what that gate multiplies, which is saved for its weights.
template <class Cell>
void check_late(Random& random) {
  if constexpr (Cell::kLate > 0) {
    Step<Cell, double> step = random_step<Cell>(random);
    step.forward();
    step.backward();
    const double early = Cell::late_backward(step.given, step.saved, step.state, step.grad_new);
    const double late = step.grad_pre[Cell::h_pre(Cell::kGates - 1)];
    CHECK(early == late, "the late gate's gradient is %.17g before the others and %.17g with them", early, late);
    CHECK(step.saved[Cell::kMiddle] == step.middle(), "saved %.17g, multiplied %.17g", step.saved[Cell::kMiddle], step.middle());
  }
}

// Where a cell has states that stay with their unit, the engine does not hand state 0 to backward (it may be projected).
template <class Cell>
void check_backward_ignores_state_0(Random& random) {
  if (Cell::kStates == 1) return;
  Step<Cell, double> step = random_step<Cell>(random);
  step.forward();
  step.backward();
  Step<Cell, double> blind = step;
  blind.state[0] = blind.new_state[0] = NAN;
  blind.backward();
  for (int i = 0; i < step.kInputs; ++i)
    CHECK(blind.grad_input(i) == step.grad_input(i), "derivative %d depends on state 0", i);
}

template <class Cell>
void check_float(Random& random) {
  for (int round = 0; round < 2000; ++round) {
    Step<Cell, float> narrow = random_step<Cell>(random).template as<float>();
    Step<Cell, double> wide = narrow.template as<double>();
    narrow.forward();
    narrow.backward();
    wide.forward();
    wide.backward();
    for (int j = 0; j < Cell::kStates; ++j)
      CHECK(std::fabs(narrow.new_state[j] - wide.new_state[j]) <= 16 * double(FLT_EPSILON), "state %d: float %.9g, double %.9g",
            j, narrow.new_state[j], wide.new_state[j]);
    for (int i = 0; i < wide.kInputs; ++i)
      CHECK(std::fabs(narrow.grad_input(i) - wide.grad_input(i)) <= 16 * double(FLT_EPSILON),
            "derivative %d: float %.9g, double %.9g", i, narrow.grad_input(i), wide.grad_input(i));
  }
}

template <class Cell, class T>
void check_finite(Step<Cell, T>& step, int number) {
  step.forward();
  step.backward();
  bool finite = true;
  for (T x : step.new_state) finite = finite && std::isfinite(x);
  for (int i = 0; i < step.kInputs; ++i) finite = finite && std::isfinite(step.grad_input(i));
  CHECK(finite, "finite pre-activations (combination %d) give an infinity or a NaN", number);
}

// A cell that divides by a state: the pre-activations and the scale go anywhere, the states begin with zeros or are ordinary.
template <class Cell, class T>
void check_normalised_saturation() {
  const T values[] = {T(-1e30), T(-1000), T(-88.5), T(0.5), T(1000), T(1e30)};
  for (int n = 0; n < 2 * 6 * 6 * 6 * 6 * 6; ++n) {
    Step<Cell, T> step;
    int digits = n / 2;
    for (T& x : step.pre) x = values[digits % 6], digits /= 6;
    for (T& x : step.state) x = n % 2 ? T(0.5) : T(0);
    if (n % 2) step.state[Cell::kStates - 1] = values[digits % 6];
    for (T& grad : step.grad_new) grad = T(1);
    check_finite(step, n);
  }
}

// Every combination of these in the pre-activations, and of the last few in the states; or as many by lot.
template <class Cell, class T>
void check_saturation() {
  const T values[] = {T(-1e30), T(-1000), T(-88.5), T(1e-45), T(0.5), T(20), T(1000), T(1e30)};
  constexpr int kValues = sizeof values / sizeof *values;
  constexpr int64_t kMost = 1 << 18;
  int64_t combinations = 1;
  Random random{1};
  constexpr int kInputs = Step<Cell, T>::kInputs - Cell::kUnit;
  if (Cell::kNormaliser) return check_normalised_saturation<Cell, T>();
  for (int i = 0; i < kInputs; ++i) combinations *= kValues;
  for (int n = 0; n < std::min(combinations, kMost); ++n) {
    Step<Cell, T> step;
    int64_t digits = combinations <= kMost ? n : random.below(combinations);
    for (T& number : step.given.unit) number = T(0.5);
    for (int i = 0; i < step.kInputs; ++i)
      if (i < Cell::kPre || i >= step.kNumbers) step.input(i) = values[digits % kValues], digits /= kValues;
    for (T& grad : step.grad_new) grad = T(1);
    check_finite(step, n);
  }
}

// One input at a time is NaN, or infinite; the others are ordinary.
template <class Cell, class T>
void check_special(Random& random) {
  for (int round = 0; round < 20; ++round) {
    Step<Cell, double> base = random_step<Cell>(random);
    for (double& x : base.pre) x = std::fabs(x);  // relu's derivative is not 0 there
    if (Cell::kChooses) base.given.choice = {};     // nor cut off anywhere
    for (int i = 0; i < base.kInputs; ++i) {
      for (T special : {T(NAN), T(INFINITY), T(-INFINITY)}) {
        if (std::isinf(special) && !fusedrnn::is_of_torch<Cell>) continue;  // what has no bounds, or is divided, has no value there
        Step<Cell, T> step = base.template as<T>();
        step.input(i) = special;
        step.forward();
        for (int j = 0; j < Cell::kStates; ++j) {
          const bool depends = slope(base, i, j) != 0;
          if (Cell::kNormaliser && std::isnan(special) && !depends) continue;  // the smaller one of two, and the greater is a NaN too
          CHECK(std::isnan(step.new_state[j]) == (depends && std::isnan(special)),
                "input %d = %g gives new state %d = %g", i, double(special), j, double(step.new_state[j]));
        }
      }
    }
    for (int j = 0; j < Cell::kStates; ++j) {
      Step<Cell, T> step = base.template as<T>();
      step.grad_new[j] = T(NAN);
      step.forward();
      step.backward();
      for (int i = 0; i < step.kInputs; ++i)
        CHECK(std::isnan(step.grad_input(i)) == (slope(base, i, j) != 0), "a NaN gradient of new state %d gives %g for input %d",
              j, double(step.grad_input(i)), i);
    }
  }
}

// The maps from gates to pre-activations: no two gates share one, and none is left out.
template <class Cell>
void check_maps() {
  std::set<int> from_x, from_h, from_any;
  for (int gate = 0; gate < Cell::kGates; ++gate) {
    from_x.insert(Cell::x_pre(gate));
    from_h.insert(Cell::h_pre(gate));
  }
  from_any.insert(from_x.begin(), from_x.end());
  from_any.insert(from_h.begin(), from_h.end());
  CHECK(int(from_x.size()) == Cell::kGates && int(from_h.size()) == Cell::kGates, "two gates add to one pre-activation");
  CHECK(int(from_any.size()) == Cell::kPre && *from_any.begin() == 0 && *from_any.rbegin() == Cell::kPre - 1,
        "the gates' pre-activations are not 0 to %d", Cell::kPre - 1);
}

}  // namespace

int main(int count, char** arguments) {
  const bool plants = count == 3;
  int planted = count == 3 && std::strcmp(arguments[1], "--plant") == 0 ? std::atoi(arguments[2]) : -1;
  std::set<std::string> names;
  fusedrnn::for_each_cell([&](int id, auto cell) {
    using Cell = Plantable<decltype(cell)>;
    Cell::wrong = planted;
    planted -= Step<Cell, double>::kInputs;
    std::snprintf(test::context, sizeof test::context, "cell %s", Cell::kName);
    Random random{uint64_t(id)};
    CHECK(id == int(names.size()), "id %d in place %d", id, int(names.size()));
    CHECK(names.insert(Cell::kName).second, "two cells have this name");
    check_derivatives<Cell>(random);
    if (plants) return;
    check_maps<Cell>();
    check_late<Cell>(random);
    check_backward_ignores_state_0<Cell>(random);
    check_float<Cell>(random);
    check_saturation<Cell, float>();
    check_saturation<Cell, double>();
    check_special<Cell, float>(random);
    check_special<Cell, double>(random);
  });
  if (planted >= 0) return 2;
  return test::conclude("cells_test");
}
