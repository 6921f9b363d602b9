// Kernels whose threads work together within a block: barriers, shared memory, warps, asynchronous copies.
#pragma once
#include "self_test.h"

namespace self_test {

// -------------------------------------------------------------------------------------------- sum and largest of a block

inline Plant no_barrier_before{"no_barrier_before", "block_reduction"}, no_barrier_after{"no_barrier_after", "block_reduction"},
    skipped_barrier{"skipped_barrier", "block_reduction"}, shared_overrun{"shared_overrun", "block_reduction"},
    shared_too_small{"shared_too_small", "block_reduction"}, shared_unequal{"shared_unequal", "block_reduction"};

// Leaves the reduction of the block's values in parts[0].
template <class Combine>
__device__ void reduce_block(float* parts, const Combine& combine) {
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (skipped_barrier && blockIdx.x == 1 && half == 8 && threadIdx.x / 32 == 1) continue;
    if (!no_barrier_before) __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] = combine(parts[threadIdx.x], parts[threadIdx.x + half]);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(128) sum_and_largest(const float* x, float* sums, float* largest) {
  float* parts = take<float>(blockDim.x + (shared_unequal && threadIdx.x == 5));
  const float mine = x[blockIdx.x * blockDim.x + threadIdx.x];
  parts[threadIdx.x + (shared_overrun ? 1 : 0)] = mine;
  reduce_block(parts, [](float a, float b) { return a + b; });
  const float sum = parts[0];
  if (!no_barrier_after) __syncthreads();  // all have read the sum before the array is used again
  parts[threadIdx.x] = mine;
  reduce_block(parts, [](float a, float b) { return a < b ? b : a; });
  if (threadIdx.x % 32 == 0) sums[blockIdx.x * 4 + threadIdx.x / 32] = sum;
  if (threadIdx.x == 0) largest[blockIdx.x] = parts[0];
}

inline void block_reduction(test::Random& random) {
  constexpr int kBlocks = 3, kThreads = 128;
  Array<float> x(kBlocks * kThreads), sums(kBlocks * 4), largest(kBlocks);
  fill(x, [&](size_t) { return random.below(2000) - 1000; });  // whose sums are exact in any order
  const size_t bytes = kThreads * sizeof(float);
  launch(grid("sum_and_largest", kBlocks, kThreads, shared_too_small ? bytes - 4 : bytes + 16),
         [&] { sum_and_largest(x.data, sums.data, largest.data); });
  synchronize();
  auto reduce = [&](size_t block, auto combine) {
    float result = x[block * kThreads];
    for (int i = 1; i < kThreads; ++i) result = combine(result, x[block * kThreads + i]);
    return result;
  };
  check_all("sums", sums, [&](size_t i) { return reduce(i / 4, [](float a, float b) { return a + b; }); });
  check_all("largest", largest, [&](size_t i) { return reduce(i, [](float a, float b) { return std::max(a, b); }); });
}

// --------------------------------------------------------------------------------- neighbours, two buffers, one barrier a step

inline Plant one_buffer{"one_buffer", "double_buffer"};

__global__ void add_neighbours(const unsigned* x, unsigned* y, int steps) {
  unsigned* buffers = take<unsigned>(2 * blockDim.x);
  const unsigned i = threadIdx.x, n = blockDim.x;
  buffers[i] = x[i];
  for (int step = 0; step < steps; ++step) {
    __syncthreads();
    const unsigned* now = buffers + (one_buffer ? 0 : step % 2 * n);
    unsigned* next = buffers + (one_buffer ? 0 : (step + 1) % 2 * n);
    next[i] = now[i] + now[(i + 1) % n] * 3;
  }
  y[i] = buffers[(one_buffer ? 0 : steps % 2 * n) + i];
}

inline void double_buffer(test::Random& random) {
  constexpr int kThreads = 96, kSteps = 9;
  Array<unsigned> x(kThreads), y(kThreads);
  fill(x, [&](size_t) { return random.bits(); });
  launch(grid("add_neighbours", 1, kThreads, 2 * kThreads * sizeof(unsigned)), [&] { add_neighbours(x.data, y.data, kSteps); });
  synchronize();
  std::vector<unsigned> now(x.data, x.data + kThreads);
  for (int step = 0; step < kSteps; ++step) {
    const std::vector<unsigned> last = now;
    for (int i = 0; i < kThreads; ++i) now[i] = last[i] + last[(i + 1) % kThreads] * 3;
  }
  check_all("y", y, [&](size_t i) { return now[i]; });
}

// ------------------------------------------------------------------------------------------------------------------ warps

inline Plant lanes_missing{"lanes_missing", "warps"}, stray_lane{"stray_lane", "warps"}, no_syncwarp{"no_syncwarp", "warps"};

struct WarpResults {
  unsigned scan, sum_of_8, rotated, down, even, all_small, any_large, reversed;
};

__global__ void warp_functions(const unsigned* x, WarpResults* results) {
  constexpr unsigned kAll = 0xffffffffu;
  const int i = int(threadIdx.x + threadIdx.y * blockDim.x), lane = i % warpSize;
  unsigned* mine = take<unsigned>(blockDim.x * blockDim.y) + i / 32 * 32;
  WarpResults r;
  r.scan = x[i];
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned other = __shfl_up_sync(kAll, r.scan, unsigned(distance));
    if (lane >= distance) r.scan += other;
  }
  r.sum_of_8 = x[i];
  if (!lanes_missing || lane < 24)
    for (int d = 4; d; d /= 2) r.sum_of_8 += __shfl_xor_sync(kAll, r.sum_of_8, d, 8);
  r.rotated = __shfl_sync(kAll, x[i], lane + 1, 16);
  r.down = __shfl_down_sync(kAll, x[i], 30u);
  r.even = __ballot_sync(kAll, x[i] % 2 == 0);
  r.all_small = unsigned(__all_sync(kAll, x[i] < 1000));
  r.any_large = unsigned(__any_sync(kAll, x[i] >= 990));
  if (lane < 16) r.even += __shfl_sync(0xffffu, x[i], stray_lane && lane == 3 ? 17 : 0);  // half a warp alone
  mine[lane] = x[i];
  if (!no_syncwarp) __syncwarp();
  r.reversed = mine[31 - lane];
  results[i] = r;
}

inline void warps(test::Random& random) {
  constexpr int kThreads = 128;
  Array<unsigned> x(kThreads);
  Array<WarpResults> got(kThreads);
  fill(x, [&](size_t) { return random.below(1003); });
  launch(grid("warp_functions", 1, dim3(16, 8), kThreads * sizeof(unsigned)), [&] { warp_functions(x.data, got.data); });
  launch(grid("warp_functions", 1, dim3(64, 2), kThreads * sizeof(unsigned)), [&] { warp_functions(x.data, got.data); });
  synchronize();
  for (int i = 0; i < kThreads; ++i) {
    const int lane = i % 32, first = i - lane;
    unsigned scan = 0, sum_of_8 = 0, even = 0, small = 1, large = 0;
    for (int j = first; j <= i; ++j) scan += x[j];
    for (int j = i - i % 8; j < i - i % 8 + 8; ++j) sum_of_8 += x[j];
    for (int j = 0; j < 32; ++j) {
      even |= (x[first + j] % 2 == 0 ? 1u : 0u) << j;
      small &= x[first + j] < 1000;
      large |= x[first + j] >= 990;
    }
    if (lane < 16) even += x[first];
    CHECK(got[i].scan == scan && got[i].sum_of_8 == sum_of_8, "scan, sum of 8 of thread %d", i);
    CHECK(got[i].rotated == x[first + lane / 16 * 16 + (lane + 1) % 16], "rotated of thread %d", i);
    CHECK(got[i].down == x[lane < 2 ? i + 30 : i], "down of thread %d", i);
    CHECK(got[i].even == even && got[i].all_small == small && got[i].any_large == large, "votes of thread %d", i);
    CHECK(got[i].reversed == x[first + 31 - lane], "reversed of thread %d", i);
  }
}

// ---------------------------------------------------------------------------------------------- a pipeline of cp.async

inline Plant copies_not_waited{"copies_not_waited", "copies"}, copies_not_shared{"copies_not_shared", "copies"},
    copies_too_early{"copies_too_early", "copies"}, copies_left{"copies_left", "copies"},
    copy_misaligned{"copy_misaligned", "copies"}, copy_outside{"copy_outside", "copies"},
    global_overrun{"global_overrun", "copies"};

// y[i] = sum over tiles of x[tile][(i + 1) % width], x of n floats: the last tile is short.
__global__ void sum_tiles(const float* x, float* y, int n) {
  constexpr int kStages = 3, kVector = 4;
  const int width = int(blockDim.x) * kVector, tiles = (n + width - 1) / width;
  float* stages = take<float>(size_t(kStages * width));
  auto fetch = [&](int tile) {
    const int i = int(threadIdx.x) * kVector, left = n - tile * width - i;
    const int count = global_overrun ? kVector : max(0, min(kVector, left));
    float* to = stages + tile % kStages * width + i + (copy_misaligned && threadIdx.x == 7 ? 1 : 0);
    if (copy_outside && tile == 2 && threadIdx.x + 1 == blockDim.x) to += kVector;
    if (tile < tiles) cp_async(to, count ? x + tile * width + i : x, 16, size_t(count) * sizeof(float));
    cp_async_commit();
  };
  float sums[kVector] = {};
  for (int tile = 0; tile < kStages - 1; ++tile) fetch(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait(copies_not_waited ? kStages - 1 : kStages - 2);
    if (!copies_not_shared) __syncthreads();  // all have their part of this tile, and have done with the one before
    if (!copies_too_early) fetch(tile + kStages - 1);
    for (int j = 0; j < kVector; ++j) sums[j] += stages[tile % kStages * width + (int(threadIdx.x) * kVector + j + 1) % width];
    if (copies_too_early) fetch(tile + kStages);  // into the stage that slower threads still read
  }
  if (!copies_left) cp_async_wait(0);
  else fetch(0);
  for (int j = 0; j < kVector; ++j) y[threadIdx.x * kVector + j] = sums[j];
}

inline void copies(test::Random& random) {
  constexpr int kThreads = 64, kWidth = 4 * kThreads, kLength = 5 * kWidth + 37;
  Array<float> x(kLength), y(kWidth);
  fill(x, [&](size_t) { return random.below(1000); });
  launch(grid("sum_tiles", 1, kThreads, 3 * kWidth * sizeof(float)), [&] { sum_tiles(x.data, y.data, kLength); });
  synchronize();
  check_all("y", y, [&](size_t i) {
    float sum = 0;
    for (size_t j = (i + 1) % kWidth; j < kLength; j += kWidth) sum += x[j];
    return sum;
  });
}

// -------------------------------------------------------------------------- producers and consumers at named barriers

inline Plant named_wrong_count{"named_wrong_count", "named_barriers"}, named_missing{"named_missing", "named_barriers"};

// The first warp makes numbers, the second squares them: a barrier says that the slot is full, another that it is empty.
__global__ void make_and_square(unsigned* y, int rounds) {
  constexpr int kFull = 1, kEmpty = 2;
  unsigned* slot = take<unsigned>(32);
  const unsigned lane = threadIdx.x % 32;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0 && !named_missing) named_sync(kEmpty, 64);
      slot[31 - lane] = unsigned(round) * 100 + lane;
      named_sync(kFull, 64);
    } else {
      named_sync(kFull, named_wrong_count ? 32 : 64);
      y[unsigned(round) * 32 + lane] = slot[lane] * slot[lane];
      if (round + 1 < rounds && !named_missing) named_sync(kEmpty, 64);
    }
  }
}

inline void named_barriers(test::Random&) {
  constexpr int kRounds = 5;
  Array<unsigned> y(kRounds * 32);
  launch(grid("make_and_square", 1, 64, 32 * sizeof(unsigned)), [&] { make_and_square(y.data, kRounds); });
  synchronize();
  check_all("y", y, [](size_t i) { return (i / 32 * 100 + 31 - i % 32) * (i / 32 * 100 + 31 - i % 32); });
}

}  // namespace self_test
