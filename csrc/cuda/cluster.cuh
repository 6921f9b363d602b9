// The blocks that keep the weights together are a cluster, neighbours on the chip (sm_90), and write the states into each other's
// shared memory. Clusters do not wait for one another.
#pragma once
#include "together.cuh"

namespace fusedrnn {

template <class Step>
struct ByCluster {
  using A = typename Step::Arithmetic;
  using Element = typename A::Element;
  static constexpr bool kOneTile = false;
  Element* memory;  // (2, size) states of the block's rows, of all units; by turns
  const int size;
  const int64_t first_number;
  const int first_step;
  const unsigned blocks;

  FUSEDRNN_DEVICE ByCluster(const ManySteps<Step>& args, const BlockPlace& place, int row_size, prims::Shared& shared)
      : size(args.step.plan.block_rows * row_size), first_number(int64_t(place.first_row) * row_size), first_step(args.rows.begin),
        blocks(unsigned(args.step.plan.sharers)) {
    memory = shared.template take<Element>(2 * size);
    for (int turn = 0; turn < 2; ++turn) copy_in(copy(turn), args.step.states_of(blockIdx.z, turn) + first_number, size);
  }
  FUSEDRNN_DEVICE Element* copy(int turn) const { return memory + turn * size; }
  FUSEDRNN_DEVICE void begin() const {
    prims::cluster_arrive();
    prims::cluster_wait();  // the weights and states of all blocks are there
  }
  FUSEDRNN_DEVICE void wait(int s) const {
    if (s > first_step) prims::cluster_wait();  // all blocks have passed on the states of the last step
  }
  FUSEDRNN_DEVICE const Element* states(const typename Step::Now& now) const { return copy(now.turn); }

  struct Pass {
    static constexpr bool kInput = false;
    Element* next;
    int64_t first_number;
    unsigned blocks;
    template <int kCount>
    FUSEDRNN_DEVICE void operator()(const int64_t (&at)[kCount], const Element (&element)[kCount]) const {
      Element* own[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) own[k] = next + int(at[k] - first_number);
      for (unsigned block = 0; block < blocks; ++block)
#pragma unroll
        for (int k = 0; k < kCount; ++k) *prims::in_block(own[k], block) = element[k];
    }
  };
  FUSEDRNN_DEVICE Pass pass(const typename Step::Now& now) const { return {copy(1 - now.turn), first_number, blocks}; }
  FUSEDRNN_DEVICE void say(int) const { prims::cluster_arrive(); }
  FUSEDRNN_DEVICE void end() const {
    prims::cluster_wait();  // nobody writes into this block's memory any more
  }
};

}  // namespace fusedrnn
