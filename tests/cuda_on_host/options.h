// What a test may choose, and the random numbers that choices by chance come from.
#pragma once
#include <cstddef>
#include <cstdint>

#include "sanitize.h"

namespace cuda_on_host {

// In which order threads run. Each is a legal behaviour of a GPU; they differ in which missing synchronization they expose.
enum Order {
  kInOrder,  // first to last, taking turns; grids never overlap. Nearest to what one expects: it hides most mistakes
  kReverse,  // last to first, and whoever can go on does: dependent grids, late warps and late lanes run ahead
  kRandom,   // whoever chance picks, at every switch
  kSkewed,   // one warp, block or grid (chance says which) runs as far ahead as it can; the favour changes now and then
};

struct Options {
  int order = kRandom;
  uint64_t seed = 1;              // of what chance decides; set by configure()
  bool poison = true;            // fresh shared memory is 0xFF, which is NaN, rather than zero
  unsigned resident_blocks = 64;  // of an ordinary grid at a time; fewer where their threads are too many
  unsigned resident_grids = 4;    // at most so many grids overlap in a chain of dependent launches
  size_t stack_bytes = 256 << 10;  // a thread's stack: address space, of which only what is touched costs memory
};

// ThreadSanitizer knows 8128 threads at most. Elsewhere the limit is the system's on mappings, of which a stack takes two.
constexpr unsigned kMostThreads = kThreadSanitizer ? 8000 : 32000;
// Ordinary grids have no more threads resident than this (but at least one block): many blocks cost no memory, and the stacks
// stay in the cache. ThreadSanitizer takes a millisecond to make a fiber and longer for everything the more there are.
constexpr unsigned kMostWaveThreads = kThreadSanitizer ? 1024 : 2048;
// So many are made before one is reused for a thread that need not come after; see spare_thread().
constexpr unsigned kFreshThreads = 1024;

// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random {
  uint64_t state = 0;
  uint64_t bits() {
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  uint64_t below(uint64_t end) { return bits() % end; }
  bool once_in(uint64_t times) { return below(times) == 0; }
};

}  // namespace cuda_on_host
