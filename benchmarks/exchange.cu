// Times the ways of exchange.cuh on a GPU; exchange.py compiles and calls it. No part of the library.
#include "exchange.cuh"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <exception>

namespace {

// The current device's memory and clock for one measurement.
struct Bench {
  uint32_t *memory = nullptr, *result = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  ~Bench() {
    cudaFree(memory);
    cudaFree(result);
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
  }
};

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

double seconds_a_step(exchange::Way way, int blocks, int threads, int part, int64_t steps) {
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  Bench bench;
  const size_t memory_bytes = size_t(exchange::words_needed(blocks, part)) * 4, result_bytes = size_t(blocks) * part * 4;
  check(cudaMalloc(&bench.memory, memory_bytes));
  check(cudaMalloc(&bench.result, result_bytes));
  check(cudaEventCreate(&bench.begin));
  check(cudaEventCreate(&bench.end));
  auto run = [&](int64_t count) {
    check(cudaMemset(bench.memory, 0, memory_bytes));
    check(cudaEventRecord(bench.begin));
    exchange::launch(way, blocks, threads, multiprocessors, shared_bytes, nullptr, {bench.memory, bench.result, count, part});
    check(cudaEventRecord(bench.end));
    check(cudaEventSynchronize(bench.end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, bench.begin, bench.end));
    return milliseconds / 1e3;
  };
  std::vector<double> found;
  if (blocks > multiprocessors) throw std::runtime_error("more blocks than multiprocessors: some would share one");
  for (int round = 0; round < 7; ++round) {
    const double twice = run(2 * steps);
    found.push_back((twice - run(steps)) / double(steps));  // no launch is in it
  }
  std::vector<uint32_t> state(result_bytes / 4);
  check(cudaMemcpy(state.data(), bench.result, result_bytes, cudaMemcpyDeviceToHost));
  if (state != exchange::expected(steps, blocks, part)) throw std::runtime_error("the state is wrong");
  std::sort(found.begin(), found.end());
  return found[found.size() / 2];
}

}  // namespace

// Seconds that a step takes; negative if it cannot be told, and then `why` says why.
extern "C" double fusedrnn_exchange(int way, int blocks, int threads, int part, long steps, char* why, int why_size) {
  try {
    return seconds_a_step(exchange::Way(way), blocks, threads, part, steps);
  } catch (const std::exception& error) {
    std::snprintf(why, size_t(why_size), "%s", error.what());
    return -1;
  }
}
