// What threads do together: barriers of a block and of a grid, and the operations of a warp.
//
// Stricter than CUDA where CUDA leaves things undefined or to the hardware: a barrier of the whole block or grid wants all its
// threads, those that have exited too, at one place of the source; a mask may name no lane that has exited.
#pragma once
#include <algorithm>
#include <string>
#include <type_traits>

#include "machine.h"

namespace cuda_on_host {

// ----------------------------------------------------------------------------------------------------- barriers

// The calling thread arrives, and goes on when `expected` have.
inline void meet(Barrier& barrier, unsigned expected, const Site& site) {
  HappensBefore& before = barrier.before[barrier.meetings % 2];
  before.release();
  barrier.waiting.push_back(current);
  if (barrier.waiting.size() == 1) {
    barrier.site = site;
    barrier.expected = expected;
  }
  if (barrier.waiting.size() == expected) {
    for (Thread* other : barrier.waiting)
      if (other != current) wake(*other);
    barrier.waiting.clear();
    ++barrier.meetings;
    ++machine.statistics.barriers;
  } else {
    wait_in(site);
  }
  before.acquire();
}

inline void check_same_place(const Barrier& barrier, const Site& site) {
  if (barrier.waiting.empty() || barrier.site == site) return;
  fail(site, "barrier divergence: others (" + text(*barrier.waiting[0]) + ") wait in " + text(barrier.site));
}

inline void block_sync(const Site& site) {
  Quiet quiet;
  progress();
  Block& block = *current->block;
  const unsigned threads = unsigned(block.threads.size());
  if (block.alive < threads)
    fail(site, "barrier divergence: " + std::to_string(threads - block.alive) + " threads of the block have exited");
  check_same_place(block.barriers[0], site);
  meet(block.barriers[0], threads, site);
}

// bar.sync id, threads. Unlike __syncthreads it may stand at several places: those who produce and those who consume.
inline void named_sync(int id, unsigned threads, CUDA_ON_HOST_SITE) {
  Quiet quiet;
  progress();
  const Site site{"bar.sync", file, line};
  Block& block = *current->block;
  if (id < 0 || id >= 16) fail(site, "barrier " + std::to_string(id) + " is not one of 0 to 15");
  if (threads == 0 || threads % 32 != 0 || threads > block.threads.size())
    fail(site, std::to_string(threads) + " threads are not a number of whole warps of this block");
  Barrier& barrier = block.barriers[id];
  if (!barrier.waiting.empty() && barrier.expected != threads)
    fail(site, "barrier divergence: barrier " + std::to_string(id) + " expects " + std::to_string(threads) +
                   " threads here and " + std::to_string(barrier.expected) + " in " + text(barrier.site));
  meet(barrier, threads, site);
}

inline void grid_sync(CUDA_ON_HOST_SITE) {
  Quiet quiet;
  progress();
  const Site site{"grid_sync", file, line};
  Grid& grid = *current->block->grid;
  if (!grid.launch.cooperative) fail(site, "the launch is not cooperative");
  if (grid.threads_exited)
    fail(site, "barrier divergence: " + std::to_string(grid.threads_exited) + " threads of the grid have exited");
  check_same_place(grid.barrier, site);
  meet(grid.barrier, unsigned(grid.blocks * grid.threads), site);
}

// barrier.cluster.arrive.release: the calling thread is one of all threads of the cluster, and will wait.
inline void cluster_arrive(CUDA_ON_HOST_SITE) {
  Quiet quiet;
  progress();
  const Site site{"cluster_arrive", file, line};
  Thread& me = *current;
  Grid& grid = *me.block->grid;
  const uint64_t number = me.block->number / grid.launch.cluster;
  ClusterBarrier& barrier = grid.clusters[number];
  if (me.arrived) fail(site, "a thread arrives again that has not waited");
  if (barrier.exited) fail(site, "barrier divergence: threads of the cluster have exited");
  barrier.before[barrier.meetings % 2].release();
  me.arrived = true;
  me.meeting = barrier.meetings;
  if (++barrier.arrived < grid.launch.cluster * grid.threads) return;
  barrier.arrived = 0;
  ++barrier.meetings;
  ++machine.statistics.barriers;
  for (Thread* other : barrier.waiting) wake(*other);
  barrier.waiting.clear();
}

// barrier.cluster.wait.acquire: until all have arrived.
inline void cluster_wait(CUDA_ON_HOST_SITE) {
  Quiet quiet;
  progress();
  const Site site{"cluster_wait", file, line};
  Thread& me = *current;
  ClusterBarrier& barrier = me.block->grid->clusters[me.block->number / me.block->grid->launch.cluster];
  if (!me.arrived) fail(site, "a thread waits that has not arrived");
  if (barrier.meetings == me.meeting) {
    barrier.waiting.push_back(&me);
    wait_in(site);
  }
  barrier.before[me.meeting % 2].acquire();
  me.arrived = false;
}

inline void cluster_sync(CUDA_ON_HOST_SITE) {
  cluster_arrive(file, line);
  cluster_wait(file, line);
}

// ------------------------------------------------------------------------------------------------ warp collectives

constexpr unsigned kWholeWarp = ~0u;
enum class Orders { kNothing, kMemory };

// The calling lane gives its operand and waits for the other lanes of the mask. The last to arrive carries out
// `operate(Operand* lanes[32])`, null for lanes not in the mask, for all of them. Only __syncwarp orders memory: CUDA promises
// that of no shuffle, vote or mma.
template <class Operand, class Operate>
inline void warp_collective(unsigned mask, const Site& site, Operand& mine, Orders orders, const Operate& operate) {
  Quiet quiet;
  progress();
  Thread& me = *current;
  Warp& warp = *me.warp;
  if (!(mask >> me.lane() & 1)) fail(site, "warp divergence: the calling lane is not in its mask");
  if (mask & ~warp.alive) fail(site, "warp divergence: the mask names lanes that have exited or never were");
  auto found = warp.open.end();
  for (auto open = warp.open.begin(); open != warp.open.end(); ++open) {
    const bool they_need_me = open->mask >> me.lane() & 1, i_need_them = open->arrived & mask;
    if (open->mask == mask && open->site == site) found = open;
    else if (they_need_me && i_need_them)
      fail(site, "warp divergence: other lanes wait in " + text(open->site) + (open->mask == mask ? "" : ", other mask"));
  }
  if (found == warp.open.end()) found = warp.open.insert(found, Collective{mask, 0, site, {}});
  HappensBefore& before = warp.before[warp.meetings % 2];
  if (orders == Orders::kMemory) before.release();
  found->arrived |= 1u << me.lane();
  found->operands[me.lane()] = &mine;
  if (found->arrived != mask) {
    wait_in(site);
  } else {
    Operand* lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Operand*>(found->operands[i]);
    warp.open.erase(found);
    ++machine.statistics.collectives;
    if (orders == Orders::kMemory) ++warp.meetings;
    operate(lanes);
    for (unsigned i = 0; i < 32; ++i)
      if (lanes[i] && i != me.lane()) wake(*warp.lane(i));
  }
  if (orders == Orders::kMemory) before.acquire();
}

inline void warp_sync(unsigned mask, const Site& site) {
  char nothing = 0;
  warp_collective(mask, site, nothing, Orders::kMemory, [](char**) {});
}

inline unsigned ballot(unsigned mask, bool predicate, const Site& site) {
  struct Vote {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  warp_collective(mask, site, mine, Orders::kNothing, [](Vote** lanes) {
    unsigned result = 0;
    for (unsigned i = 0; i < 32; ++i) result |= lanes[i] && lanes[i]->predicate ? 1u << i : 0u;
    for (unsigned i = 0; i < 32; ++i)
      if (lanes[i]) lanes[i]->result = result;
  });
  return mine.result;
}

enum class Shuffle { kIndex, kUp, kDown, kXor };

// The lane that `lane` reads from: PTX ISA, shfl.sync. Lanes out of the segment of `width` lanes read their own value.
inline int shuffle_source(Shuffle kind, int lane, int operand, int width) {
  const int first = lane & ~(width - 1);
  const int last = first + width - 1;
  switch (kind) {
    case Shuffle::kIndex: return first + (operand & (width - 1));
    case Shuffle::kUp: return lane - operand < first ? lane : lane - operand;
    case Shuffle::kDown: return lane + operand > last ? lane : lane + operand;
    case Shuffle::kXor: break;
  }
  return (lane ^ operand) > last ? lane : lane ^ operand;
}

template <class T>
inline T shuffle(Shuffle kind, unsigned mask, T value, int operand, int width, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T>);
  struct Exchange {
    T value, result;
    int operand, width;
  } mine{value, value, operand, width};
  bool stray = false;
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail(site, "width " + std::to_string(width) + " is no power of 2");
  warp_collective(mask, site, mine, Orders::kNothing, [&](Exchange** lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      const int source = shuffle_source(kind, i, lanes[i]->operand, lanes[i]->width);
      if (lanes[source]) lanes[i]->result = lanes[source]->value;
      else stray = true;
    }
  });
  if (stray) fail(site, "warp divergence: a lane reads from a lane that is not in the mask");
  return mine.result;
}

}  // namespace cuda_on_host
