// Memory as a kernel uses it: dynamic shared memory, asynchronous copies, atomics, flags between blocks.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "machine.h"

namespace cuda_on_host {

// ------------------------------------------------------------------------------------------------- shared memory

constexpr size_t kSharedAlign = 16;  // where sub-arrays begin on a device
// Behind every array, where AddressSanitizer does not watch; must be intact when the block ends.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kSharedGuard = 0;
#else
constexpr size_t kSharedGuard = 64;
#endif
constexpr unsigned char kPoison = 0xFF;

// The next sub-array of the block's dynamic shared memory. Each is an allocation of its own, so that an overrun into its
// neighbour is one. All threads of a block must take the same sizes in the same order.
inline void* shared_take(size_t bytes) {
  Quiet quiet;
  Block& block = *current->block;
  const size_t nth = current->arrays_taken++;
  if (nth < block.shared.size()) {
    if (block.shared[nth].bytes != bytes)
      fail("shared_take: this thread wants " + std::to_string(bytes) + " bytes, others took " +
           std::to_string(block.shared[nth].bytes));
    return block.shared[nth].data;
  }
  block.shared_used = (block.shared_used + kSharedAlign - 1) / kSharedAlign * kSharedAlign + bytes;
  if (block.shared_used > block.grid->launch.shared_bytes)
    fail("shared_take: " + std::to_string(block.shared_used) + " bytes of shared memory taken, " +
         std::to_string(block.grid->launch.shared_bytes) + " given at the launch");
  void* memory = nullptr;
  if (posix_memalign(&memory, kSharedAlign, bytes + kSharedGuard + (bytes == 0)) != 0) fail("shared_take: out of memory");
  std::memset(memory, machine.options.poison ? kPoison : 0, bytes);
  std::memset(static_cast<unsigned char*>(memory) + bytes, kPoison, kSharedGuard);
  block.shared.push_back({static_cast<unsigned char*>(memory), bytes});
  return memory;
}

// Returns whether nobody wrote behind an array.
inline bool release_shared(Block& block) {
  bool intact = true;
  for (const SharedArray& array : block.shared) {
    for (size_t i = 0; i < kSharedGuard; ++i) intact &= array.data[array.bytes + i] == kPoison;
    std::free(array.data);
  }
  block.shared.clear();
  block.shared_used = 0;
  return intact;
}

inline bool in_shared(const Block& block, const void* begin, size_t bytes) {
  const unsigned char* first = static_cast<const unsigned char*>(begin);
  return std::any_of(block.shared.begin(), block.shared.end(), [&](const SharedArray& array) {
    return first >= array.data && first + bytes <= array.data + array.bytes;
  });
}

// mapa: where the same element of shared memory lies in the block of this rank in the cluster, which must have taken its arrays.
template <class T>
inline T* shared_of_rank(T* mine, unsigned rank, CUDA_ON_HOST_SITE) {
  Quiet quiet;
  const Site site{"shared_of_rank", file, line};
  const Block& block = *current->block;
  const Grid& grid = *block.grid;
  if (rank >= grid.launch.cluster) fail(site, "rank " + std::to_string(rank) + " in a cluster of " + std::to_string(grid.launch.cluster));
  const uint64_t wanted = block.number / grid.launch.cluster * grid.launch.cluster + rank;
  const unsigned char* place = reinterpret_cast<const unsigned char*>(mine);
  for (size_t nth = 0; nth < block.shared.size(); ++nth) {
    const SharedArray& array = block.shared[nth];
    if (place < array.data || place >= array.data + array.bytes) continue;
    for (const auto& other : machine.live_blocks)
      if (other->grid == &grid && other->number == wanted && nth < other->shared.size())
        return reinterpret_cast<T*>(other->shared[nth].data + (place - array.data));
    fail(site, "block " + std::to_string(wanted) + " has not begun, or has ended: its shared memory is not there");
  }
  fail(site, "not an address in an array of the block's shared memory");
}

// ------------------------------------------------------------------------------------------------------- cp.async

// The kernel's own access, seen by the sanitizers: at the latest moment the program may rely on, or at once.
inline void carry_out(const AsyncCopies::Copy& copy) {
  note_read(copy.from, copy.source_bytes);
  note_write(copy.to, copy.bytes);
  Quiet quiet;
  if (copy.source_bytes) std::memcpy(copy.to, copy.from, copy.source_bytes);
  std::memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

// Copies `bytes` (4, 8 or 16) from global to shared memory, of which only the first source_bytes are read; the rest is zero.
inline void cp_async(void* shared, const void* global, size_t bytes, size_t source_bytes, CUDA_ON_HOST_SITE) {
  const Site site{"cp.async", file, line};
  const AsyncCopies::Copy copy{shared, global, bytes, source_bytes, false};
  bool at_once = false;
  {
    Quiet quiet;
    progress();
    if (bytes != 4 && bytes != 8 && bytes != 16) fail(site, std::to_string(bytes) + " bytes; can be 4, 8 or 16");
    if (source_bytes > bytes) fail(site, "more bytes to read than to write");
    if (reinterpret_cast<uintptr_t>(shared) % bytes) fail(site, "shared address not a multiple of the size");
    if (source_bytes && reinterpret_cast<uintptr_t>(global) % bytes) fail(site, "global address not a multiple of the size");
    if (!in_shared(*current->block, shared, bytes)) fail(site, "destination not within an array of the block's shared memory");
    at_once = by_chance() && machine.random.once_in(4);
    current->copies.copies.push_back(copy);
    current->copies.copies.back().done = at_once;
  }
  // The copy can happen at any time from now on. So its accesses may collide with any made by others meanwhile, and to
  // ThreadSanitizer it happens twice: now, and when it is waited for.
  note_read(global, source_bytes);
  note_write(shared, bytes);
  if (at_once) carry_out(copy);
}

inline void cp_async_commit() {
  Quiet quiet;
  current->copies.group_ends.push_back(current->copies.copies.size());
}

// Waits until at most `left` of the calling thread's committed groups are under way. Others see the copies after a barrier.
inline void cp_async_wait(size_t left) {
  AsyncCopies& mine = current->copies;
  size_t begin, end;
  {
    Quiet quiet;
    progress();
    begin = mine.first_pending();
    if (mine.group_ends.size() > left) mine.groups_waited = std::max(mine.groups_waited, mine.group_ends.size() - left);
    end = mine.first_pending();
  }
  for (size_t i = begin; i < end; ++i) {
    AsyncCopies::Copy copy;
    {
      Quiet quiet;
      copy = mine.copies[i];
    }
    if (copy.done) {
      note_read(copy.from, copy.source_bytes);
      note_write(copy.to, copy.bytes);
    } else {
      carry_out(copy);
    }
  }
  Quiet quiet;
  if (mine.groups_waited == mine.group_ends.size() && !mine.pending()) mine.clear();
}

// ---------------------------------------------------------------------------------------- atomics, flags, fences

// Somebody else may run after an atomic operation.
inline void after_atomic(const char* operation) {
  Quiet quiet;
  progress();
  if (by_chance() && machine.random.once_in(8)) give_way({operation, "", 0});
}

template <class T>
inline T atomic_add(T* to, T value) {
  T before;
  if constexpr (std::is_integral_v<T>) {
    before = __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
  } else {
    __atomic_load(to, &before, __ATOMIC_RELAXED);
    for (T after = before + value; !__atomic_compare_exchange(to, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);)
      after = before + value;
  }
  after_atomic("atomicAdd");
  return before;
}

inline void red_add_release(unsigned* to, unsigned value) {
  __atomic_fetch_add(to, value, __ATOMIC_RELEASE);
  after_atomic("red.release");
}

template <class T>
inline void st_relaxed(T* to, T value) {
  __atomic_store_n(to, value, __ATOMIC_RELAXED);
  after_atomic("st.relaxed");
}

template <class T>
inline T ld_relaxed(const T* from) {
  return __atomic_load_n(from, __ATOMIC_RELAXED);
}

inline void st_release(unsigned* to, unsigned value) {
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
  after_atomic("st.release");
}

inline unsigned ld_acquire(const unsigned* from, CUDA_ON_HOST_SITE) {
  constexpr unsigned kPatience = 1 << 20;
  {
    Quiet quiet;
    if (++machine.polls == kPatience) fail({"ld_acquire", file, line}, "livelock: called again and again without spin_pause");
  }
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

// One turn of a loop that waits for another thread's write. Others run; when all that happens is spinning, that is an error.
inline void spin_pause(CUDA_ON_HOST_SITE) {
  Quiet quiet;
  const Site site{"spin_pause", file, line};
  const Grid& grid = *current->block->grid;
  if (!grid.launch.cooperative && grid.blocks > 1)
    fail(site, "the launch is not cooperative: other blocks need not be resident");
  // In random order a thread that could go on is not picked for so long with a probability of exp(-64).
  if (++machine.spins > 64 * uint64_t(machine.threads_alive) + 20000) fail(site, "livelock: threads only spin");
  give_way(site);
}

// ThreadSanitizer knows no fences. To it they order as if all met at one object: too much, so that it can miss a race in
// kernels that use them, but says nothing wrong. red_add_release and ld_acquire it knows exactly.
inline void fence() {
  static HappensBefore& all = *new HappensBefore;
  all.acquire();
  all.release();
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

}  // namespace cuda_on_host
