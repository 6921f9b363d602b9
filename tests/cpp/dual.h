// A number and its derivative with respect to one chosen input: what is pushed through a cell's forward to learn, to
// rounding, what its backward must give. Only the derivatives of the primitive functions are stated here.
#pragma once
#include <cmath>

namespace test {

struct Dual {
  double value, slope;
  Dual() : Dual(0) {}
  explicit Dual(double value, double slope = 0) : value(value), slope(slope) {}
};

inline Dual operator+(Dual a, Dual b) { return Dual(a.value + b.value, a.slope + b.slope); }
inline Dual operator-(Dual a, Dual b) { return Dual(a.value - b.value, a.slope - b.slope); }
inline Dual operator*(Dual a, Dual b) { return Dual(a.value * b.value, a.slope * b.value + a.value * b.slope); }

inline Dual sigmoid(Dual x) {
  const double cosh = std::cosh(x.value / 2);
  return Dual(1 / (1 + std::exp(-x.value)), x.slope / (4 * cosh * cosh));
}
inline Dual tanh(Dual x) {
  const double cosh = std::cosh(x.value);
  return Dual(std::tanh(x.value), x.slope / (cosh * cosh));
}
inline Dual relu(Dual x) { return x.value > 0 ? x : Dual(0); }
inline Dual operator/(Dual a, Dual b) {
  return Dual(a.value / b.value, (a.slope - a.value / b.value * b.slope) / b.value);
}
inline Dual clamp(Dual x, Dual low, Dual high) { return x.value < low.value ? low : x.value > high.value ? high : x; }
inline Dual exp_of_negative(Dual x) { return Dual(std::exp(x.value), x.slope * std::exp(x.value)); }
inline Dual log_sigmoid(Dual x) {
  const double rest = 1 / (1 + std::exp(x.value));
  return Dual(-std::log1p(std::exp(-x.value)), x.slope * rest);
}
inline Dual greater_of(Dual a, Dual b) { return a.value > b.value ? a : b; }
inline Dual where_zero(Dual x, Dual yes, Dual no) { return x.value == 0 ? yes : no; }

}  // namespace test
