// How the blocks of a grid that are all on the chip at once tell each other that a step is done, and with it what they wrote.
//
// Each block has a word, in which it says how many steps it has done. Who needs them reads the words of all blocks at once, a
// thread each, until none is behind: no counter that all must increase one after another, and no block that gathers for the others.
// What the blocks wrote before they said so lies in the second-level cache and can be read from there.
#pragma once
#include "prims.cuh"

namespace fusedrnn {

struct Exchange {
  uint32_t* done;  // of the blocks that need each other's results
  int blocks, mine;

  // Called by all threads of the block. Until all blocks have done so many steps; then all threads see what was written in them.
  FUSEDRNN_DEVICE void wait(int steps) const {
    wait_for_own(steps);
    prims::block_sync();  // none of the blocks is behind
  }
  // Of which a thread waits for some blocks: those that are its own among the threads of its block.
  FUSEDRNN_DEVICE void wait_for_own(int steps) const {
    for (int block = threadIdx.x; block < blocks; block += blockDim.x) prims::wait_until(done + block, uint32_t(steps));
  }
  // Called by all threads of the block, when they have written what belongs to so many steps.
  FUSEDRNN_DEVICE void say(int steps) const {
    prims::block_sync();  // all threads have written
    if (threadIdx.x == 0) prims::store_release(done + mine, uint32_t(steps));
  }
};

}  // namespace fusedrnn
