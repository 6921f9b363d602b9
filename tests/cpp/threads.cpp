// A stand-in for libgomp: a parallel region is that many std::threads. ThreadSanitizer sees their beginning and end, where
// libgomp's own synchronisation is invisible to it; and a test can be given fewer threads than it asked for.
#include "threads.h"

#include <chrono>
#include <thread>
#include <vector>

#include "check.h"

namespace test {
namespace {

thread_local int thread_number = 0, threads_granted = 1;
thread_local Random random_pauses{0};
thread_local TeamControl region;  // control, as it was where the region began
std::atomic<int> asked{0};
std::atomic<long> met{0};

void pause() {
  if (!region.delays) return;
  const int64_t lot = random_pauses.below(16);
  if (lot == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_pauses.below(200)));
  else if (lot < 4) std::this_thread::yield();
}

}  // namespace

thread_local TeamControl control;
int most_asked() { return asked.exchange(0); }
long barriers_met() { return met.load(); }

}  // namespace test

extern "C" {

int omp_get_thread_num() { return test::thread_number; }
int omp_get_num_threads() { return test::threads_granted; }

void GOMP_parallel(void (*work)(void*), void* data, unsigned count, unsigned) {
  using namespace test;
  const TeamControl mine = control;
  const int granted = int(count) < mine.granted ? int(count) : mine.granted;
  for (int seen = asked; seen < int(count) && !asked.compare_exchange_weak(seen, int(count));) {}
  auto member = [=](int number) {
    thread_number = number;
    threads_granted = granted;
    region = mine;
    random_pauses.state += uint64_t(number) * 7919 + 1;
    pause();
    work(data);
  };
  std::vector<std::thread> others;
  for (int number = 1; number < granted; ++number) others.emplace_back(member, number);
  member(0);
  for (std::thread& other : others) other.join();
  thread_number = 0;
  threads_granted = 1;
}

bool fusedrnn_test_barrier(int barrier) {
  // Not a synchronisation: relaxed, lest it hide a race.
  test::met.fetch_add(1, std::memory_order_relaxed);
  test::pause();
  return barrier != test::region.skipped;
}

}  // extern "C"
