// Ways for the blocks of a grid to pass their part of a state to one another once a step, and nothing else: what a step of a
// kernel that does all steps costs at least. Each block has `part` numbers of the state, and makes its next ones from those of all
// blocks, so that a number that came late or twice is seen in the end.
//
//   Counter    one word that every block adds to
//   Words      a word for each block, read by all at once: what csrc/cuda/grid.cuh does
//   Tagged     every number goes with that of its step, in one store of 8 bytes: who reads it needs no other word
//   Sentinel   a value that no number has says that it is not there yet; places are made empty again when all have read them
//   Cluster    into the shared memory of the other blocks, which are neighbours on the chip (compute capability 9.0)
#pragma once
#include <vector>

#include "cuda/exchange.cuh"
#include "cuda/walk.h"

namespace exchange {

using fusedrnn::Exchange;
namespace prims = fusedrnn::prims;

constexpr int kMostThreads = 256;

struct Args {
  uint32_t* memory;  // zero; of words_needed() words
  uint32_t* result;  // (blocks, part): the state after the last step
  int64_t steps;
  int part;
};

// ---- What the ways need besides csrc/cuda/prims.cuh ----

#if defined(FUSEDRNN_ON_HOST)
FUSEDRNN_DEVICE void add_release(uint32_t* to, uint32_t value) { cuda_on_host::red_add_release(to, value); }
template <class T>
FUSEDRNN_DEVICE void store_relaxed(T* to, T value) { cuda_on_host::st_relaxed(to, value); }
template <class T>
FUSEDRNN_DEVICE T load_relaxed(const T* from) { return cuda_on_host::ld_relaxed(from); }
FUSEDRNN_DEVICE void pause() { cuda_on_host::spin_pause(); }
FUSEDRNN_DEVICE void fence() { cuda_on_host::fence(); }
#else
FUSEDRNN_DEVICE void add_release(uint32_t* to, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
FUSEDRNN_DEVICE void store_relaxed(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
FUSEDRNN_DEVICE void store_relaxed(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}
FUSEDRNN_DEVICE uint32_t load_relaxed(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
FUSEDRNN_DEVICE uint64_t load_relaxed(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}
FUSEDRNN_DEVICE void pause() {}
FUSEDRNN_DEVICE void fence() { __threadfence(); }
#endif

FUSEDRNN_DEVICE void cluster_sync() {
  prims::cluster_arrive();
  prims::cluster_wait();
}

// ---- The ways ----
//
// Each is made for a call, and has
//   kSlots, kWordsEach       copies of the state in memory, and words to a number in it
//   publish(s, i, value)     the i-th number of this block's part after s steps
//   published(s)             all threads of the block have published
//   gather(s, state)         copies the state after s steps to shared memory; the caller waits for a barrier then

struct Place {
  int block = int(blockIdx.x), blocks = int(gridDim.x), part;
  FUSEDRNN_DEVICE int size() const { return blocks * part; }
};

// Reads a part of `size` things, as many at a time as hide the latency of a load, and each again until it has arrived:
// keep(i, thing). All threads of the block divide them among themselves.
template <class Load, class Arrived, class Keep>
FUSEDRNN_DEVICE void read_all(int size, const Load& load, const Arrived& arrived, const Keep& keep) {
  constexpr int kAhead = 8;
  const int threads = int(blockDim.x);
  for (int first = int(threadIdx.x); first < size; first += kAhead * threads) {
    decltype(load(0)) found[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (first + k * threads < size) found[k] = load(first + k * threads);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + k * threads;
      if (i >= size) continue;
      for (; !arrived(found[k]); found[k] = load(i)) pause();
      keep(i, found[k]);
    }
  }
}

struct alignas(16) Four {  // numbers that are loaded at once
  uint32_t number[4];
};

struct ByMemory {
  Place place;
  uint32_t* state;  // (kSlots, blocks, part)
  FUSEDRNN_DEVICE uint32_t* slot(int64_t s) const { return state + s % 2 * place.size(); }
  FUSEDRNN_DEVICE void publish(int64_t s, int i, uint32_t value) const { slot(s)[place.block * place.part + i] = value; }
  FUSEDRNN_DEVICE void copy(int64_t s, uint32_t* to) const {
    if (place.part % 4 == 0) copy_as(reinterpret_cast<const Four*>(slot(s)), reinterpret_cast<Four*>(to), place.size() / 4);
    else copy_as(slot(s), to, place.size());
  }
  template <class T>
  static FUSEDRNN_DEVICE void copy_as(const T* from, T* to, int size) {
    read_all(size, [&](int i) { return from[i]; }, [](const T&) { return true; }, [&](int i, const T& found) { to[i] = found; });
  }
};

struct Counter : ByMemory {
  static constexpr int kSlots = 2, kWordsEach = 1;
  uint32_t* word;
  FUSEDRNN_DEVICE Counter(uint32_t* memory, const Place& place) : ByMemory{place, memory}, word(memory + 2 * place.size()) {}
  FUSEDRNN_DEVICE void published(int64_t) const {
    prims::block_sync();
    if (threadIdx.x == 0) add_release(word, 1);
  }
  FUSEDRNN_DEVICE void gather(int64_t s, uint32_t* to) const {
    if (threadIdx.x == 0) prims::wait_until(word, uint32_t(place.blocks * s));
    prims::block_sync();
    copy(s, to);
  }
};

struct Words : ByMemory {
  static constexpr int kSlots = 2, kWordsEach = 1;
  Exchange exchange;
  FUSEDRNN_DEVICE Words(uint32_t* memory, const Place& place)
      : ByMemory{place, memory}, exchange{memory + 2 * place.size(), place.blocks, place.block} {}
  FUSEDRNN_DEVICE void published(int64_t s) const { exchange.say(s); }
  FUSEDRNN_DEVICE void gather(int64_t s, uint32_t* to) const {
    exchange.wait(s);
    copy(s, to);
  }
};

struct Tagged {
  static constexpr int kSlots = 2, kWordsEach = 2;
  Place place;
  uint64_t* state;
  FUSEDRNN_DEVICE Tagged(uint32_t* memory, const Place& place) : place(place), state(reinterpret_cast<uint64_t*>(memory)) {}
  FUSEDRNN_DEVICE uint64_t* slot(int64_t s) const { return state + s % kSlots * place.size(); }
  FUSEDRNN_DEVICE void publish(int64_t s, int i, uint32_t value) const {
    store_relaxed(slot(s) + place.block * place.part + i, uint64_t(s) << 32 | value);
  }
  FUSEDRNN_DEVICE void published(int64_t) const {}
  FUSEDRNN_DEVICE void gather(int64_t s, uint32_t* to) const {
    read_all(place.size(), [&](int i) { return load_relaxed(slot(s) + i); },
             [&](uint64_t found) { return found >> 32 == uint64_t(s); }, [&](int i, uint64_t found) { to[i] = uint32_t(found); });
  }
};

// Numbers have no highest bit. A slot is filled at one step of three. A block that has the whole state of step s knows that all
// blocks have read that of step s - 1: it empties its places of that slot, which is filled next at step s + 2, and only then
// says step s + 1, by which others know that they may look there.
struct Sentinel {
  static constexpr int kSlots = 3, kWordsEach = 1;
  static constexpr uint32_t kMark = 0x80000000u;  // of a number that is there; a place is empty while it is zero
  Place place;
  uint32_t* state;
  FUSEDRNN_DEVICE Sentinel(uint32_t* memory, const Place& place) : place(place), state(memory) {}
  FUSEDRNN_DEVICE uint32_t* slot(int64_t s) const { return state + s % kSlots * place.size(); }
  FUSEDRNN_DEVICE void publish(int64_t s, int i, uint32_t value) const {
    if (s > 1) {
      store_relaxed(slot(s + 1) + place.block * place.part + i, 0u);  // of step s - 2
      fence();  // nobody sees the new number beside the old one
    }
    store_relaxed(slot(s) + place.block * place.part + i, value | kMark);
  }
  FUSEDRNN_DEVICE void published(int64_t) const {}
  FUSEDRNN_DEVICE void gather(int64_t s, uint32_t* to) const {
    read_all(place.size(), [&](int i) { return load_relaxed(slot(s) + i); }, [](uint32_t found) { return (found & kMark) != 0; },
             [&](int i, uint32_t found) { to[i] = found & ~kMark; });
    fence();  // what was emptied before these numbers came is seen to be empty
  }
};

// ---- The kernels ----

// Numbers of 31 bits, each made of all blocks' numbers of its place.
FUSEDRNN_ANYWHERE uint32_t next_number(uint32_t sum, int64_t s, int block) {
  return (sum * 2654435761u + uint32_t(s) * 40503u + uint32_t(block)) & 0x7fffffffu;
}

template <class Way>
__global__ void __launch_bounds__(kMostThreads, 1) exchange_kernel(const __grid_constant__ Args args) {
  Place place;
  place.part = args.part;
  const Way way(args.memory, place);
  prims::Shared shared;
  uint32_t* state = shared.template take<uint32_t>(place.size());
  for (int i = threadIdx.x; i < place.size(); i += blockDim.x) state[i] = uint32_t(i);
  prims::block_sync();
  for (int64_t s = 1; s <= args.steps; ++s) {
    for (int i = threadIdx.x; i < place.part; i += blockDim.x) {
      uint32_t sum = 0;
      for (int block = 0; block < place.blocks; ++block) sum += state[block * place.part + i];
      const uint32_t value = next_number(sum, s, place.block);
      way.publish(s, i, value);
      if (s == args.steps) args.result[place.block * place.part + i] = value;
    }
    way.published(s);
    prims::block_sync();  // nobody reads what is in shared memory any more
    way.gather(s, state);
    prims::block_sync();
  }
}

// One cluster. Two copies of the state: a block may be a step ahead of one that still reads.
__global__ void __launch_bounds__(kMostThreads, 1) cluster_kernel(const __grid_constant__ Args args) {
  const int blocks = int(gridDim.x), mine = int(blockIdx.x), size = blocks * args.part;
  prims::Shared shared;
  uint32_t* state = shared.template take<uint32_t>(2 * size);
  for (int i = threadIdx.x; i < size; i += blockDim.x) state[i] = uint32_t(i);
  prims::block_sync();
  cluster_sync();  // all blocks have begun, and their memory is there
  for (int64_t s = 1; s <= args.steps; ++s) {
    const uint32_t* from = state + (s - 1) % 2 * size;
    for (int i = threadIdx.x; i < args.part; i += blockDim.x) {
      uint32_t sum = 0;
      for (int block = 0; block < blocks; ++block) sum += from[block * args.part + i];
      const uint32_t value = next_number(sum, s, mine);
      for (int block = 0; block < blocks; ++block)
        prims::in_block(state, unsigned(block))[s % 2 * size + mine * args.part + i] = value;
      if (s == args.steps) args.result[mine * args.part + i] = value;
    }
    cluster_sync();
  }
}

// ---- Called by the host ----

enum Way { kCounter, kWords, kTagged, kSentinel, kCluster, kWays };
constexpr const char* kWayNames[] = {"counter", "words", "tagged", "sentinel", "cluster"};

// The state after so many steps, (blocks, part).
inline std::vector<uint32_t> expected(int64_t steps, int blocks, int part) {
  std::vector<uint32_t> state(size_t(blocks) * part), next(state.size());
  for (size_t i = 0; i < state.size(); ++i) state[i] = uint32_t(i);
  for (int64_t s = 1; s <= steps; ++s) {
    for (int i = 0; i < part; ++i) {
      uint32_t sum = 0;
      for (int block = 0; block < blocks; ++block) sum += state[size_t(block * part + i)];
      for (int block = 0; block < blocks; ++block) next[size_t(block * part + i)] = next_number(sum, s, block);
    }
    state = next;
  }
  return state;
}

inline int64_t words_needed(int64_t blocks, int64_t part) { return 4 * blocks * part + blocks; }  // enough for every way

inline void launch(Way way, int64_t blocks, int threads, int multiprocessors, int64_t shared_bytes, void* stream, const Args& args) {
  fusedrnn::Grid grid{blocks, 1, threads, blocks * args.part * int64_t(sizeof(uint32_t)) * (way == kCluster ? 2 : 1), false};
  const fusedrnn::Queue queue{stream, false, shared_bytes, multiprocessors};
  grid.all_at_once = true;
  grid.cluster = way == kCluster ? int(blocks) : 1;
  switch (way) {
    case kCounter: return fusedrnn::launch("counter", exchange_kernel<Counter>, grid, queue, args);
    case kWords: return fusedrnn::launch("words", exchange_kernel<Words>, grid, queue, args);
    case kTagged: return fusedrnn::launch("tagged", exchange_kernel<Tagged>, grid, queue, args);
    case kSentinel: return fusedrnn::launch("sentinel", exchange_kernel<Sentinel>, grid, queue, args);
    default: return fusedrnn::launch("cluster", cluster_kernel, grid, queue, args);
  }
}

}  // namespace exchange
