// The backward pass of a layer, step by step in the opposite order: the gradient of the states, which is the product of
// the later step's gate gradients and weight_hh, and the cell backward in one kernel. With projections two: the gradient of
// the projected state, then that of the state before it and the cell. Two, too, where the cell waits for more than that product:
// the gradient of the state, and then the cell with what flows through its late gate, or that of whole rows, which are normalised.
#pragma once
#include "../arena.h"
#include "engine.h"
#include "given.cuh"
#include "many_steps.cuh"
#include "product.cuh"
#include "row.cuh"
#include "walk.h"

namespace fusedrnn {

template <class A>
struct BackwardMemory {
  typename A::Element* weight_hh[kMaxDirections];  // packed: of units of h, over gates but a late one
  typename A::Element* weight_hr[kMaxDirections];  // packed: of units before the projection, over projected ones; or a late gate
  typename A::Element* dpre[2];                    // (strands, packed states) gradients of the gates' recurrent halves, by turns
  typename A::Element* dprojected;                 // (strands, packed states) whole gradient of the projected state; or of a late gate
  typename A::Sum* dh;                             // (D, B, P) gradient of h that does not come through weight_hh; or, between the
                                                   // two kernels of a cell that has two, all of it but the output's
  typename A::Sum* dinner;                         // (inner states, D, B, H)
  typename A::Sum *dreset_h, *dreset_inner;        // (D, B, P), (inner states, D, B, H) sums for grad_reset_hx and grad_reset_cx
  uint32_t* done;                                  // (strands, exchange words)
  int64_t dpre_size, dprojected_size, done_size;   // elements of one strand
};

// What both kernels of a step need.
template <class A>
struct BackwardBase {
  using Arithmetic = A;
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  using S = typename A::Storage;
  using Now = BackwardStep;
  static constexpr int kGates = 1;
  static constexpr bool kBackward = true;

  CudaBackwardParams p;
  BackwardMemory<A> m;
  BackwardStep step[kMaxDirections];
  ProductPlan plan;
  int units;
  bool plain;

  FUSEDRNN_DEVICE int visited(const Now& now) const { return now.visited; }
  FUSEDRNN_DEVICE int64_t state_at(int d, int b, int u, int64_t width) const {
    return in_state(p.steps, d, b, width, u);
  }
  FUSEDRNN_DEVICE int64_t in_row(int64_t place, int b, int width, int u) const { return fusedrnn::in_row(place, b, p.D, width, u); }
  FUSEDRNN_DEVICE int64_t output_at(int64_t place, int b, int u) const { return in_row(place, b, int(p.P), u); }

  // Where row b of the step came from: `before` from the step before, and else from hx; or, if `anew`, from reset_hx.
  struct Origin {
    bool before, anew;
  };
  FUSEDRNN_DEVICE Origin origin(int d, const Now& now, int b) const {
    if (plain) return {b < now.before_count, false};
    const bool before = b < now.before_count && (d == 0 || runs(p.steps, now.t + 1, b));
    return {before, p.steps.reset && (d == 0 || before) && p.steps.reset[now.cut + b]};
  }
  // The hidden state that it began with.
  FUSEDRNN_DEVICE S hidden_before(int d, const Now& now, int b, int u) const {
    const S* hx = static_cast<const S*>(p.hx);
    const Origin from = origin(d, now, b);
    return from.anew     ? narrow<S>(begun<Sum, S>(p.reset_hx, state_at(d, b, u, p.P)))
           : from.before ? static_cast<const S*>(p.output)[output_at(now.before_place, b, u)]
           : hx          ? hx[state_at(d, b, u, p.P)]
                         : narrow<S>(Sum(0));
  }
  FUSEDRNN_DEVICE Sum hidden_mask(int d, int b, int u) const {
    return !plain && p.hidden_mask ? Sum(widen(static_cast<const S*>(p.hidden_mask)[state_at(d, b, u, p.P)])) : Sum(1);
  }
  // For the gradient of weight_hh.
  FUSEDRNN_DEVICE void leave_hidden_before(int d, const Now& now, int b, int u, S h) const {
    if (!plain && p.hidden_mask) h = narrow<S>(Sum(widen(h)) * hidden_mask(d, b, u));
    if (p.hidden_before) static_cast<S*>(p.hidden_before)[output_at(now.place, b, u)] = h;
  }

  FUSEDRNN_DEVICE S grad_output(const Now& now, int b, int u) const {
    return p.grad_output ? static_cast<const S*>(p.grad_output)[output_at(now.place, b, u)] : narrow<S>(Sum(0));
  }

  // Whether row b began the later step anew.
  FUSEDRNN_DEVICE bool later_began(int d, const Now& now, int b) const {
    const bool was_there = b < now.multiplied && (d == 0 || b < now.count);
    return p.steps.reset && was_there && runs(p.steps, d == 0 ? now.t + 1 : now.t, b) &&
           p.steps.reset[now.first + (d == 0 ? now.count : 0) + b];
  }
  // What this step is to have of the whole gradient of the hidden state that the later one began with: nothing, if that was reset_hx.
  FUSEDRNN_DEVICE Sum arriving(int d, const Now& now, int b, int u, Sum dh) const {
    if (plain || !p.grad_reset_hx || !later_began(d, now, b)) return dh;
    add_reset(m.dreset_h, p.grad_reset_hx, state_at(d, b, u, p.P), dh);
    return Sum(0);
  }
  FUSEDRNN_DEVICE static void add_reset(Sum* sums, void* grad, int64_t at, Sum more) {
    sums[at] += more;
    static_cast<S*>(grad)[at] = narrow<S>(sums[at]);
  }

  FUSEDRNN_DEVICE void leave_h(int d, const Now& now, int b, int u, Sum through) const {
    const int64_t at = state_at(d, b, u, p.P);
    const Sum dh = arriving(d, now, b, u, through * hidden_mask(d, b, u) + m.dh[at]);
    if (p.grad_hx) static_cast<S*>(p.grad_hx)[at] = narrow<S>(dh);
  }
};

// The gradient of the projected state is complete: hand it to whoever needs all of it.
template <class A>
struct BackwardProjection : BackwardBase<A> {
  using Base = BackwardBase<A>;
  using typename Base::Element;
  using typename Base::Now;
  using typename Base::S;
  using typename Base::Sum;
  using Base::p, Base::m;
  int64_t dprojected_blocks;

  FUSEDRNN_DEVICE const Element* weights(int d) const { return m.weight_hh[d]; }
  FUSEDRNN_DEVICE const Element* states(int d, const Now& now) const { return m.dpre[now.turn] + d * m.dpre_size; }
  FUSEDRNN_DEVICE int multiplied(const Now& now) const { return now.multiplied; }

  struct Inputs {};
  FUSEDRNN_DEVICE void fetch_constants(int, int, Inputs&) const {}
  FUSEDRNN_DEVICE void fetch(int, const Now&, int, int, Inputs&) const {}

  template <class Pass>
  FUSEDRNN_DEVICE void finish(int d, const Now& now, int b, int u, const Sum (&sum)[1], const Inputs&, const Pass&) const {
    if (b >= now.count) return this->leave_h(d, now, b, u, sum[0]);
    const bool running = this->plain || runs(p.steps, now.t, b);
    // Through the later step, past it, and from the output.
    Sum dh = this->arriving(d, now, b, u, sum[0] + m.dh[this->state_at(d, b, u, p.P)]), past = Sum(0);
    if (running) {
      dh += Sum(widen(this->grad_output(now, b, u)));
    } else {
      past = dh;
      dh = Sum(0);
    }
    this->leave_hidden_before(d, now, b, u, running ? this->hidden_before(d, now, b, u) : narrow<S>(Sum(0)));
    m.dh[this->state_at(d, b, u, p.P)] = past;
    m.dprojected[d * m.dprojected_size + packed_state_at<A>(dprojected_blocks, b, u)] = A::element(dh);
    static_cast<S*>(p.grad_proj)[this->output_at(now.place, b, u)] = narrow<S>(dh);
  }
};

template <class Cell, class A>
struct BackwardCell : BackwardBase<A> {
  using Base = BackwardBase<A>;
  using typename Base::Element;
  using typename Base::Now;
  using typename Base::S;
  using typename Base::Sum;
  using Base::p, Base::m;
  static constexpr int kInner = Cell::kStates - 1, kEarly = Cell::kGates - Cell::kLate;  // gates of the product of the later step
  int64_t dpre_blocks;

  FUSEDRNN_DEVICE bool projected() const { return p.weight_hr[0]; }
  FUSEDRNN_DEVICE int64_t inner_size() const { return int64_t(int(p.D) * int(p.steps.B)) * int(p.H); }
  FUSEDRNN_DEVICE const Element* weights(int d) const { return projected() ? m.weight_hr[d] : m.weight_hh[d]; }
  FUSEDRNN_DEVICE const Element* states_of(int d, int turn) const { return m.dpre[turn] + strand_of<Cell>(d) * m.dpre_size; }
  FUSEDRNN_DEVICE const Element* states(int d, const Now& now) const {
    return projected() ? m.dprojected + d * m.dprojected_size : states_of(d, now.turn);
  }
  FUSEDRNN_DEVICE int multiplied(const Now& now) const { return projected() ? now.count : now.multiplied; }

  // What a unit reads besides its sum. Nothing of a row that began with the later step.
  struct PlainInputs {
    S saved[slots(Cell::kSaved)], state[Cell::kStates], new_state[Cell::kStates], grad_output;
    Sum grad_new[Cell::kStates];  // what comes past the later step; each is loaded and no more, so that no load waits for another
    S grad_states[slots(kInner)];
    bool runs, anew;              // this step; from reset_hx. Not looked at if `plain`
  };
  using Inputs = GivenInputs<Cell, PlainInputs, S>;
  FUSEDRNN_DEVICE void fetch_constants(int d, int u, Inputs& in) const { fetch_unit<Cell, S>(p, d, u, in); }
  FUSEDRNN_DEVICE void fetch(int d, const Now& now, int b, int u, Inputs& in) const {
    if (b >= now.count) return;
    const int H = int(p.H), stored = int(p.stored) * H;
    const int64_t at = this->state_at(d, b, u, H);
    const S zero = narrow<S>(Sum(0));
    const S* saved_row = static_cast<const S*>(p.saved) + this->in_row(now.place, b, Cell::kSaved * H, u);
#pragma unroll
    for (int k = 0; k < Cell::kSaved; ++k) in.saved[k] = saved_row[k * H];
    if (projected()) {  // a cell whose hidden state may be projected does not look at state 0 in backward
      in.state[0] = in.new_state[0] = in.grad_output = zero;
      in.grad_new[0] = Sum(0);
    } else {
      in.state[0] = this->hidden_before(d, now, b, u);
      in.new_state[0] = static_cast<const S*>(p.output)[this->output_at(now.place, b, u)];
      in.grad_output = this->grad_output(now, b, u);
      in.grad_new[0] = m.dh[at];
    }
    const auto from = this->origin(d, now, b);
    const S* cx = static_cast<const S*>(p.cx);
    const S* grad_states = static_cast<const S*>(p.grad_states);
#pragma unroll
    for (int k = 0; k < kInner; ++k) {
      const int64_t states_at = this->in_row(now.place, b, stored, k * H + u);
      const S* states = static_cast<const S*>(p.states);
      in.state[k + 1] = from.anew     ? narrow<S>(begun<Sum, S>(p.reset_cx, k * inner_size() + at))
                        : from.before ? states[this->in_row(now.before_place, b, stored, k * H + u)]
                        : cx          ? cx[k * inner_size() + at]
                                      : zero;
      in.new_state[k + 1] = states[states_at];
      in.grad_new[k + 1] = m.dinner[k * inner_size() + at];
      in.grad_states[k] = grad_states ? grad_states[states_at] : zero;
    }
    if (this->plain) return;
    in.runs = runs(p.steps, now.t, b);
    in.anew = from.anew;
  }
  // Of what was fetched before the later step had ended, that which it left.
  FUSEDRNN_DEVICE void fetch_left(int d, int b, int u, Inputs& in) const {
    const int64_t at = this->state_at(d, b, u, p.H);
    in.grad_new[0] = m.dh[at];
#pragma unroll
    for (int k = 0; k < kInner; ++k) in.grad_new[k + 1] = m.dinner[k * inner_size() + at];
  }

  // The gradients of the initial states, of a row that began with the later step.
  FUSEDRNN_DEVICE void leave_initial(int d, const Now& now, int b, int u, int64_t at, Sum sum) const {
    if (!projected()) this->leave_h(d, now, b, u, sum);
    for (int k = 0; k < kInner && p.grad_cx; ++k) {
      const int64_t inner_at = k * inner_size() + at;
      static_cast<S*>(p.grad_cx)[inner_at] = narrow<S>(m.dinner[inner_at]);
    }
  }

  template <class Pass>
  FUSEDRNN_DEVICE void finish(int d, const Now& now, int b, int u, const Sum (&sum)[1], const Inputs& in,
                              const Pass& pass) const {
    const int64_t at = this->state_at(d, b, u, p.H);
    if (b >= now.count) return leave_initial(d, now, b, u, at, sum[0]);
    Sum dh = in.grad_new[0] + sum[0] * (projected() ? Sum(1) : this->hidden_mask(d, b, u));
    if (!projected()) dh = this->arriving(d, now, b, u, dh);
    auto cell = [&](auto&... arguments) {
      cell_backward<Cell>(given_to<Cell, Sum, S>(p, at, in), arguments...);
      return true;
    };
    run_cell<true>(d, now, b, u, dh, in, cell, pass);
  }

  // dh: the gradient of h, but for the output's. cell(saved, state, new_state, grad_new, grad_pre, grad_state) makes the
  // last two, or says that it was here for something else. kFirst: of the calls for a unit and step.
  template <bool kFirst, class Function, class Pass>
  FUSEDRNN_DEVICE void run_cell(int d, const Now& now, int b, int u, Sum dh, const Inputs& in, const Function& cell,
                                const Pass& pass) const {
    const int H = int(p.H);
    const int64_t at = this->state_at(d, b, u, H);
    Sum saved[slots(Cell::kSaved)], state[Cell::kStates], new_state[Cell::kStates], grad_new[Cell::kStates];
    Sum grad_pre[kGrads<Cell>], grad_state[Cell::kStates], z[Cell::kStates], past[Cell::kStates];
#pragma unroll
    for (int k = 0; k < Cell::kSaved; ++k) saved[k] = Sum(widen(in.saved[k]));
#pragma unroll
    for (int i = 0; i < Cell::kStates; ++i) {
      state[i] = Sum(widen(in.state[i]));
      new_state[i] = Sum(widen(in.new_state[i]));
      grad_new[i] = in.grad_new[i];
    }
    grad_new[0] = dh + Sum(widen(in.grad_output));
#pragma unroll
    for (int k = 0; k < kInner; ++k) grad_new[k + 1] += Sum(widen(in.grad_states[k]));
    const bool running = this->plain || in.runs, goes_on = this->plain || (in.runs && !in.anew);
    if (kFirst && !projected()) this->leave_hidden_before(d, now, b, u, running ? in.state[0] : narrow<S>(Sum(0)));

    const bool stays = !this->plain && p.zoneout;
    if (stays) {  // the gradient of what stays as it was goes past the cell
      const S* part = static_cast<const S*>(p.zoneout) + p.zoneout_at(now.first + b, d, Cell::kStates) + u;
      const S* made = static_cast<const S*>(p.states) + this->in_row(now.place, b, int(p.stored) * H, kInner * H + u);
#pragma unroll
      for (int k = 0; k < Cell::kStates; ++k) {
        z[k] = Sum(widen(part[k * H]));
        new_state[k] = Sum(widen(made[k * H]));
        past[k] = z[k] * grad_new[k];
        grad_new[k] -= past[k];
      }
    }

    if (!cell(saved, state, new_state, grad_new, grad_pre, grad_state)) return;

    if (stays)
#pragma unroll
      for (int k = 0; k < Cell::kStates; ++k) grad_state[k] += past[k];
    if (!running) {
#pragma unroll
      for (int k = 0; k < kGrads<Cell>; ++k) grad_pre[k] = Sum(0);
    }
    // As far as the step before, which knows that this one began anew.
    const bool h_goes_on = goes_on || (running && p.grad_reset_hx);
    auto next = [&](bool moves, Sum grad, Sum unmoved) { return moves ? grad : running ? Sum(0) : unmoved; };
    S* grad_pre_row = static_cast<S*>(p.grad_pre) + this->in_row(now.place, b, kGrads<Cell> * H, u);
#pragma unroll
    for (int k = 0; k < kGrads<Cell>; ++k) grad_pre_row[k * H] = narrow<S>(grad_pre[k]);
    if constexpr (Cell::kMultiplies) {
      Element* dpre = m.dpre[1 - now.turn] + strand_of<Cell>(d) * m.dpre_size;
      int64_t place[kEarly];
      Element element[kEarly];
#pragma unroll
      for (int g = 0; g < kEarly; ++g) {
        place[g] = packed_state_at<A>(dpre_blocks, b, g * this->units + unit_in_head<Cell>(u, this->units));
        element[g] = A::element(h_goes_on ? grad_pre[Cell::h_pre(g)] : Sum(0));
        dpre[place[g]] = element[g];
      }
      pass(place, element);
      if constexpr (Pass::kInput) {
#pragma unroll
        for (int g = 0; g < kEarly; ++g) pass.input(place[g], A::element(grad_pre[Cell::x_pre(g)]));
      }
    }
    if (!projected()) m.dh[at] = next(h_goes_on, grad_state[0], dh);
#pragma unroll
    for (int k = 0; k < kInner; ++k) {
      const int64_t inner_at = k * inner_size() + at;
      if (!this->plain && in.runs && in.anew && p.grad_reset_cx)
        this->add_reset(m.dreset_inner, p.grad_reset_cx, inner_at, grad_state[k + 1]);
      m.dinner[inner_at] = next(goes_on, grad_state[k + 1], in.grad_new[k + 1]);
    }
  }
};

// The first kernel of a step of two: the whole gradient of h, and with it that of the late gate.
template <class Cell, class A>
struct BackwardFirst : BackwardCell<Cell, A> {
  using Base = BackwardCell<Cell, A>;
  using typename Base::Inputs;
  using typename Base::Now;
  using typename Base::S;
  using typename Base::Sum;
  using Base::p, Base::m;
  int64_t dprojected_blocks;

  template <class Pass>
  FUSEDRNN_DEVICE void finish(int d, const Now& now, int b, int u, const Sum (&sum)[1], const Inputs& in,
                              const Pass& pass) const {
    const int64_t at = this->state_at(d, b, u, p.H);
    if (b >= now.count) return this->leave_initial(d, now, b, u, at, sum[0]);
    const Sum dh = this->arriving(d, now, b, u, in.grad_new[0] + sum[0] * this->hidden_mask(d, b, u));
    auto cell = [&](const auto& saved, const auto& state, const auto&, const auto& grad_new, const auto&...) {
      if constexpr (Cell::kLate > 0) {
        const Sum late = Cell::late_backward(given_to<Cell, Sum, S>(p, at, in), saved, state, grad_new);
        const int64_t place = packed_state_at<A>(dprojected_blocks, b, unit_in_head<Cell>(u, this->units));
        m.dprojected[strand_of(d) * m.dprojected_size + place] = A::element(late);
      }
      return false;
    };
    this->template run_cell<true>(d, now, b, u, dh, in, cell, pass);
    m.dh[at] = dh;
  }
};

// The second where a gate is late: what flows through it, and then the cell.
template <class Cell, class A>
struct BackwardLate : BackwardCell<Cell, A> {
  using Base = BackwardCell<Cell, A>;
  using typename Base::Element;
  using typename Base::Inputs;
  using typename Base::Now;
  using typename Base::S;
  using typename Base::Sum;
  using Base::p, Base::m;

  FUSEDRNN_DEVICE const Element* weights(int d) const { return m.weight_hr[d]; }
  FUSEDRNN_DEVICE const Element* states(int d, const Now&) const { return m.dprojected + strand_of(d) * m.dprojected_size; }
  FUSEDRNN_DEVICE int multiplied(const Now& now) const { return now.count; }
  FUSEDRNN_DEVICE int visited(const Now& now) const { return now.count; }

  template <class Pass>
  FUSEDRNN_DEVICE void finish(int d, const Now& now, int b, int u, const Sum (&sum)[1], const Inputs& in,
                              const Pass& pass) const {
    Given<Sum, Cell::kUnit> given = given_to<Cell, Sum, S>(p, this->state_at(d, b, u, p.H), in);
    given.middle = sum[0];
    auto cell = [&](auto&... arguments) {
      cell_backward<Cell>(given, arguments...);
      return true;
    };
    this->template run_cell<false>(d, now, b, u, in.grad_new[0], in, cell, pass);
  }
};

// The second where rows are normalised.
template <class Cell, class A>
struct BackwardRow : BackwardCell<Cell, A> {
  using Base = BackwardCell<Cell, A>;
  using typename Base::Inputs;
  using typename Base::Now;
  using typename Base::S;
  using typename Base::Sum;
  using Base::p, Base::m;
  static constexpr int kNormed = Cell::kGates, kProducts = Cell::kSaved - kNormed;  // where they lie in what is saved

  FUSEDRNN_DEVICE int visited(const Now& now) const { return now.count; }

  FUSEDRNN_DEVICE void finish_row(int d, const Now& now, int b, RowSums<Sum>& sums) const {
    const int H = int(p.H);
    const int64_t place = now.place + b * p.D;
    Given<Sum, Cell::kUnit> norms;
    const S* products = static_cast<const S*>(p.saved) + (place * Cell::kSaved + kProducts) * H;
    norms.products = norm_of(sums, H, kNormed, [&](int u, int g) { return Sum(widen(products[g * H + u])); });
    if constexpr (Cell::kNorms == 2) {
      const S* made = static_cast<const S*>(p.states) + (place * p.stored + (p.zoneout ? Cell::kStates : 0)) * H;
      norms.inner = norm_of(sums, H, 1, [&](int u, int) { return Sum(widen(made[u])); });
    }

    // Calls fn(what the cell is given, saved, state, new_state, grad_new, grad_pre, grad_state) for this thread's units.
    auto each = [&](const auto& fn) {
      for_own_units(H, [&](int u) {
        const Inputs in = fetch_all(*this, d, now, b, u);
        Given<Sum, Cell::kUnit> given = given_to<Cell, Sum, S>(p, this->state_at(d, b, u, H), in);
        given.products = norms.products;
        given.inner = norms.inner;
        auto cell = [&](auto&... arguments) { return fn(given, arguments...); };
        this->template run_cell<false>(d, now, b, u, in.grad_new[0], in, cell, PassNothing{});
      });
    };
    Sum inner[2] = {}, product[2] = {};  // means over the row: of gradients, and of each times what was normalised
    if constexpr (Cell::kNorms == 2) {
      each([&](const auto& given, const auto& saved, const auto&, const auto& new_state, const auto& grad_new, const auto&...) {
        const Sum grad = Cell::out_backward(given, saved, new_state, grad_new);
        inner[0] += grad;
        inner[1] += grad * given.inner.of(new_state[1]);
        return false;
      });
      sums.add(inner);
      for (Sum& mean : inner) mean /= Sum(H);
    }
    auto backward = [&](const auto& given, const auto& saved, const auto& state, const auto& new_state, auto& grad_new, auto& grad_pre,
                        auto& grad_state) {
      if constexpr (Cell::kNorms == 2) {
        const Sum grad = Cell::out_backward(given, saved, new_state, grad_new);
        grad_new[1] += given.inner.grad(grad, given.inner.of(new_state[1]), inner[0], inner[1]);
      }
      cell_backward<Cell>(given, saved, state, new_state, grad_new, grad_pre, grad_state);
    };
    each([&](const auto& given, const auto& saved, const auto& state, const auto& new_state, auto& grad_new, auto& grad_pre,
             auto& grad_state) {
      backward(given, saved, state, new_state, grad_new, grad_pre, grad_state);
#pragma unroll
      for (int g = 0; g < kNormed; ++g) {
        product[0] += grad_pre[Cell::h_pre(g)];
        product[1] += grad_pre[Cell::h_pre(g)] * given.products.of(saved[kProducts + g]);
      }
      return false;
    });
    sums.add(product);
    for (Sum& mean : product) mean /= Sum(H * kNormed);

    const auto from = this->origin(d, now, b);
    const bool nothing = from.anew ? !p.reset_hx : !from.before && !p.hx;  // was multiplied, and nobody wants the gradient
    each([&](const auto& given, const auto& saved, const auto& state, const auto& new_state, auto& grad_new, auto& grad_pre,
             auto& grad_state) {
      backward(given, saved, state, new_state, grad_new, grad_pre, grad_state);
#pragma unroll
      for (int g = 0; g < kNormed; ++g) {
        Sum& grad = grad_pre[Cell::h_pre(g)];
        const Sum y = given.products.of(saved[kProducts + g]);
        grad = nothing ? Sum(0) : given.products.grad(grad, y, product[0], product[1]);
      }
      return true;
    });
  }
};

// The gradients that come in with the final states, and zeros where nothing has been written yet.
template <class A>
struct EnterBackward {
  CudaBackwardParams p;
  BackwardMemory<A> m;
  int64_t units, depth;  // of a strand
};

template <class A, int kStates>
__global__ void enter_backward_kernel(const __grid_constant__ EnterBackward<A> args) {
  using S = typename A::Storage;
  using Sum = typename A::Sum;
  const CudaBackwardParams& p = args.p;
  const int d = blockIdx.z, strand = strand_of(d);
  auto clear = [&](typename A::Element* states, int64_t size) {
    for_each_place(1, size, [&](int64_t, int64_t i) { states[strand * size + i] = A::element(Sum(0)); });
  };
  clear(args.m.dpre[0], args.m.dpre_size);
  clear(args.m.dpre[1], args.m.dpre_size);
  clear(args.m.dprojected, args.m.dprojected_size);
  for_each_place(1, args.m.done_size, [&](int64_t, int64_t i) { args.m.done[strand * args.m.done_size + i] = 0; });
  auto enter = [&](const void* grads, int k, Sum* to, int64_t width, int64_t own) {
    for_each_place(p.steps.B, own, [&](int64_t b, int64_t u) {
      const int64_t at = ((k * p.D + d) * p.steps.B + b) * width + first_unit(own) + u;
      to[at] = grads ? Sum(widen(static_cast<const S*>(grads)[at])) : Sum(0);
    });
  };
  enter(p.grad_hy, 0, args.m.dh, p.P, args.depth);
  for (int k = 0; k < kStates - 1; ++k) enter(p.grad_cy, k, args.m.dinner, p.H, args.units);
  auto begin = [&](Sum* sums, void* grad, int64_t size) {  // whichever strand's
    for_each_place(1, grad ? size : 0, [&](int64_t, int64_t i) {
      sums[strand * size + i] = Sum(0);
      static_cast<S*>(grad)[strand * size + i] = narrow<S>(Sum(0));
    });
  };
  begin(args.m.dreset_h, p.grad_reset_hx, p.steps.B * args.depth);
  begin(args.m.dreset_inner, p.grad_reset_cx, (kStates - 1) * p.steps.B * args.units);
}

// Lays out the workspace of a call, and launches its kernels.
template <class Cell, class A>
struct BackwardPass {
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  const CudaBackwardParams& p;
  const Queue queue;
  const bool projected, two_products;
  const StepPlan plan;
  const int64_t dpre_blocks, dprojected_blocks, padded_rows;
  BackwardMemory<A> m{};

  BackwardPass(const CudaBackwardParams& p, const CudaContext& context, Arena& arena)
      : p(p), queue{context.stream, context.overlaps, context.chip.shared_bytes, context.chip.multiprocessors}, projected(p.weight_hr[0]),
        two_products(projected || Cell::kLate > 0),
        plan(plan_step(context.chip, p, kKindOf<Cell>, context.tf32, context.regimes)), dpre_blocks(plan.dh.depth_blocks),
        dprojected_blocks(two_products ? plan.dunprojected.depth_blocks : 0),
        padded_rows(std::max(plan.dh.padded_rows(), two_products ? plan.dunprojected.padded_rows() : 0)) {
    m.dpre_size = padded_rows * dpre_blocks * A::kDepth;
    m.dprojected_size = padded_rows * dprojected_blocks * A::kDepth;
    for (int64_t d = 0; d < p.D; ++d) {
      m.weight_hh[d] = arena.take<Element>(p.N * packed_weight_count<A>(plan.dh, 1));
      m.weight_hr[d] = arena.take<Element>(two_products ? p.N * packed_weight_count<A>(plan.dunprojected, 1) : 0);
    }
    for (Element*& dpre : m.dpre) dpre = arena.take<Element>(p.strands() * m.dpre_size);
    m.dprojected = arena.take<Element>(p.strands() * m.dprojected_size);
    m.dh = arena.take<Sum>(p.D * p.steps.B * p.P);
    m.dinner = arena.take<Sum>((Cell::kStates - 1) * p.D * p.steps.B * p.H);
    m.dreset_h = arena.take<Sum>(p.grad_reset_hx ? p.D * p.steps.B * p.P : 0);
    m.dreset_inner = arena.take<Sum>(p.grad_reset_cx ? (Cell::kStates - 1) * p.D * p.steps.B * p.H : 0);
    m.done_size = exchange_words(plan.dh);
    m.done = arena.take<uint32_t>(p.strands() * m.done_size);
  }

  void run() const {
    auto of_heads = [&](int64_t gates) { return by_columns(p.depth(), p.units(), gates, p.H); };
    if constexpr (Cell::kMultiplies) pack<A, 1>(p, p.weight_hh, m.weight_hh, of_heads(Cell::kGates - Cell::kLate), plan.dh, queue);
    if constexpr (Cell::kLate > 0)
      pack<A, 1>(p, late_weights<Cell, A>(p).of, m.weight_hr, of_heads(Cell::kLate), plan.dunprojected, queue);
    if (projected) pack<A, 1>(p, p.weight_hr, m.weight_hr, by_columns(p.H, p.P, 1, p.P), plan.dunprojected, queue);
    const EnterBackward<A> enter{p, m, p.units(), p.depth()};
    const int64_t places = Cell::kMultiplies ? m.dpre_size : p.steps.B * p.H;
    launch("enter_backward", enter_backward_kernel<A, Cell::kStates>, plain_grid(places, p), queue, enter);

    BackwardCell<Cell, A> cell{};
    fill(cell, projected ? plan.dunprojected : plan.dh, p.units());
    cell.dpre_blocks = dpre_blocks;
    const Walk walk{p.steps, true};
    const int steps = int(p.steps.T) + 1;  // and one that leaves the gradients of the initial states
    if constexpr (Cell::kLate > 0) run_two(cell, BackwardLate<Cell, A>{cell}, walk, steps);
    else if constexpr (Cell::kNorms > 0) run_two(cell, BackwardRow<Cell, A>{cell}, walk, steps);
    else if constexpr (Cell::kMultiplies) run_steps(cell, walk, steps);
    else launch_alone(Cell::kName, cell, walk, p.D, steps, queue);
  }

  void run_steps(BackwardCell<Cell, A>& cell, const Walk& walk, int steps) const {
    const int D = int(p.D);
    if constexpr (stays(kKindOf<Cell>, sizeof(Sum) == 8))
      if (plan.dh.regime != Regime::kStep) return launch_many_steps(Cell::kName, cell, walk, p.D, steps, m.done, queue);
    BackwardProjection<A> projection{};
    fill(projection, plan.dh, p.P);
    projection.dprojected_blocks = dprojected_blocks;
    for (int s = 0; s < steps; ++s) {
      for (int d = 0; d < p.D; ++d) cell.step[d] = projection.step[d] = step_at(p, d, walk.place(d, s));
      if constexpr (can_project<Cell>)
        if (projected) launch_step("projection backward", projection, D, s > 0, queue);
      launch_step(Cell::kName, cell, D, s > 0 || projected, queue);
    }
  }

  // Steps of two kernels, of which the second is the cell. It has nothing to do with the gradients of the initial states.
  template <class Second>
  void run_two(const BackwardCell<Cell, A>& cell, Second second, const Walk& walk, int steps) const {
    const int D = int(p.D);
    BackwardFirst<Cell, A> first{cell, dprojected_blocks};
    if (two_products) second.plan = plan.dunprojected;
    for (int s = 0; s < steps; ++s) {
      for (int d = 0; d < p.D; ++d) first.step[d] = second.step[d] = step_at(p, d, walk.place(d, s));
      launch_step("products backward", first, D, s > 0, queue);
      if (s == p.steps.T) break;
      if constexpr (Cell::kLate > 0) launch_step(Cell::kName, second, D, true, queue);
      else launch_rows(Cell::kName, second, p.steps.B, p.H, D, queue);
    }
  }

  void fill(BackwardBase<A>& step, const ProductPlan& plan, int64_t units) const {
    step.p = p;
    step.m = m;
    step.plan = plan;
    step.units = int(units);
    step.plain = p.plain();
  }
};

}  // namespace fusedrnn
