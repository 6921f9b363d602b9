// Means over the units of a row, for the cells that normalise: each row is one thread's, and is added up in one order whoever that is.
#pragma once
#include "../cells/cell.h"
#include "vec.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

// x, and zeros behind its first n lanes.
template <class F>
FUSEDRNN_INLINE Vec<F> first_lanes(Vec<F> x, int n) {
  if (n >= Vec<F>::kLanes) return x;
  F lanes[Vec<F>::kLanes];
  store(lanes, x);
  return load(lanes, n);
}

// A row's mean, and what scales it to a variance of 1. visit(use) calls use(numbers, how many of these count) for all `count` numbers.
template <class F, class Visit>
FUSEDRNN_INLINE Norm<F> norm_of(int64_t count, const Visit& visit) {
  Vec<F> total(F(0)), squares(F(0));
  visit([&](Vec<F> x, int n) __attribute__((always_inline)) { total = total + first_lanes(x, n); });
  const F mean = sum_lanes(total) / F(count);
  visit([&](Vec<F> x, int n) __attribute__((always_inline)) {
    const Vec<F> from_mean = first_lanes(x - Vec<F>(mean), n);
    squares = squares + from_mean * from_mean;
  });
  return {mean, F(1) / F(__builtin_sqrt(double(sum_lanes(squares) / F(count)) + kNormEpsilon))};
}

// The two means that the gradient of a normalised row takes: of its gradients, and of each times what it is the gradient of.
template <class F>
struct NormMeans {
  Vec<F> total{F(0)}, products{F(0)};
  FUSEDRNN_INLINE void add(Vec<F> grad, Vec<F> y, int n) {
    total = total + first_lanes(grad, n);
    products = products + first_lanes(grad * y, n);
  }
  FUSEDRNN_INLINE F mean(int64_t count) const { return sum_lanes(total) / F(count); }
  FUSEDRNN_INLINE F mean_of_products(int64_t count) const { return sum_lanes(products) / F(count); }
};

template <class Given, class F>
FUSEDRNN_INLINE void set_norms(Given& given, const Norm<F>* norms) {
  using T = decltype(given.products.mean);
  given.products = {T(norms[0].mean), T(norms[0].scale)};
  given.inner = {T(norms[1].mean), T(norms[1].scale)};
}

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
