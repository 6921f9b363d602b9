// Several layers, one upon the other, backward through all steps in one grid, by the kernel of stack.cuh: the highest layer is the first,
// and each other one takes the gradient of its output, step by step, from the layer above it, as the product of that one's gates and
// weight_ih.
#pragma once
#include "stack.cuh"
#include "step_backward.cuh"

namespace fusedrnn {

// Whether a gate's two halves have gradients of their own.
template <class Cell>
constexpr bool has_halves() {
  for (int gate = 0; gate < Cell::kGates; ++gate)
    if (Cell::x_pre(gate) != Cell::h_pre(gate)) return true;
  return false;
}

template <class Cell, class A>
struct StackBackward : BackwardCell<Cell, A> {
  using Base = BackwardCell<Cell, A>;
  using typename Base::Element;
  using typename Base::Inputs;
  using typename Base::Now;
  using typename Base::S;
  using typename Base::Sum;
  using Base::m, Base::p;
  static constexpr bool kHalves = has_halves<Cell>();
  static constexpr int kSums = 2;  // of a unit: through its own layer's later step, and through the layer above

  struct InputHalf {
    FUSEDRNN_DEVICE static constexpr int of(int) { return 1; }
  };
  struct HiddenHalf {
    FUSEDRNN_DEVICE static constexpr int of(int) { return 0; }
  };

  struct Tensors {
    const void *output, *saved, *states, *hx, *cx, *grad_output;
    void *hidden_before, *grad_pre, *grad_hx, *grad_cx;
  } of[kMostStacked];
  int layers;
  Element* own;            // packed weight_hh of all layers
  Element* input_weights;  // packed weight_ih, above each layer but the first
  Element* ring;           // (layers, kRing, packed states) gradients of the gates' recurrent halves,
  Element* input_ring;     //   and of those of the input where they differ, else the same

  StackBackward(const Base& first) : Base(first) {}

  FUSEDRNN_DEVICE Base layer(int k) const {
    Base step = *this;
    const Tensors& tensors = of[k];
    step.p.output = tensors.output;
    step.p.saved = tensors.saved;
    step.p.states = tensors.states;
    step.p.hx = tensors.hx;
    step.p.cx = tensors.cx;
    step.p.grad_output = tensors.grad_output;
    step.p.hidden_before = tensors.hidden_before;
    step.p.grad_pre = tensors.grad_pre;
    step.p.grad_hx = tensors.grad_hx;
    step.p.grad_cx = tensors.grad_cx;
    step.m.dh += k * this->inner_size();
    step.m.dinner += k * (Base::kInner * this->inner_size());
    return step;
  }
  FUSEDRNN_DEVICE const Element* own_weights() const { return own; }
  FUSEDRNN_DEVICE void place_states(Base& step, int k, int s) const {
    step.m.dpre[0] = ring + place_in_ring(k, s) * m.dpre_size;
    step.m.dpre[1] = ring + place_in_ring(k, s + 1) * m.dpre_size;
  }
  FUSEDRNN_DEVICE const Element* own_states(const Base& step) const { return step.m.dpre[0]; }
  FUSEDRNN_DEVICE const Element* handed(int k, int s) const { return input_ring + place_in_ring(k, s + 1) * m.dpre_size; }

  struct PassInput {
    static constexpr bool kInput = kHalves;
    Element* next;
    template <class Places, class Elements>
    FUSEDRNN_DEVICE void operator()(const Places&, const Elements&) const {}
    FUSEDRNN_DEVICE void input(int64_t place, Element element) const { next[place] = element; }
  };
  FUSEDRNN_DEVICE PassInput pass(int k, int s) const { return {input_ring + place_in_ring(k, s + 1) * m.dpre_size}; }

  template <class Pass>
  static FUSEDRNN_DEVICE void finish(const Base& step, const Now& now, int b, int u, const Sum (&both)[kSums], const Inputs& in,
                                     const Pass& pass) {
    const Sum sum[1] = {(b < now.multiplied ? both[0] : Sum(0)) + both[1]};
    step.finish(0, now, b, u, sum, in, pass);
  }
};

// As BackwardPass, for several layers.
template <class Cell, class A>
struct StackBackwardPass {
  using Step = StackBackward<Cell, A>;
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  const CudaStackBackwardParams& p;
  const Queue queue;
  const ProductPlan plan;
  const int64_t tiles_size;
  BackwardMemory<A> m{};  // of the first layer, and of the others behind it
  Element *own, *input_weights, *ring, *input_ring;

  StackBackwardPass(const CudaStackBackwardParams& p, const CudaContext& context, Arena& arena)
      : p(p), queue{context.stream, false, context.chip.shared_bytes, context.chip.multiprocessors},
        plan(plan_stacked(context.chip, p, kKindOf<Cell>, context.tf32, p.layers, true)), tiles_size(packed_weight_count<A>(plan, 1)) {
    refuse_stack(p, p.layers, plan);
    m.dpre_size = plan.padded_rows() * plan.depth_blocks * A::kDepth;
    own = arena.take<Element>(p.layers * tiles_size);
    input_weights = arena.take<Element>((p.layers - 1) * tiles_size);
    ring = arena.take<Element>(p.layers * kRing * m.dpre_size);
    input_ring = Step::kHalves ? arena.take<Element>(p.layers * kRing * m.dpre_size) : ring;
    m.dh = arena.take<Sum>(p.layers * p.steps.B * p.H);
    m.dinner = arena.take<Sum>(p.layers * (Cell::kStates - 1) * p.steps.B * p.H);
    m.done_size = exchange_words(plan);
    m.done = arena.take<uint32_t>(p.layers * m.done_size);
  }

  void run() const {
    BackwardCell<Cell, A> cell{};
    static_cast<BackwardParams&>(cell.p) = p.of[0];
    cell.m = m;
    cell.plan = plan;
    cell.units = int(p.H);
    cell.plain = true;
    cell.dpre_blocks = plan.depth_blocks;
    Step step(cell);
    step.layers = int(p.layers);
    step.own = own;
    step.input_weights = input_weights;
    step.ring = ring;
    step.input_ring = input_ring;
    for (int k = 0; k < step.layers; ++k) {
      const BackwardParams& of = p.of[k];
      step.of[k] = {of.output, of.saved, of.states, of.hx, of.cx, of.grad_output, p.hidden_before[k], of.grad_pre, of.grad_hx, of.grad_cx};
      pack_weight(of.weight_hh[0], own + k * tiles_size);
      if (k > 0) pack_weight(p.weight_ih[k], input_weights + (k - 1) * tiles_size);
      enter(k, ring);
      if (Step::kHalves) enter(k, input_ring);
    }
    launch_stack(Cell::kName, step, Walk{p.steps, true}, p.steps.T + 1, m.done, queue);
  }

  void pack_weight(const void* from, Element* to) const {
    pack_of_layer<A, 1>(p, from, to, by_columns(p.H, p.H, Cell::kGates, p.H), plan, queue);
  }

  // The gradients that a layer begins with, and zeros in all buffers of one of its rings.
  void enter(int k, Element* of) const {
    CudaBackwardParams params{};
    static_cast<BackwardParams&>(params) = p.of[k];
    EnterBackward<A> enter{params, m, p.H, p.H};
    enter.m.dh += k * p.steps.B * p.H;
    enter.m.dinner += k * (Cell::kStates - 1) * p.steps.B * p.H;
    enter.m.done += k * m.done_size;
    for (int turn = 0; turn < kRing; turn += 2) {
      for (int i = 0; i < 2; ++i) enter.m.dpre[i] = of + (k * kRing + turn + i) * m.dpre_size;
      launch("enter_backward", enter_backward_kernel<A, Cell::kStates>, plain_grid(m.dpre_size, p), queue, enter);
    }
  }
};

}  // namespace fusedrnn
