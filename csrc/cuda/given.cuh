// What a cell is given besides pre-activations and states (cells/cell.h): the unit's own numbers, which are fetched with its
// other inputs, the choice of functions, and the mask of what a late gate multiplies. Nothing at all for a cell that has none.
#pragma once
#include <type_traits>

#include "arithmetic.cuh"

namespace fusedrnn {

template <class Inputs, class S, int kUnit>
struct WithUnit : Inputs {
  S unit[kUnit];
};
// `Inputs`, and the unit's own numbers of a cell that has them.
template <class Cell, class Inputs, class S>
using GivenInputs = std::conditional_t<(Cell::kUnit > 0), WithUnit<Inputs, S, slots(Cell::kUnit)>, Inputs>;

template <class Cell, class S, class Inputs>
FUSEDRNN_DEVICE void fetch_unit(const LayerParams& p, int d, int u, Inputs& in) {
  if constexpr (Cell::kUnit > 0) {
    const S* numbers = static_cast<const S*>(p.unit[d]);
#pragma unroll
    for (int k = 0; k < Cell::kUnit; ++k) in.unit[k] = numbers ? numbers[k * int(p.H) + u] : S(0.0f);
  }
}

// A number of the states that a sequence begins anew with, reset_hx or reset_cx; null: zeros.
template <class Sum, class S>
FUSEDRNN_DEVICE Sum begun(const void* states, int64_t at) {
  return states ? Sum(widen(static_cast<const S*>(states)[at])) : Sum(0);
}

// at: the unit's place in (D, B, H).
template <class Cell, class Sum, class S, class Inputs>
FUSEDRNN_DEVICE Given<Sum, Cell::kUnit> given_to(const LayerParams& p, int64_t at, const Inputs& in) {
  Given<Sum, Cell::kUnit> given;
  if constexpr (Cell::kChooses) given.choice = p.choice;
  if constexpr (Cell::kUnit > 0)
#pragma unroll
    for (int k = 0; k < Cell::kUnit; ++k) given.unit[k] = Sum(widen(in.unit[k]));
  if constexpr (Cell::kLate > 0) given.mask = p.hidden_mask ? Sum(widen(static_cast<const S*>(p.hidden_mask)[at])) : Sum(1);
  return given;
}

}  // namespace fusedrnn
