// Several layers, one upon the other, through all steps in one grid; the forward pass, and the kernel of both (stack_backward.cuh).
// A block has 16 units of one layer for some rows of the batch, and keeps their weights, those of the hidden state and those of the
// input, in shared memory for the whole sequence. A layer does a step as soon as the one before it has done it, which is the layer below,
// or backward the layer above: layers follow on one another through the sequence, a step or a few apart, and nobody makes the product
// of the input for all rows beforehand but that of the first layer. Layers are counted as they follow on one another.
//
// The states of a layer lie in a ring of kRing buffers: a step reads that of the step before and writes the next, and the next layer
// reads what the step wrote. Blocks say by a word each what they have done (exchange.cuh), and before a step a block waits
//   for its own layer, which has done the step before,
//   for the layer before it, which has done this step,
//   for the next layer, which has read what this step writes over.
// All blocks of all layers are on the chip at once, so that none waits for a block that is not there.
#pragma once
#include "step_forward.cuh"

namespace fusedrnn {

FUSEDRNN_ANYWHERE int place_in_ring(int layer, int s) { return layer * kRing + s % kRing; }

// The first layer's step, and what the other layers have in the place of its tensors. In the workspace they lie one behind the other.
template <class Cell, class A>
struct StackForward : ForwardCell<Cell, A> {
  using Base = ForwardCell<Cell, A>;
  using typename Base::Element;
  using typename Base::Inputs;
  using typename Base::Now;
  using typename Base::S;
  using typename Base::Sum;
  using Base::m, Base::p, Base::kGates;
  static constexpr int kSums = Cell::kPre;  // of a unit

  // Which sums the products of the two halves of a gate add to.
  struct InputHalf {
    FUSEDRNN_DEVICE static constexpr int of(int gate) { return Cell::x_pre(gate); }
  };
  struct HiddenHalf {
    FUSEDRNN_DEVICE static constexpr int of(int gate) { return Cell::h_pre(gate); }
  };

  struct Tensors {
    const void* gates_x;
    int64_t gates_x_step, gates_x_row;
    const void* bias_hh;
    void *output, *hy, *cy, *saved, *states;
  } of[kMostStacked];
  int layers;
  Element* input_weights;  // packed weight_ih, of all layers but the first
  Element* ring;           // (layers, kRing, packed states)

  StackForward(const Base& first) : Base(first) {}

  // A layer as a step of its own, but for the weights and the hidden states.
  FUSEDRNN_DEVICE Base layer(int k) const {
    Base step = *this;
    const Tensors& tensors = of[k];
    step.p.gates_x[0] = tensors.gates_x;
    step.p.gates_x_step[0] = tensors.gates_x_step;
    step.p.gates_x_row[0] = tensors.gates_x_row;
    step.p.bias_hh[0] = tensors.bias_hh;
    step.p.output = tensors.output;
    step.p.hy = tensors.hy;
    step.p.cy = tensors.cy;
    step.p.saved = tensors.saved;
    step.p.states = tensors.states;
    step.m.state += k * (Cell::kStates * this->state_size());
    return step;
  }
  // The hidden states of a layer before step s.
  FUSEDRNN_DEVICE Element* hidden(int k, int s) const { return ring + place_in_ring(k, s) * m.h_size; }
  FUSEDRNN_DEVICE const Element* own_weights() const { return m.weight_hh[0]; }
  // Lets a layer's step s, which is to be of turn 0, read and write its places in the ring.
  FUSEDRNN_DEVICE void place_states(Base& step, int k, int s) const {
    step.m.h[0] = hidden(k, s);
    step.m.h[1] = hidden(k, s + 1);
  }
  FUSEDRNN_DEVICE const Element* own_states(const Base& step) const { return step.m.h[0]; }
  // What a layer's step s left for the next layer's.
  FUSEDRNN_DEVICE const Element* handed(int k, int s) const { return hidden(k, s + 1); }
  FUSEDRNN_DEVICE PassNothing pass(int, int) const { return {}; }

  // The end of a unit's step on a layer: both[i] is what both products have added to pre-activation i.
  template <class Pass>
  static FUSEDRNN_DEVICE void finish(const Base& step, const Now& now, int b, int u, const Sum (&both)[kSums], const Inputs& in,
                                     const Pass& pass) {
    Sum pre[Cell::kPre], sum[kGates];
#pragma unroll
    for (int k = 0; k < Cell::kPre; ++k) pre[k] = both[k];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      sum[g] = both[Cell::h_pre(g)];
      pre[Cell::h_pre(g)] = Sum(0);
    }
    step.add_up(sum, in, pre);
    step.finish_pre(0, now, b, u, pre, in, given_to<Cell, Sum, S>(step.p, step.state_at(0, b, u), in), pass);
  }
};

// A Step is that of the first layer, besides which it has what is used below.
template <class Step, int kTiles>
__global__ void __launch_bounds__(kMostWarps * kLanes, 1) stack_kernel(const __grid_constant__ ManySteps<Step> args) {
  using A = typename Step::Arithmetic;
  using Element = typename A::Element;
  using Sums = BlockSums<A, Step::kGates, kTiles, true, Step::kSums>;
  const Step& stack = args.step;
  const ProductPlan& plan = stack.plan;
  const int layer = blockIdx.z;
  const BlockPlace place(plan);
  auto step = stack.layer(layer);

  const int tile_size = int(packed_tile_count<A>(plan, Step::kGates)), tiles = int(plan.unit_tiles);
  prims::Shared shared;
  Element* weights = shared.template take<Element>(2 * tile_size);
  Element* input_weights = weights + tile_size;
  Sums sums(plan, shared);
  copy_in(weights, stack.own_weights() + (layer * tiles + place.unit_tile) * int64_t(tile_size), tile_size);
  if (layer > 0) copy_in(input_weights, stack.input_weights + ((layer - 1) * tiles + place.unit_tile) * int64_t(tile_size), tile_size);
  // They are there when the threads have met in a wait, as before every product.

  auto exchange_of = [&](int other) {
    const int blocks = int(plan.sharers);
    return Exchange{args.done + (other * int(plan.batch_tiles) + place.batch_tile) * blocks, blocks, place.sharer};
  };
  const Exchange own = exchange_of(layer);
  const int64_t first_number = int64_t(place.first_row) * (plan.depth_blocks * A::kDepth);  // of the block's rows in a buffer
  const int places = kUnits * plan.block_rows, threads = blockDim.x;  // as in together.cuh
  const int unit = place.unit_tile * kUnits + int(threadIdx.x % kUnits);
  auto row_of = [&](int i) { return place.first_row + int(unsigned(i) / kUnits); };
  typename Step::Inputs next;
  if (unit < stack.units) step.fetch_constants(0, unit, next);
  const bool up = goes_up(0, Step::kBackward);
  const int T = int(stack.p.steps.T);
  WalkPlace walk = walk_place(args.rows, T, 0, args.rows.begin, args.first[0], up);
  for (int s = args.rows.begin; s < args.rows.end; ++s, go_on(walk, args.rows, T, 0, up)) {
    typename Step::Now now = step_at(step.p, 0, walk);
    now.turn = 0;
    stack.place_states(step, layer, s);
    const auto pass = stack.pass(layer, s);
    auto is_place = [&](int i) { return i < places && row_of(i) < step.visited(now) && unit < stack.units; };
    auto fetch = [&](int i) {
      if (is_place(i)) step.fetch(0, now, row_of(i), unit, next);
    };

    fetch(threadIdx.x);  // on its way while others finish
    typename Sums::Sums sum = {};
    if (layer > 0) {  // while the own layer may still be at its last step
      exchange_of(layer - 1).wait(s + 1);
      if (place.first_row < now.count)
        sums.template add<typename Step::InputHalf>(sum, input_weights, stack.handed(layer - 1, s) + first_number);
    }
    if (layer + 1 < stack.layers) exchange_of(layer + 1).wait_for_own(s + 1 - kRing);
    own.wait(s);
    if (place.first_row < step.multiplied(now)) sums.template add<typename Step::HiddenHalf>(sum, weights, stack.own_states(step) + first_number);
    sums.share(sum);
    for (int i = threadIdx.x; i < places; i += threads) {
      const typename Step::Inputs inputs = next;
      if (i + threads < places) fetch(i + threads);
      if (!is_place(i)) continue;
      typename Step::Sum both[Step::kSums];
      sums.total(i, both);
      Step::finish(step, now, row_of(i), unit, both, inputs, pass);
    }
    own.say(s + 1);
  }
}

template <class Step>
void launch_stack(const char* name, const Step& step, const Walk& walk, int64_t steps, uint32_t* done, const Queue& queue) {
  const ProductPlan& plan = step.plan;
  Grid grid{plan.blocks(), step.layers, plan.threads(), plan.shared_bytes, false};
  grid.all_at_once = true;
  const auto kernel = plan.tiles == 1   ? stack_kernel<Step, 1>
                      : plan.tiles == 2 ? stack_kernel<Step, 2>
                                        : stack_kernel<Step, most_tiles(sizeof(typename Step::Sum))>;
  launch_walk<Step>(name, kernel, grid, step, walk, steps, done, queue);
}

inline void refuse_stack(const LayerParams& p, int64_t layers, const ProductPlan& plan) {
  if (plan.regime != Regime::kGrid)
    throw std::invalid_argument("fusedrnn: a stack in one grid expected layers that the GPU holds at once, got " +
                                std::to_string(layers) + " of " + std::to_string(p.H) + " units");
}

// Packs a weight of one layer.
template <class A, int kGates>
void pack_of_layer(const LayerParams& p, const void* from, typename A::Element* to, const WeightPlaces& at, const ProductPlan& plan,
                   const Queue& queue) {
  const void* const sources[kMaxDirections] = {from};
  typename A::Element* const places[kMaxDirections] = {to};
  pack<A, kGates>(p, sources, places, at, plan, queue);
}

// As ForwardPass, for several layers.
template <class Cell, class A>
struct StackPass {
  using Step = StackForward<Cell, A>;
  using Element = typename A::Element;
  using Sum = typename A::Sum;
  const StackParams& p;
  const Queue queue;
  const ProductPlan plan;
  const int64_t tiles_size;  // packed weights of a layer
  ForwardMemory<A> m{};      // of the first layer, and of the others behind it
  Element *weight_ih, *ring;

  StackPass(const StackParams& p, const CudaContext& context, Arena& arena)
      : p(p), queue{context.stream, false, context.chip.shared_bytes, context.chip.multiprocessors},
        plan(plan_stacked(context.chip, p, kKindOf<Cell>, context.tf32, p.layers, false)),
        tiles_size(packed_weight_count<A>(plan, Cell::kGates)) {
    refuse_stack(p, p.layers, plan);
    m.h_size = plan.padded_rows() * plan.depth_blocks * A::kDepth;
    m.weight_hh[0] = arena.take<Element>(p.layers * tiles_size);
    weight_ih = arena.take<Element>((p.layers - 1) * tiles_size);
    ring = arena.take<Element>(p.layers * kRing * m.h_size);
    m.state = arena.take<Sum>(p.layers * Cell::kStates * p.steps.B * p.H);
    m.done_size = exchange_words(plan);
    m.done = arena.take<uint32_t>(p.layers * m.done_size);
  }

  void run() const {
    const ForwardParams& first = p.of[0];
    ForwardCell<Cell, A> cell{first, m, {}, plan, int(p.H), 0, true};
    Step step(cell);
    step.layers = int(p.layers);
    step.input_weights = weight_ih;
    step.ring = ring;
    for (int k = 0; k < step.layers; ++k) {
      const ForwardParams& of = p.of[k];
      step.of[k] = {of.gates_x[0], of.gates_x_step[0], of.gates_x_row[0], of.bias_hh[0], of.output, of.hy, of.cy, of.saved, of.states};
      pack_weight(of.weight_hh[0], m.weight_hh[0] + k * tiles_size);
      if (k > 0) pack_weight(p.weight_ih[k], weight_ih + (k - 1) * tiles_size);
      enter(k);
    }
    launch_stack(Cell::kName, step, Walk{p.steps, false}, p.steps.T, m.done, queue);
  }

  void pack_weight(const void* from, Element* to) const {
    pack_of_layer<A, Cell::kGates>(p, from, to, by_rows(p.H, p.H, p.H), plan, queue);
  }

  // The first states of a layer, in all buffers of its ring: in what is only there to fill blocks they are zeros at every step.
  void enter(int k) const {
    EnterForward<A> enter{p.of[k], m, plan.padded_rows(), plan.depth_blocks, 0, p.H, p.H};
    enter.m.state += k * Cell::kStates * p.steps.B * p.H;
    enter.m.done += k * m.done_size;
    for (int turn = 0; turn < kRing; turn += 2) {
      for (int i = 0; i < 2; ++i) enter.m.h[i] = ring + (k * kRing + turn + i) * m.h_size;
      launch("enter_forward", enter_forward_kernel<A, Cell::kStates>,
             plain_grid(plan.padded_rows() * plan.depth_blocks * A::kDepth, p), queue, enter);
    }
  }
};

}  // namespace fusedrnn
