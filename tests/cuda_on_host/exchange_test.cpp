// The ways of benchmarks/exchange.cuh, run on the CPU: whatever the order of threads, the last state is what a plain loop makes.
//
//   exchange_test [--plant N]     mistake N is made, in builds that have mistakes to make (this program must find out)
#include "../../benchmarks/exchange.cuh"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace {

int planted = -1;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int64_t kManySteps = 300;
#else
constexpr int64_t kManySteps = 100000;
#endif

// Returns whether the result is right.
bool run(exchange::Way way, int blocks, int part, int64_t steps, int threads, int order, uint64_t seed) {
  cuda_on_host::configure(order, seed);
  std::vector<uint32_t> memory(size_t(exchange::words_needed(blocks, part))), result(size_t(blocks * part), 7u);
  const char* problem = "a wrong state";
  try {
    exchange::launch(way, blocks, threads, blocks, 227 << 10, nullptr, {memory.data(), result.data(), steps, part});
    cuda_on_host::synchronize();
    if (result == exchange::expected(steps, blocks, part)) return true;
  } catch (const std::runtime_error& error) {
    static char text[500];
    std::snprintf(text, sizeof text, "%s", error.what());
    problem = text;
  }
  std::printf("%s, %d blocks of %d numbers, %ld steps, order %d, seed %lu: %s\n", exchange::kWayNames[way], blocks, part, long(steps),
              order, seed, problem);
  return false;
}

}  // namespace

extern "C" bool fusedrnn_test_plant(int mistake) { return mistake == planted; }

int main(int count, char** arguments) {
  if (count == 3 && !std::strcmp(arguments[1], "--plant")) planted = std::atoi(arguments[2]);
  int runs = 0, wrong = 0;
  for (int way = 0; way < exchange::kWays; ++way)
    for (int order = 0; order < 4; ++order)
      for (auto [blocks, part, steps] : {std::tuple<int, int, int>{1, 1, 3}, {2, 5, 40}, {3, 300, 7}, {8, 64, 12}}) {
        ++runs;
        wrong += !run(exchange::Way(way), blocks, part, steps, 32 << order % 3, order, uint64_t(runs));
      }
  if (planted < 0)  // many steps, in the unkindest orders
    for (int way = 0; way < exchange::kWays; ++way, ++runs) wrong += !run(exchange::Way(way), 2, 1, kManySteps, 32, 2 + way % 2, 99);
  std::printf("exchange_test: %d runs, %d failures\n", runs, wrong);
  return wrong > 0;
}
