// The one machine that kernels run on, and what a thread can do about itself: fail, wait, give way, wake another.
//
// All CUDA threads run on the operating system's thread that calls synchronize(), one at a time. A thread runs until it
// comes to an operation that waits or gives way; then the host fiber (launch.h) continues another.
#pragma once
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "options.h"
#include "schedule.h"
#include "state.h"

namespace cuda_on_host {

// What has happened since configure(): for tests that want to know that something did.
struct Statistics {
  uint64_t grids = 0, blocks = 0, switches = 0, barriers = 0, collectives = 0;
  uint64_t most_grids = 0;   // that ran at once
  uint64_t most_blocks = 0;  // that were resident at once
};

struct Machine {
  Options options;
  Random random{options.seed};
  Statistics statistics;
  std::deque<std::unique_ptr<Grid>> queued;   // launched, not started
  std::deque<std::unique_ptr<Grid>> running;  // started, not complete; in stream order
  ReadyList ready;
  Fiber host;
  std::string error;            // of the first thread that failed
  uint64_t grids_launched = 0;
  unsigned threads_alive = 0;
  uint64_t spins = 0;           // times that threads spun since one did anything else
  unsigned polls = 0;           // times that a thread called ld_acquire since it was continued
  bool may_start = false;       // something happened that can let a block or a grid start
  // Things that are reused:
  std::vector<std::unique_ptr<Block>> live_blocks, spare_blocks;
  std::vector<std::unique_ptr<Thread>> threads;  // all there are
  std::vector<Thread*> spare_threads;
  std::deque<Thread*> retired_threads;  // spare, but not to be reused before a grid that comes after all they did
  std::shared_ptr<HappensBefore> host_before;  // what the host did before synchronize()
};

// Never destroyed: its fibers cannot end orderly when the process exits.
inline Machine& machine = *new Machine;
inline Thread* current = nullptr;  // who runs; null in the host

inline Options& options() { return machine.options; }
inline Statistics& statistics() { return machine.statistics; }

// All that follows is the same for the same order and seed.
inline void configure(int order, uint64_t seed) {
  machine.options.order = order;
  machine.options.seed = seed;
  machine.random.state = seed;
  machine.statistics = Statistics{};
}

inline std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}
inline std::string text(const dim3& size) { return text(uint3{size.x, size.y, size.z}); }
inline std::string text(const Thread& thread) { return "block " + text(thread.block->index) + " thread " + text(thread.index); }

// Ends the run: says what is wrong with what the calling thread does, in the name of its kernel.
[[noreturn]] inline void fail(const std::string& what) {
  Quiet quiet;
  {
    const Grid& grid = *current->block->grid;
    if (machine.error.empty()) machine.error = std::string(grid.launch.name) + ": " + what + " [" + text(*current) + "]";
  }
  current->state = ThreadState::kDone;
  current->fiber.switch_to(machine.host);
  __builtin_unreachable();
}

[[noreturn]] inline void fail(const Site& site, const std::string& what) { fail(text(site) + ": " + what); }

// The calling thread waits until another wakes it.
inline void wait_in(const Site& site) {
  current->state = ThreadState::kWaiting;
  current->site = site;
  current->fiber.switch_to(machine.host);
}

inline void wake(Thread& thread) {
  thread.state = ThreadState::kReady;
  machine.ready.add(thread);
}

// The calling thread lets others run.
inline void give_way(const Site& site) {
  current->site = site;
  machine.ready.add_last(*current);
  current->fiber.switch_to(machine.host);
}

// Called by every operation but spinning: the kernel gets on.
inline void progress() { machine.spins = 0; }

inline bool by_chance() { return machine.options.order == kRandom || machine.options.order == kSkewed; }

}  // namespace cuda_on_host
