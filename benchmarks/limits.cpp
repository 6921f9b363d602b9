// What a processor can do that torch has no operator for: read a block of memory over and over from whichever cache holds
// it, and let threads meet. Compiled for this machine when a benchmark runs (limits.py); no part of the library.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
// As wide as a register of most processors; wider ones still load two a cycle.
typedef float Vec __attribute__((vector_size(32), aligned(32)));

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Reads `count` vectors `repeats` times; eight sums at once, so that no addition waits for the one before.
float read(const Vec* data, int64_t count, int64_t repeats) {
  constexpr int kSums = 8;
  Vec sums[kSums] = {};
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i + kSums <= count; i += kSums)
      for (int s = 0; s < kSums; ++s) sums[s] += data[i + s];
    asm volatile("" ::"r"(data) : "memory");  // the next pass reads again
  }
  float total = 0;
  for (const Vec& sum : sums) total += sum[0];
  return total;
}

// Runs work(thread) on `threads` threads that start together; the time until the last one is done.
template <class Work>
double together(int threads, const Work& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      ++ready;
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      work(t);
    });
  while (ready != threads) std::this_thread::yield();
  const auto begin = Clock::now();
  go.store(true, std::memory_order_release);
  for (std::thread& thread : team) thread.join();
  return seconds_since(begin);
}

template <class Measure>
double best(double seconds, const Measure& measure) {
  double found = measure();
  for (const auto begin = Clock::now(); seconds_since(begin) < seconds;) found = std::min(found, measure());
  return found;
}

}  // namespace

// bytes/s at which `threads` threads read `bytes` again and again, each its own part.
extern "C" double read_bandwidth(int64_t bytes, int threads, double seconds) {
  constexpr int64_t kGrain = 8 * sizeof(Vec);
  const int64_t part = std::max<int64_t>(1, bytes / threads / kGrain) * 8;  // vectors
  std::vector<void*> parts;
  for (int t = 0; t < threads; ++t) {
    parts.push_back(aligned_alloc(4096, (part * sizeof(Vec) + 4095) / 4096 * 4096));
    std::memset(parts.back(), 0, part * sizeof(Vec));
  }
  const int64_t repeats = std::max<int64_t>(1, int64_t(64 << 20) / (part * int64_t(sizeof(Vec))));
  std::atomic<float> sink{0};
  const double time = best(seconds, [&] { return together(threads, [&](int t) { sink = read(static_cast<const Vec*>(parts[t]), part, repeats); }); });
  for (void* memory : parts) free(memory);
  return double(part * sizeof(Vec)) * threads * repeats / time;
}

// Seconds in which `threads` threads meet once, each counting in a cache line of its own.
extern "C" double meeting_seconds(int threads, double seconds) {
  struct alignas(128) Count { std::atomic<int64_t> reached{0}; };
  constexpr int64_t kMeetings = 10000;
  return best(seconds, [&] {
    std::vector<Count> counts(threads);
    return together(threads, [&](int t) {
      for (int64_t meeting = 1; meeting <= kMeetings; ++meeting) {
        counts[t].reached.store(meeting, std::memory_order_release);
        for (Count& other : counts)
          for (int spins = 0; other.reached.load(std::memory_order_acquire) < meeting;)
            if (++spins > 4096) std::this_thread::yield();
      }
    });
  }) / kMeetings;
}
