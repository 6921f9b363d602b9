// The forward pass of a layer, step by step: the recurrent product and the cell in one kernel, and with projections a second
// kernel for theirs. Two kernels, too, where the cell waits for more than one product of a unit: the first makes that product, and
// the second is the cell with a late gate's product, or the cell of whole rows, which are normalised. All heads of both directions are
// in one grid (blockIdx.y and .z).
#pragma once
#include "../arena.h"
#include "engine.h"
#include "given.cuh"
#include "many_steps.cuh"
#include "product.cuh"
#include "row.cuh"
#include "walk.h"

namespace fusedrnn {

// The memory of a pass, besides its tensors.
template <class A>
struct ForwardMemory {
  typename A::Element* weight_hh[kMaxDirections];  // packed: but for a late gate
  typename A::Element* weight_hr[kMaxDirections];  // or a late gate's
  typename A::Element* h[2];                       // (strands, packed states) the hidden state before and after a step, by turns
  typename A::Element* unprojected;                // (strands, packed states) or what a late gate multiplies
  typename A::Sum* state;                          // (states, D, B, H) as the cell has them; 0 is not kept if it is projected
  typename A::Sum* kept;                           // (D, B, ForwardCell::kKept, H) between the kernels of a step
  uint32_t* done;                                  // (strands, exchange words)
  int64_t h_size, unprojected_size, done_size;     // elements of one strand
};

template <class Cell, class A>
struct ForwardCell {
  using Arithmetic = A;
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  using S = typename A::Storage;
  using Now = ForwardStep;
  static constexpr int kGates = Cell::kGates, kInner = Cell::kStates - 1;
  static constexpr bool kBackward = false;
  static constexpr bool kTwoKernels = Cell::kLate > 0 || Cell::kNorms > 0;
  static constexpr int kEarly = kGates - Cell::kLate;  // gates of the first product
  static constexpr int kKept = kTwoKernels ? kEarly + (Cell::kNorms == 2) : 0;  // their sums, and state 1 as the cell makes it

  ForwardParams p;
  ForwardMemory<A> m;
  ForwardStep step[kMaxDirections];
  ProductPlan plan;
  int units, unprojected_blocks;
  bool plain;

  FUSEDRNN_DEVICE const Element* weights(int d) const { return m.weight_hh[d]; }
  FUSEDRNN_DEVICE const Element* states_of(int d, int turn) const { return m.h[turn] + strand_of<Cell>(d) * m.h_size; }
  FUSEDRNN_DEVICE const Element* states(int d, const Now& now) const { return states_of(d, now.turn); }
  FUSEDRNN_DEVICE int multiplied(const Now& now) const { return now.multiplied; }
  FUSEDRNN_DEVICE int visited(const Now& now) const { return now.count; }
  FUSEDRNN_DEVICE int64_t state_at(int d, int b, int u) const { return in_state(p.steps, d, b, p.H, u); }
  FUSEDRNN_DEVICE int64_t state_size() const { return int64_t(int(p.D) * int(p.steps.B)) * int(p.H); }
  FUSEDRNN_DEVICE int64_t kept_at(int d, int b, int k, int u) const {
    return int64_t(d * int(p.steps.B) + b) * (kKept * int(p.H)) + (k * int(p.H) + u);
  }

  // What a unit reads besides its sums.
  struct PlainInputs {
    S gates_x[kGates], bias[kGates];
    Sum state[Cell::kStates];
    bool runs, ends;  // this step; with it. Not looked at if `plain`
  };
  using Inputs = GivenInputs<Cell, PlainInputs, S>;
  FUSEDRNN_DEVICE void fetch_constants(int d, int u, Inputs& in) const {
    const S* bias = static_cast<const S*>(p.bias_hh[d]);
#pragma unroll
    for (int g = 0; g < kGates; ++g) in.bias[g] = bias ? bias[g * int(p.H) + u] : narrow<S>(Sum(0));
    fetch_unit<Cell, S>(p, d, u, in);
  }
  FUSEDRNN_DEVICE void fetch(int d, const Now& now, int b, int u, Inputs& in) const {
    const S* gates_x = static_cast<const S*>(p.gates_x[d]) + now.gates_x_at + b * p.gates_x_row[d] + u;
#pragma unroll
    for (int g = 0; g < kGates; ++g) in.gates_x[g] = gates_x[g * int(p.H)];
    in.state[0] = p.weight_hr[0] ? Sum(0) : m.state[state_at(d, b, u)];
#pragma unroll
    for (int k = 1; k <= kInner; ++k) in.state[k] = m.state[k * state_size() + state_at(d, b, u)];
    if (plain) return;
    in.runs = runs(p.steps, now.t, b);
    in.ends = p.steps.reset && b < now.staying && p.steps.reset[now.cut + b];
  }
  // Of what was fetched before the step before had ended, that which it left.
  FUSEDRNN_DEVICE void fetch_left(int d, int b, int u, Inputs& in) const {
#pragma unroll
    for (int k = 0; k < Cell::kStates; ++k) in.state[k] = m.state[k * state_size() + state_at(d, b, u)];
  }

  FUSEDRNN_DEVICE void add_up(const Sum (&sum)[kGates], const Inputs& in, Sum (&pre)[Cell::kPre]) const {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      pre[Cell::x_pre(g)] += Sum(widen(in.gates_x[g]));
      pre[Cell::h_pre(g)] += sum[g] + Sum(widen(in.bias[g]));
    }
  }

  template <class Pass>
  FUSEDRNN_DEVICE void finish(int d, const Now& now, int b, int u, const Sum (&sum)[kGates], const Inputs& in,
                              const Pass& pass) const {
    finish_given(d, now, b, u, sum, in, given_to<Cell, Sum, S>(p, state_at(d, b, u), in), pass);
  }
  template <class Pass>
  FUSEDRNN_DEVICE void finish_given(int d, const Now& now, int b, int u, const Sum (&sum)[kGates], const Inputs& in,
                                    const Given<Sum, Cell::kUnit>& given, const Pass& pass) const {
    Sum pre[Cell::kPre] = {};
    add_up(sum, in, pre);
    finish_pre(d, now, b, u, pre, in, given, pass);
  }
  // From the pre-activations on.
  template <class Pass>
  FUSEDRNN_DEVICE void finish_pre(int d, const Now& now, int b, int u, const Sum (&pre)[Cell::kPre], const Inputs& in,
                                  const Given<Sum, Cell::kUnit>& given, const Pass& pass) const {
    const bool projected = p.weight_hr[0];
    const int H = int(p.H);
    const int64_t at = state_at(d, b, u);
    auto in_row = [&](int count) { return fusedrnn::in_row(now.place, b, p.D, count * H, u); };
    Sum new_state[Cell::kStates], saved[slots(Cell::kSaved)];

    cell_forward<Cell>(given, pre, in.state, new_state, saved);

    const bool running = plain || in.runs, ends = !plain && in.ends;
    if (!plain && p.zoneout) {
      const S* z = static_cast<const S*>(p.zoneout) + p.zoneout_at(now.first + b, d, Cell::kStates) + u;
      S* made = static_cast<S*>(p.states) + in_row(int(p.stored)) + kInner * H;
#pragma unroll
      for (int k = 0; k < Cell::kStates && p.save != Save::kNothing; ++k) made[k * H] = narrow<S>(running ? new_state[k] : Sum(0));
#pragma unroll
      for (int k = 0; k < Cell::kStates; ++k) new_state[k] = zoneout(Sum(widen(z[k * H])), in.state[k], new_state[k]);
    }
    // What goes on to the next step, and what is seen of this one, which is nothing behind the end of a sequence.
    auto next = [&](int k) {
      if (running && ends) return k ? begun<Sum, S>(p.reset_cx, (k - 1) * state_size() + at) : begun<Sum, S>(p.reset_hx, at);
      return running ? new_state[k] : in.state[k];
    };
    auto seen = [&](Sum number) { return narrow<S>(running ? number : Sum(0)); };
    const bool last = running && (plain ? b >= now.staying : is_last(p.steps, now.t, b, d, b >= now.staying));
    if (projected) {
      m.unprojected[d * m.unprojected_size + packed_state_at<A>(unprojected_blocks, b, u)] = A::element(new_state[0]);
    } else {
      const Sum h = next(0);
      m.state[at] = h;
      if constexpr (Cell::kMultiplies) {
        const int64_t place[1] = {packed_state_at<A>(int(plan.depth_blocks), b, unit_in_head<Cell>(u, units))};
        const Element element[1] = {A::element(!plain && p.hidden_mask ? h * Sum(widen(static_cast<const S*>(p.hidden_mask)[at])) : h)};
        m.h[1 - now.turn][strand_of<Cell>(d) * m.h_size + place[0]] = element[0];
        pass(place, element);
      }
      static_cast<S*>(p.output)[in_row(1)] = seen(new_state[0]);
      if (last) static_cast<S*>(p.hy)[at] = narrow<S>(new_state[0]);
    }
#pragma unroll
    for (int k = 1; k <= kInner; ++k) {
      m.state[k * state_size() + at] = next(k);
      if (last) static_cast<S*>(p.cy)[(k - 1) * state_size() + at] = narrow<S>(new_state[k]);
    }
    if (p.save == Save::kNothing) return;
    S* saved_row = static_cast<S*>(p.saved) + in_row(Cell::kSaved);
    if (p.save == Save::kAll)
#pragma unroll
      for (int k = 0; k < Cell::kSaved; ++k) saved_row[k * H] = seen(saved[k]);
    S* states_row = static_cast<S*>(p.states) + in_row(int(p.stored));
#pragma unroll
    for (int k = 1; k <= kInner; ++k) states_row[(k - 1) * H] = seen(new_state[k]);
    if (projected) states_row[kInner * H] = seen(new_state[0]);
  }
};

// The first kernel of a step of two: it keeps its sums, and makes what the late gate multiplies.
template <class Cell, class A>
struct ForwardFirst : ForwardCell<Cell, A> {
  using Base = ForwardCell<Cell, A>;
  using typename Base::Inputs;
  using typename Base::Now;
  using typename Base::S;
  using typename Base::Sum;
  using Base::p, Base::m;
  static constexpr int kGates = Base::kEarly;

  template <class Pass>
  FUSEDRNN_DEVICE void finish(int d, const Now&, int b, int u, const Sum (&sum)[kGates], const Inputs& in,
                              const Pass&) const {
    Sum all[Cell::kGates] = {};
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      all[g] = sum[g];
      m.kept[this->kept_at(d, b, g, u)] = sum[g];
    }
    if constexpr (Cell::kLate > 0) {
      Sum pre[Cell::kPre] = {};
      this->add_up(all, in, pre);
      const Sum middle = Cell::middle(given_to<Cell, Sum, S>(p, this->state_at(d, b, u), in), pre, in.state);
      const int64_t place = packed_state_at<A>(this->unprojected_blocks, b, unit_in_head<Cell>(u, this->units));
      m.unprojected[strand_of(d) * m.unprojected_size + place] = A::element(middle);
    }
  }
};

// The second where a gate is late: its product, and then the cell.
template <class Cell, class A>
struct ForwardLate : ForwardCell<Cell, A> {
  using Base = ForwardCell<Cell, A>;
  using typename Base::Element;
  using typename Base::Inputs;
  using typename Base::Now;
  using typename Base::Sum;
  using Base::m;
  static constexpr int kGates = Cell::kLate;

  FUSEDRNN_DEVICE const Element* weights(int d) const { return m.weight_hr[d]; }
  FUSEDRNN_DEVICE const Element* states(int d, const Now&) const { return m.unprojected + strand_of(d) * m.unprojected_size; }

  template <class Pass>
  FUSEDRNN_DEVICE void finish(int d, const Now& now, int b, int u, const Sum (&sum)[kGates], const Inputs& in,
                              const Pass& pass) const {
    Sum all[Cell::kGates];
#pragma unroll
    for (int g = 0; g < Cell::kGates; ++g) all[g] = g < Base::kEarly ? m.kept[this->kept_at(d, b, g, u)] : sum[g - Base::kEarly];
    Base::finish(d, now, b, u, all, in, pass);
  }
};

// The second where rows are normalised.
template <class Cell, class A>
struct ForwardRow : ForwardCell<Cell, A> {
  using Base = ForwardCell<Cell, A>;
  using typename Base::Inputs;
  using typename Base::Now;
  using typename Base::S;
  using typename Base::Sum;
  using Base::p, Base::m, Base::kGates;

  FUSEDRNN_DEVICE void finish_row(int d, const Now& now, int b, RowSums<Sum>& sums) const {
    Given<Sum, Cell::kUnit> norms{};
    norms.products = norm_of(sums, int(p.H), kGates, [&](int u, int g) { return m.kept[this->kept_at(d, b, g, u)]; });
    // Calls fn(sums, inputs, what the cell is given) for a unit.
    auto with_unit = [&](int u, const auto& fn) {
      const Inputs in = fetch_all(*this, d, now, b, u);
      Sum sum[kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) sum[g] = m.kept[this->kept_at(d, b, g, u)];
      Given<Sum, Cell::kUnit> given = given_to<Cell, Sum, S>(p, this->state_at(d, b, u), in);
      given.products = norms.products;
      given.inner = norms.inner;
      fn(sum, in, given);
    };
    if constexpr (Cell::kNorms == 2) {
      for_own_units(int(p.H), [&](int u) {
        with_unit(u, [&](const Sum(&sum)[kGates], const Inputs& in, const Given<Sum, Cell::kUnit>& given) {
          Sum pre[Cell::kPre] = {}, new_state[Cell::kStates], saved[slots(Cell::kSaved)];
          this->add_up(sum, in, pre);
          cell_until_out<Cell>(given, pre, in.state, new_state, saved);
          m.kept[this->kept_at(d, b, kGates, u)] = new_state[1];
        });
      });
      norms.inner = norm_of(sums, int(p.H), 1, [&](int u, int) { return m.kept[this->kept_at(d, b, kGates, u)]; });
    }
    for_own_units(int(p.H), [&](int u) {
      with_unit(u, [&](const Sum(&sum)[kGates], const Inputs& in, const Given<Sum, Cell::kUnit>& given) {
        this->finish_given(d, now, b, u, sum, in, given, PassNothing{});
      });
    });
  }
};

// h = W_hr times the unprojected state, after ForwardCell of the same step.
template <class A>
struct ForwardProjection {
  using Arithmetic = A;
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  using S = typename A::Storage;
  using Now = ForwardStep;
  static constexpr int kGates = 1;

  ForwardParams p;
  ForwardMemory<A> m;
  ForwardStep step[kMaxDirections];
  ProductPlan plan;
  int units, h_blocks;

  FUSEDRNN_DEVICE const Element* weights(int d) const { return m.weight_hr[d]; }
  FUSEDRNN_DEVICE const Element* states(int d, const Now&) const { return m.unprojected + d * m.unprojected_size; }
  FUSEDRNN_DEVICE int multiplied(const Now& now) const { return now.count; }
  FUSEDRNN_DEVICE int visited(const Now& now) const { return now.count; }

  struct Inputs {};
  FUSEDRNN_DEVICE void fetch_constants(int, int, Inputs&) const {}
  FUSEDRNN_DEVICE void fetch(int, const Now&, int, int, Inputs&) const {}

  template <class Pass>
  FUSEDRNN_DEVICE void finish(int d, const Now& now, int b, int u, const Sum (&sum)[1], const Inputs&, const Pass&) const {
    const S h = narrow<S>(sum[0]);
    const bool running = runs(p.steps, now.t, b), ends = p.steps.reset && b < now.staying && p.steps.reset[now.cut + b];
    const int64_t at = d * m.h_size + packed_state_at<A>(h_blocks, b, u);
    const Sum next = ends ? begun<Sum, S>(p.reset_hx, (d * p.steps.B + b) * p.P + u) : sum[0];
    m.h[1 - now.turn][at] = running ? A::element(next) : m.h[now.turn][at];
    static_cast<S*>(p.output)[((now.first + b) * p.D + d) * p.P + u] = running ? h : narrow<S>(Sum(0));
    if (running && is_last(p.steps, now.t, b, d, b >= now.staying)) static_cast<S*>(p.hy)[(d * p.steps.B + b) * p.P + u] = h;
  }
};

// The states that all steps begin with, and zeros in what is only there to fill blocks.
template <class A>
struct EnterForward {
  ForwardParams p;
  ForwardMemory<A> m;
  int64_t padded_rows, h_blocks, unprojected_blocks, units, depth;  // the last two: of a strand
};

template <class A, int kStates>
__global__ void enter_forward_kernel(const __grid_constant__ EnterForward<A> args) {
  using S = typename A::Storage;
  using Sum = typename A::Sum;
  const ForwardParams& p = args.p;
  const int d = blockIdx.z, strand = strand_of(d);
  const int64_t first = first_unit(args.units);
  const bool projected = p.weight_hr[0];
  auto given = [&](const void* states, int k, int64_t b, int64_t u, int64_t width) {
    const bool real = states && b < p.steps.B && u < width;
    return real ? Sum(widen(static_cast<const S*>(states)[((k * p.D + d) * p.steps.B + b) * width + u])) : Sum(0);
  };
  auto initial = [&](const void* states, const void* anew, int k, int64_t b, int64_t u, int64_t width) {
    const bool begins = d == 0 && p.steps.reset && b < p.steps.B && p.steps.reset[b];
    return given(begins ? anew : states, k, b, u, width);
  };
  for_each_place(args.padded_rows, args.h_blocks * A::kDepth, [&](int64_t b, int64_t k) {
    const int64_t u = k < args.depth ? first + k : p.P;  // or none
    const Sum mask = p.hidden_mask ? given(p.hidden_mask, 0, b, u, p.P) : Sum(1);
    const typename A::Element h = A::element(initial(p.hx, p.reset_hx, 0, b, u, p.P) * mask);
    const int64_t at = strand * args.m.h_size + packed_state_at<A>(args.h_blocks, b, k);
    args.m.h[0][at] = h;
    args.m.h[1][at] = h;
  });
  for_each_place(args.padded_rows, args.unprojected_blocks * A::kDepth, [&](int64_t b, int64_t k) {
    args.m.unprojected[strand * args.m.unprojected_size + packed_state_at<A>(args.unprojected_blocks, b, k)] = A::element(Sum(0));
  });
  for_each_place(1, args.m.done_size, [&](int64_t, int64_t i) { args.m.done[strand * args.m.done_size + i] = 0; });
  for_each_place(p.steps.B, args.units, [&](int64_t b, int64_t i) {
    const int64_t u = first + i, at = (d * p.steps.B + b) * p.H + u;
    if (!projected) args.m.state[at] = initial(p.hx, p.reset_hx, 0, b, u, p.H);
    for (int k = 1; k < kStates; ++k) {
      const int64_t size = p.D * p.steps.B * p.H;
      args.m.state[k * size + at] = initial(p.cx, p.reset_cx, k - 1, b, u, p.H);
      if (p.steps.lengths && p.steps.lengths[b] < 1)  // of no steps
        static_cast<S*>(p.cy)[(k - 1) * size + at] = narrow<S>(given(p.cx, k - 1, b, u, p.H));
    }
  });
  if (p.steps.lengths)
    for_each_place(p.steps.B, args.depth, [&](int64_t b, int64_t i) {
      const int64_t u = first + i;
      if (p.steps.lengths[b] < 1) static_cast<S*>(p.hy)[(d * p.steps.B + b) * p.P + u] = narrow<S>(given(p.hx, 0, b, u, p.P));
    });
}

// Lays out the workspace of a call, and launches its kernels.
template <class Cell, class A>
struct ForwardPass {
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  const ForwardParams& p;
  const Queue queue;
  const bool projected, two_products;
  const StepPlan plan;
  const int64_t h_blocks, unprojected_blocks, padded_rows;
  ForwardMemory<A> m{};

  ForwardPass(const ForwardParams& p, const CudaContext& context, Arena& arena)
      : p(p), queue{context.stream, context.overlaps, context.chip.shared_bytes, context.chip.multiprocessors}, projected(p.weight_hr[0]),
        two_products(projected || Cell::kLate > 0),
        plan(plan_step(context.chip, p, kKindOf<Cell>, context.tf32, context.regimes)), h_blocks(plan.cell.depth_blocks),
        unprojected_blocks(two_products ? plan.projection.depth_blocks : 0),
        padded_rows(std::max(plan.cell.padded_rows(), two_products ? plan.projection.padded_rows() : 0)) {
    m.h_size = padded_rows * h_blocks * A::kDepth;
    m.unprojected_size = padded_rows * unprojected_blocks * A::kDepth;
    for (int64_t d = 0; d < p.D; ++d) {
      m.weight_hh[d] = arena.take<Element>(p.N * packed_weight_count<A>(plan.cell, Cell::kGates - Cell::kLate));
      m.weight_hr[d] = arena.take<Element>(two_products ? p.N * packed_weight_count<A>(plan.projection, 1) : 0);
    }
    for (Element*& h : m.h) h = arena.take<Element>(p.strands() * m.h_size);
    m.unprojected = arena.take<Element>(p.strands() * m.unprojected_size);
    m.state = arena.take<Sum>(Cell::kStates * p.D * p.steps.B * p.H);
    m.kept = arena.take<Sum>(p.D * p.steps.B * ForwardCell<Cell, A>::kKept * p.H);
    m.done_size = exchange_words(plan.cell);
    m.done = arena.take<uint32_t>(p.strands() * m.done_size);
  }

  void run() const {
    const WeightPlaces of_heads = by_rows(p.units(), p.depth(), p.H);
    if constexpr (Cell::kMultiplies) pack<A, Cell::kGates - Cell::kLate>(p, p.weight_hh, m.weight_hh, of_heads, plan.cell, queue);
    if constexpr (Cell::kLate > 0) pack<A, 1>(p, late_weights<Cell, A>(p).of, m.weight_hr, of_heads, plan.projection, queue);
    if (projected) pack<A, 1>(p, p.weight_hr, m.weight_hr, by_rows(p.P, p.H, p.P), plan.projection, queue);
    const EnterForward<A> enter{p, m, padded_rows, h_blocks, unprojected_blocks, p.units(), p.depth()};
    const int64_t places = Cell::kMultiplies ? padded_rows * h_blocks * A::kDepth : p.steps.B * p.H;
    launch("enter_forward", enter_forward_kernel<A, Cell::kStates>, plain_grid(places, p), queue, enter);

    ForwardCell<Cell, A> cell{p, m, {}, plan.cell, int(p.units()), int(unprojected_blocks), p.plain()};
    const Walk walk{p.steps, false};
    if constexpr (Cell::kLate > 0) run_two(cell, ForwardLate<Cell, A>{cell}, walk);
    else if constexpr (Cell::kNorms > 0) run_two(cell, ForwardRow<Cell, A>{cell}, walk);
    else if constexpr (Cell::kMultiplies) run_steps(cell, walk);
    else launch_alone(Cell::kName, cell, walk, p.D, p.steps.T, queue);
  }

  void run_steps(ForwardCell<Cell, A>& cell, const Walk& walk) const {
    if constexpr (stays(kKindOf<Cell>, sizeof(Sum) == 8))
      if (plan.cell.regime != Regime::kStep) return launch_many_steps(Cell::kName, cell, walk, p.D, p.steps.T, m.done, queue);
    ForwardProjection<A> projection{p, m, {}, plan.projection, int(p.P), int(h_blocks)};
    for (int s = 0; s < p.steps.T; ++s) {
      for (int d = 0; d < p.D; ++d) cell.step[d] = projection.step[d] = step_at(p, d, walk.place(d, s));
      launch_step(Cell::kName, cell, int(p.D), s > 0, queue);
      if constexpr (can_project<Cell>)
        if (projected) launch_step("projection", projection, int(p.D), true, queue);
    }
  }

  // Steps of two kernels, of which the second is the cell.
  template <class Second>
  void run_two(const ForwardCell<Cell, A>& cell, Second second, const Walk& walk) const {
    ForwardFirst<Cell, A> first{cell};
    if (two_products) second.plan = plan.projection;
    for (int s = 0; s < p.steps.T; ++s) {
      for (int d = 0; d < p.D; ++d) first.step[d] = second.step[d] = step_at(p, d, walk.place(d, s));
      launch_step("products", first, int(p.D), s > 0, queue);
      if constexpr (Cell::kLate > 0) launch_step(Cell::kName, second, int(p.D), true, queue);
      else launch_rows(Cell::kName, second, p.steps.B, p.H, int(p.D), queue);
    }
  }
};

}  // namespace fusedrnn
