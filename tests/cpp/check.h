// What the test programs share: a check that counts, and random numbers that are the same on every machine.
#pragma once
#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>

namespace test {

inline std::atomic<long> checks{0}, failures{0};
inline thread_local char context[320] = "";  // what is being tested; stands before a failure, and is printed after a crash

// Counts one check; says what was wrong with the first of those that fail.
#define CHECK(condition, ...)                                       \
  do {                                                              \
    ++test::checks;                                                 \
    if (!(condition) && ++test::failures <= 20) {                   \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, test::context); \
      std::printf(__VA_ARGS__);                                     \
      std::printf("\n");                                            \
    }                                                               \
  } while (0)

// The program's exit status, after one line that says how it went.
inline int conclude(const char* name) {
  std::printf("%s: %ld checks, %ld failures\n", name, checks.load(), failures.load());
  return failures.load() == 0 && checks.load() > 0 ? 0 : 1;
}

// SplitMix64 (Steele, Lea and Flood, 2014).
struct Random {
  uint64_t state;
  uint64_t bits() {
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  int64_t below(int64_t end) { return int64_t(bits() % uint64_t(end)); }
  double uniform(double low, double high) { return low + (high - low) * double(bits() >> 11) * 0x1p-53; }
};

}  // namespace test
