// Proves tests/cuda_on_host: kernels that are right compute what plain C++ does, in every order; kernels with a planted mistake
// are found out. Plain, by AddressSanitizer or by ThreadSanitizer: tests/test_cuda_on_host.py says which finds what.
//
//   --list          prints the plants
//   --plant NAME    makes that mistake, and runs only the case that it belongs to
//   --order N       only this order (0 in order, 1 reverse, 2 random, 3 skewed)
//   --seeds N       so many seeds, from 1, in the orders that chance decides; default 3
//   --seed N        only this seed
//
// Exits 0 if all is well, 1 if a result is wrong, 2 on an Error, and as the sanitizer wants if that finds something.
#include <cstdio>

#include "self_test.h"
#include "self_test_blocks.h"
#include "self_test_errors.h"
#include "self_test_grids.h"
#include "self_test_matrix.h"

namespace self_test {

constexpr Case kCases[] = {
    {"block_reduction", block_reduction}, {"double_buffer", double_buffer}, {"warps", warps}, {"copies", copies},
    {"named_barriers", named_barriers}, {"fragments", fragments}, {"gemm_bf16", gemm<Bf16>}, {"gemm_f16", gemm<F16>},
    {"gemm_tf32", gemm<Tf32>}, {"exchange", exchange}, {"last_block", last_block}, {"chain", chain}, {"handover", handover},
    {"waves", waves}, {"errors", errors}};
constexpr const char* kOrderNames[] = {"in order", "reverse", "random", "skewed"};

// What chance decides must be the same the next time.
uint64_t run_case(const Case& c, int order, uint64_t seed) {
  std::snprintf(test::context, sizeof test::context, "%s, %s, seed %d", c.name, kOrderNames[order], int(seed));
  configure(order, seed);
  test::Random random{seed};
  c.run(random);
  return statistics().switches;
}

int run(const char* plant, int only_order, int first_seed, int last_seed) {
  const char* only_case = nullptr;
  for (Plant* candidate : Plant::all())
    if (plant && std::strcmp(candidate->name, plant) == 0) {
      candidate->active = true;
      only_case = candidate->in;
    }
  if (plant && !only_case) {
    std::printf("no such plant: %s\n", plant);
    return 3;
  }
  uint64_t most_grids = 0;
  for (const Case& c : kCases) {
    if (only_case && std::strcmp(only_case, c.name) != 0) continue;
    for (int order = 0; order < 4; ++order) {
      if (only_order >= 0 && order != only_order) continue;
      for (int seed = first_seed; seed <= (order >= kRandom ? last_seed : first_seed); ++seed) {
        const uint64_t switches = run_case(c, order, uint64_t(seed));
        most_grids = std::max(most_grids, statistics().most_grids);
        CHECK(order != kInOrder || statistics().most_grids <= 1, "grids overlap");
        if (seed == 1 && c.run != errors) CHECK(run_case(c, order, 1) == switches, "not the same a second time");
      }
    }
  }
  if (!only_case && only_order != kInOrder)
    CHECK(most_grids == options().resident_grids, "at most %d grids overlap", int(most_grids));
  return test::conclude("cuda_on_host");
}

}  // namespace self_test

int main(int count, char** words) {
  const char* plant = nullptr;
  int order = -1, first_seed = 1, last_seed = 3;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--list")
      for (self_test::Plant* one : self_test::Plant::all()) std::printf("%s\n", one->name);
    if (word == "--list") return 0;
    if (i + 1 == count) return 3;
    if (word == "--plant") plant = words[++i];
    else if (word == "--order") order = std::atoi(words[++i]);
    else if (word == "--seeds") last_seed = std::atoi(words[++i]);
    else if (word == "--seed") first_seed = last_seed = std::atoi(words[++i]);
    else return 3;
  }
  try {
    return self_test::run(plant, order, first_seed, last_seed);
  } catch (const cuda_on_host::Error& error) {
    std::printf("%s: Error: %s\n", test::context, error.what());
    return 2;
  }
}
