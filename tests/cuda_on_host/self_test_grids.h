// Kernels whose blocks or grids need each other: barriers of a grid, flags, dependent launches; and very many blocks.
#pragma once
#include "self_test.h"

namespace self_test {

// ---------------------------------------------------------------------------------- blocks that exchange a state each step

inline Plant no_grid_barrier{"no_grid_barrier", "exchange"}, no_barrier_before_arrival{"no_barrier_before_arrival", "exchange"},
    no_barrier_after_waiting{"no_barrier_after_waiting", "exchange"}, exchange_one_buffer{"exchange_one_buffer", "exchange"},
    relaxed_release{"relaxed_release", "exchange"}, relaxed_acquire{"relaxed_acquire", "exchange"},
    target_too_high{"target_too_high", "exchange"}, target_too_low{"target_too_low", "exchange"},
    not_cooperative{"not_cooperative", "exchange"};

// All blocks have arrived `target / gridDim.x` times.
__device__ void wait_for_grid(unsigned* arrived, unsigned target) {
  if (!no_barrier_before_arrival) __syncthreads();
  if (threadIdx.x == 0) {
    if (relaxed_release) __atomic_fetch_add(arrived, 1u, __ATOMIC_RELAXED);
    else red_add_release(arrived, 1);
    target += target_too_high ? 1 : target_too_low ? -1 : 0;
    while ((relaxed_acquire ? __atomic_load_n(arrived, __ATOMIC_RELAXED) : ld_acquire(arrived)) < target) spin_pause();
  }
  if (!no_barrier_after_waiting) __syncthreads();
}

// h, (2, n): each step, h[i] becomes a mixture of all of h. A block owns blockDim.x elements of h.
__global__ void mix(unsigned* h, unsigned* arrived, int steps) {
  const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int step = 0; step < steps; ++step) {
    const unsigned* now = h + (exchange_one_buffer ? 0 : unsigned(step) % 2 * n);
    unsigned* next = h + (exchange_one_buffer ? 0 : unsigned(step + 1) % 2 * n);
    unsigned sum = i;
    for (unsigned j = 0; j < n; ++j) sum = sum * 5 + now[j];
    next[i] = sum;
    if (step + 1 < steps && !no_grid_barrier) wait_for_grid(arrived, unsigned(step + 1) * gridDim.x);
  }
}

// The same with the barrier that cooperative launches have.
__global__ void mix_cooperatively(unsigned* h, int steps) {
  const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int step = 0; step < steps; ++step) {
    unsigned sum = i;
    for (unsigned j = 0; j < n; ++j) sum = sum * 5 + h[unsigned(step) % 2 * n + j];
    h[unsigned(step + 1) % 2 * n + i] = sum;
    grid_sync();
  }
}

inline void exchange(test::Random& random) {
  constexpr unsigned kBlocks = 5, kThreads = 32, kUnits = kBlocks * kThreads;
  constexpr int kSteps = 6;  // even, so that the result is in the first half
  for (bool cooperatively : {false, true}) {
    Array<unsigned> h(2 * kUnits), arrived(1);
    fill(h, [&](size_t) { return random.bits(); });
    arrived[0] = 0;
    std::vector<unsigned> now(h.data, h.data + kUnits);
    const auto how = not_cooperative ? grid : cooperative;
    if (cooperatively) launch(how("mix_cooperatively", kBlocks, kThreads, 0), [&] { mix_cooperatively(h.data, kSteps); });
    else launch(how("mix", kBlocks, kThreads, 0), [&] { mix(h.data, arrived.data, kSteps); });
    synchronize();
    for (int step = 0; step < kSteps; ++step) {
      std::vector<unsigned> next(kUnits);
      for (unsigned i = 0; i < kUnits; ++i) {
        next[i] = i;
        for (unsigned j = 0; j < kUnits; ++j) next[i] = next[i] * 5 + now[j];
      }
      now = next;
    }
    for (unsigned i = 0; i < kUnits; ++i) CHECK(h[i] == now[i], "h[%u] is %u instead of %u", i, h[i], now[i]);
  }
}

// ------------------------------------------------------------------------------------------ the last block adds up the rest

inline Plant no_fence{"no_fence", "last_block"};

__global__ void sum_by_last_block(const int* x, int* parts, int* sum, unsigned* done) {
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = 0;
    for (unsigned i = 0; i < 16; ++i) parts[blockIdx.x] += x[blockIdx.x * 16 + i];
    if (!no_fence) __threadfence();
    if (atomicAdd(done, 1u) + 1 == gridDim.x) {
      if (!no_fence) __threadfence();
      for (unsigned i = 0; i < gridDim.x; ++i) *sum += parts[i];
    }
  }
}

inline void last_block(test::Random& random) {
  constexpr int kBlocks = 7;
  Array<int> x(kBlocks * 16), parts(kBlocks), sum(1);
  Array<unsigned> done(1);
  fill(x, [&](size_t) { return random.below(1000); });
  sum[0] = 0;
  done[0] = 0;
  launch(grid("sum_by_last_block", kBlocks, 32), [&] { sum_by_last_block(x.data, parts.data, sum.data, done.data); });
  synchronize();
  int want = 0;
  for (size_t i = 0; i < x.size; ++i) want += x[i];
  CHECK(sum[0] == want, "sum is %d instead of %d", sum[0], want);
}

// ------------------------------------------------------------------------------------------------- a chain of dependent grids

inline Plant read_before_wait{"read_before_wait", "chain"}, write_before_wait{"write_before_wait", "chain"},
    no_wait{"no_wait", "chain"}, wait_in_one_thread{"wait_in_one_thread", "chain"};

// to[i] = from[n - 1 - i] * weights[i] + 1. What does not depend on the grid before is fetched before the wait. from and to are
// exchanged from grid to grid: not even writing is allowed earlier.
__global__ void chain_step(const unsigned* weights, const unsigned* from, unsigned* to) {
  const unsigned n = gridDim.x * blockDim.x, i = blockIdx.x * blockDim.x + threadIdx.x;
  grid_dependency_trigger();
  const unsigned weight = weights[i];
  unsigned read = 0;
  if (read_before_wait) read = from[n - 1 - i];
  if (write_before_wait) to[i] = 1;
  if (!no_wait && !(wait_in_one_thread && threadIdx.x > 0)) grid_dependency_wait();
  if (!read_before_wait) read = from[n - 1 - i];
  to[i] = read * weight + 1;
}

inline void chain(test::Random& random) {
  constexpr unsigned kBlocks = 3, kThreads = 32, kUnits = kBlocks * kThreads;
  constexpr int kGrids = 12;
  Array<unsigned> weights(kUnits), a(kUnits), b(kUnits);
  fill(weights, [&](size_t) { return random.bits(); });
  fill(a, [&](size_t) { return random.bits(); });
  std::vector<unsigned> now(a.data, a.data + kUnits);
  for (int i = 0; i < kGrids; ++i) {
    unsigned *from = i % 2 ? b.data : a.data, *to = i % 2 ? a.data : b.data;
    // Every fifth does not overlap: it starts when all before it have completed.
    const auto how = i % 5 == 4 ? grid : dependent;
    launch(how("chain_step", kBlocks, kThreads, 0), [=, &weights] { chain_step(weights.data, from, to); });
  }
  synchronize();
  for (int i = 0; i < kGrids; ++i) {
    const std::vector<unsigned> last = now;
    for (unsigned j = 0; j < kUnits; ++j) now[j] = last[kUnits - 1 - j] * weights[j] + 1;
  }
  check_all("a", a, [&](size_t i) { return now[i]; });
}

// Two grids without an early trigger: the second starts only when the first has ended, and yet must wait to see its data.
inline Plant trigger_too_early{"trigger_too_early", "handover"};

__global__ void produce(unsigned* data) {
  if (trigger_too_early) grid_dependency_trigger();
  __syncthreads();
  data[threadIdx.x] = threadIdx.x * 7;
  if (!trigger_too_early) grid_dependency_trigger();
}

__global__ void consume(const unsigned* data, unsigned* y) {
  unsigned read = 0;
  if (trigger_too_early) read = data[threadIdx.x];
  grid_dependency_wait();
  if (!trigger_too_early) read = data[threadIdx.x];
  y[threadIdx.x] = read + 1;
}

inline void handover(test::Random&) {
  Array<unsigned> data(64), y(64);
  launch(grid("produce", 1, 64), [&] { produce(data.data); });
  launch(dependent("consume", 1, 64), [&] { consume(data.data, y.data); });
  synchronize();
  check_all("y", y, [](size_t i) { return i * 7 + 1; });
}

// ------------------------------------------------------------------------------------------------------- very many blocks

__global__ void write_place(unsigned* y, unsigned* count) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(count, 1u);
  y[block * blockDim.x + threadIdx.x] = block * 1000 + threadIdx.x;
}

inline void waves(test::Random&) {
  const dim3 blocks(kThreadSanitizer ? 3 : 100, 10, 10);
  const unsigned total = blocks.x * blocks.y * blocks.z, threads = 4;
  Array<unsigned> y(total * threads), count(1);
  count[0] = 0;
  launch(grid("write_place", blocks, threads), [&] { write_place(y.data, count.data); });
  synchronize();
  CHECK(count[0] == total, "%u blocks instead of %u", count[0], total);
  CHECK(statistics().most_blocks <= options().resident_blocks, "%d resident", int(statistics().most_blocks));
  check_all("y", y, [&](size_t i) { return i / threads * 1000 + i % threads; });
}

}  // namespace self_test
