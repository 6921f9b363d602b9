// Who does what: the division of one call among threads, and the barrier they meet at.
//
// A team is the threads that compute one strand of the layer, a head of a direction, for one slice of the batch. Its members own
// blocks of hidden units for the whole sequence and meet once a step, because each needs the whole of the state that they made
// together. Teams never wait for each other while the sequence runs.
#pragma once
#include <omp.h>
#include <sched.h>

#include <cstdint>

#include "vec.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

constexpr int kCacheLine = 64;

// Each member counts the barriers it has reached in a cache line of its own and waits until all others have counted as far.
// For the small teams of one processor this costs one cache line transfer, and there is no counter to be fought over.
struct Barrier {
  struct alignas(kCacheLine) Count { int64_t reached; };
  Count* counts;  // (members), zero at the start
  int members;

  void wait(int member) const {
    if (members == 1) return;
    const int64_t mine = counts[member].reached + 1;
    __atomic_store_n(&counts[member].reached, mine, __ATOMIC_RELEASE);
    for (int other = 0; other < members; ++other)
      for (int spins = 0; __atomic_load_n(&counts[other].reached, __ATOMIC_ACQUIRE) < mine; ++spins) pause(spins);
  }

  // A partner that has lost its core to another process does not come sooner for our spinning: give ours away then.
  static FUSEDRNN_INLINE void pause(int spins) {
    constexpr int kPatience = 4096;
    if (spins > kPatience) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
};

struct Range {
  int64_t begin, end;
};

FUSEDRNN_INLINE Range share(int64_t count, int64_t parts, int64_t part) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Calls fn(i) for all of a range, or `back` from its end. The steps go there and back through the weights by turns: of weights that are
// larger than a cache, what one step has read last is still there, and is what the next one reads first.
template <class Fn>
FUSEDRNN_INLINE void there_or_back(const Range& range, bool back, const Fn& fn) {
  const int64_t count = range.end - range.begin;
  for (int64_t i = 0; i < count; ++i) fn(back ? range.end - 1 - i : range.begin + i);
}

// How a call is divided. `members` threads a team, `slices` teams a strand.
struct Division {
  int strands, slices, members;
  int teams() const { return strands * slices; }
  int threads() const { return teams() * members; }
};

// Threads go to strands first, since these are independent; then to slices of the batch where every slice can afford to
// read all the weights from its own core's cache; then to blocks of units.
FUSEDRNN_INLINE Division divide(int threads, int64_t strands, int64_t batch, int64_t blocks, int64_t weight_bytes,
                                int64_t step_flops) {
  constexpr int64_t kOwnCache = 256 << 10;     // half of the second-level cache of the machine measured (512 KiB a core)
  constexpr int64_t kSliceRows = 16;           // fewer rows do not fill the register tiles
  // A barrier costs about as much as 20e3 multiply-adds (0.3 us against 70 a ns): a member needs a few times that a step.
  constexpr int64_t kMemberFlops = 50000;
  auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  auto at_least_one = [](int64_t a) { return a < 1 ? 1 : a; };
  const int64_t per_strand = at_least_one(threads / strands);
  const int64_t slices =
      weight_bytes <= kOwnCache ? at_least_one(least(per_strand, batch / kSliceRows)) : 1;
  const int64_t members =
      at_least_one(least(least(per_strand / slices, blocks), step_flops / slices / kMemberFlops));
  return {int(strands), int(slices), int(members)};
}

// Runs work(granted) on up to `threads` threads, all of them alive at once, so that they may wait for each other; `granted` is
// how many there are: fewer than asked for inside another parallel region. torch's own OpenMP runtime and pool.
template <class Work>
FUSEDRNN_INLINE void run_team(int threads, const Work& work) {
  if (threads <= 1) {
    work(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
