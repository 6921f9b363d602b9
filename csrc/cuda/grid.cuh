// The blocks that keep the weights together are all blocks of a grid, on the chip at once. They pass the states to each other through
// memory: the second-level cache, in fact.
#pragma once
#include "exchange.cuh"
#include "together.cuh"

namespace fusedrnn {

// Words of one strand in which blocks say what they have done.
inline int64_t exchange_words(const ProductPlan& plan) { return plan.regime == Regime::kGrid ? plan.blocks() : 0; }

template <class Step>
struct ByGrid {
  using Element = typename Step::Element;
  static constexpr bool kOneTile = true;  // as plan_grid says
  const Step& step;
  const int d;
  const int64_t first_number;  // of the block's rows in a buffer of states
  const Exchange exchange;

  FUSEDRNN_DEVICE ByGrid(const ManySteps<Step>& args, const BlockPlace& place, int row_size, prims::Shared&)
      : step(args.step), d(blockIdx.z), first_number(int64_t(place.first_row) * row_size),
        exchange{args.done + (strand_of(d) * int(step.plan.batch_tiles) + place.batch_tile) * int(step.plan.sharers),
                 int(step.plan.sharers),
                 int(place.sharer)} {}
  FUSEDRNN_DEVICE void begin() const {
    prims::block_sync();  // the weights are there
  }
  FUSEDRNN_DEVICE void wait(int s) const { exchange.wait(s); }
  FUSEDRNN_DEVICE const Element* states(const typename Step::Now& now) const { return step.states(d, now) + first_number; }
  FUSEDRNN_DEVICE PassNothing pass(const typename Step::Now&) const { return {}; }
  FUSEDRNN_DEVICE void say(int s) const { exchange.say(s + 1); }
  FUSEDRNN_DEVICE void end() const {}
};

}  // namespace fusedrnn
