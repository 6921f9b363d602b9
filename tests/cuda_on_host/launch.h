// The stream: launches, which grid and which block starts when, the life of a thread, and the loop that runs it all.
//
// Ordinary grids run in waves of resident blocks, since their blocks do not need each other. A grid starts when the one before
// it has completed or, if its launch says that it overlaps, when all blocks of the one before have triggered.
#pragma once
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>

#include "collectives.h"
#include "machine.h"
#include "memory.h"

namespace cuda_on_host {

// ------------------------------------------------------------------------------------------------ the life of a thread

// The block has triggered when all its threads have, or have exited; the grid when all its blocks have.
inline void trigger(Thread& thread) {
  if (std::exchange(thread.triggered, true)) return;
  Block& block = *thread.block;
  if (++block.triggered == block.threads.size() && ++block.grid->blocks_triggered == block.grid->blocks)
    machine.may_start = true;
}

inline void begin_thread() {
  Quiet quiet;
  current->block->grid->before_start->acquire();
}

inline void end_thread() {
  Quiet quiet;
  progress();
  Thread& me = *current;
  Block& block = *me.block;
  Grid& grid = *block.grid;
  if (me.copies.pending()) fail("a thread exits with cp.async copies that it has not waited for");
  if (grid.launch.overlaps_previous && !me.waited)
    fail("a thread exits without grid_dependency_wait: its grid could complete before the one that it overlaps");
  for (const Collective& open : me.warp->open)
    if (open.mask >> me.lane() & 1) fail("warp divergence: a thread exits while other lanes wait for it in " + text(open.site));
  ClusterBarrier& cluster = grid.clusters[block.number / grid.launch.cluster];
  if (me.arrived) fail("a thread exits that has arrived at its cluster's barrier and not waited: others may still use its shared memory");
  if (cluster.arrived) fail("barrier divergence: a thread exits while others of its cluster wait for it");
  ++cluster.exited;
  for (const Barrier* barrier : {&block.barriers[0], &grid.barrier})
    if (!barrier->waiting.empty())
      fail("barrier divergence: a thread exits while others (" + text(*barrier->waiting[0]) + ") wait in " +
           text(barrier->site));
  grid.complete->release();
  trigger(me);
  me.warp->alive &= ~(1u << me.lane());
  --block.alive;
  ++grid.threads_exited;
  --machine.threads_alive;
  me.state = ThreadState::kDone;
}

// What every fiber runs: one CUDA thread after another.
inline void thread_main() {
  current->fiber.arrive(machine.host);
  for (;;) {
    begin_thread();
    std::string thrown;
    try {
      current->block->grid->body();
    } catch (const std::exception& e) {
      thrown = e.what();
    } catch (...) {
      thrown = "something that is no std::exception";
    }
    if (!thrown.empty()) fail("a thread throws: " + thrown);
    end_thread();
    current->fiber.switch_to(machine.host);
  }
}

// ----------------------------------------------------------------------------------------- programmatic dependent launch

// griddepcontrol.launch_dependents: the next grid, if it overlaps, may start when all of this one's blocks have come here.
inline void grid_dependency_trigger() {
  Quiet quiet;
  progress();
  trigger(*current);
  const bool awaited = !machine.queued.empty() && machine.queued.front()->launch.overlaps_previous;
  if (awaited && machine.options.order != kInOrder) give_way({"grid_dependency_trigger", "", 0});
}

// griddepcontrol.wait: until the grid before has completed and all that it wrote can be seen.
inline void grid_dependency_wait(CUDA_ON_HOST_SITE) {
  Quiet quiet;
  progress();
  Thread& me = *current;
  Grid& grid = *me.block->grid;
  me.waited = true;
  if (!grid.previous_complete) {
    for (auto& running : machine.running)
      if (running->number + 1 == grid.number) running->dependents.push_back(&me);
    wait_in({"grid_dependency_wait", file, line});
  }
  if (grid.launch.overlaps_previous) grid.before_wait->acquire();
}

// ------------------------------------------------------------------------------------------------------ threads, blocks

inline Thread& spare_thread() {
  // ThreadSanitizer takes the next thread on a fiber to come after the last. As long as it has fibers enough, none is reused
  // for a thread that must not be thought to come after.
  if (machine.spare_threads.empty() && !machine.retired_threads.empty() && machine.threads.size() >= kFreshThreads) {
    machine.spare_threads.push_back(machine.retired_threads.front());
    machine.retired_threads.pop_front();
  }
  if (machine.spare_threads.empty()) {
    machine.threads.push_back(std::make_unique<Thread>(machine.options.stack_bytes, thread_main));
    machine.spare_threads.push_back(machine.threads.back().get());
  }
  Thread& thread = *machine.spare_threads.back();
  machine.spare_threads.pop_back();
  return thread;
}

inline uint3 position(uint64_t number, const dim3& size) {
  return {unsigned(number % size.x), unsigned(number / size.x % size.y), unsigned(number / size.x / size.y)};
}

inline void start_block(Grid& grid) {
  if (machine.spare_blocks.empty()) machine.spare_blocks.push_back(std::make_unique<Block>());
  machine.live_blocks.push_back(std::move(machine.spare_blocks.back()));
  machine.spare_blocks.pop_back();
  Block& block = *machine.live_blocks.back();
  block.grid = &grid;
  block.number = (grid.blocks_started++ * grid.stride + grid.offset) % grid.blocks;
  block.index = position(block.number, grid.launch.grid);
  block.alive = grid.threads;
  block.triggered = 0;
  for (Barrier& barrier : block.barriers) barrier.reset();
  block.warps.resize((grid.threads + 31) / 32);
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    const unsigned lanes = std::min(32u, grid.threads - unsigned(i) * 32);
    warp.block = &block;
    warp.number = unsigned(i);
    warp.alive = lanes == 32 ? kWholeWarp : (1u << lanes) - 1;
    warp.open.clear();
    warp.meetings = 0;
    for (HappensBefore& before : warp.before) before.forget();
  }
  machine.ready.admit(block);
  block.threads.clear();
  machine.threads_alive += grid.threads;
  for (unsigned i = 0; i < grid.threads; ++i) {
    Thread& thread = spare_thread();
    thread.block = &block;
    thread.warp = &block.warps[i / 32];
    thread.index = position(i, grid.launch.block);
    thread.number = i;
    thread.site = {};
    thread.copies.clear();
    thread.arrays_taken = 0;
    thread.triggered = thread.waited = thread.arrived = false;
    block.threads.push_back(&thread);
    wake(thread);
  }
  ++machine.statistics.blocks;
  machine.statistics.most_blocks = std::max(machine.statistics.most_blocks, uint64_t(machine.live_blocks.size()));
}

inline void finish_block(Block& block) {
  Grid& grid = *block.grid;
  if (!release_shared(block) && machine.error.empty())
    machine.error = std::string(grid.launch.name) + ": a thread wrote behind an array of shared memory [block " +
                    text(block.index) + "]";
  for (Thread* thread : block.threads) {
    if (kThreadSanitizer) machine.retired_threads.push_back(thread);
    else machine.spare_threads.push_back(thread);
  }
  ++grid.blocks_finished;
  machine.may_start = true;
  auto& live = machine.live_blocks;
  auto found = std::find_if(live.begin(), live.end(), [&](const auto& candidate) { return candidate.get() == &block; });
  std::swap(*found, live.back());
  machine.spare_blocks.push_back(std::move(live.back()));
  live.pop_back();
}

// -------------------------------------------------------------------------------------------------------------- grids

inline void check_launch(const Launch& launch) {
  auto require = [&](bool met, const std::string& what) {
    if (!met) throw Error(std::string(launch.name) + ": cannot be launched: " + what);
  };
  const dim3 &grid = launch.grid, &block = launch.block;
  constexpr size_t kMostShared = 227 << 10;  // of compute capability 9.0
  require(grid.x && grid.y && grid.z && block.x && block.y && block.z, "grid " + text(grid) + " of blocks " + text(block));
  require(grid.x < 1u << 31 && grid.y <= 65535 && grid.z <= 65535, "grid " + text(grid) + " exceeds (2^31-1,65535,65535)");
  require(block.x <= 1024 && block.y <= 1024 && block.z <= 64, "block " + text(block) + " exceeds (1024,1024,64)");
  require(uint64_t(block.x) * block.y * block.z <= 1024, "block " + text(block) + " has more than 1024 threads");
  require(launch.shared_bytes <= kMostShared, std::to_string(launch.shared_bytes) + " bytes of shared memory exceed 227 KiB");
  constexpr unsigned kMostCluster = 8;  // that every chip with clusters has
  require(launch.cluster >= 1 && launch.cluster <= kMostCluster && grid.x % launch.cluster == 0,
          "clusters of " + std::to_string(launch.cluster) + " blocks");
  const double blocks = double(grid.x) * grid.y * grid.z;
  require(!launch.cooperative || blocks <= launch.most_resident,
          "its blocks wait for each other, and there is room for " + std::to_string(launch.most_resident) + " at once");
  require(launch.cluster == 1 || launch.cooperative, "clusters are modelled in cooperative grids only");
  const double threads = blocks * block.x * block.y * block.z;
  require(!launch.cooperative || threads <= kMostThreads, "a cooperative grid of more than " + std::to_string(kMostThreads) +
                                                              " threads cannot be resident here");
}

// Puts a grid into the stream. Its threads call body(), which calls the kernel. If it cannot be launched, throws Error, and what
// was queued before is forgotten: the caller, who unwinds now, may own what it refers to.
inline void launch(const Launch& launch, std::function<void()> body) {
  if (current) fail("launch() in a kernel");
  try {
    check_launch(launch);
  } catch (const Error&) {
    machine.queued.clear();
    throw;
  }
  auto grid = std::make_unique<Grid>();
  grid->launch = launch;
  grid->body = std::move(body);
  grid->number = machine.grids_launched++;
  grid->blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  grid->threads = launch.block.x * launch.block.y * launch.block.z;
  grid->clusters.resize(size_t(grid->blocks / launch.cluster));
  machine.queued.push_back(std::move(grid));
}

inline bool may_start(const Grid& grid) {
  if (machine.running.empty()) return true;
  const Grid& previous = *machine.running.back();
  return grid.launch.overlaps_previous && machine.options.order != kInOrder && previous.blocks_triggered == previous.blocks &&
         machine.running.size() < machine.options.resident_grids;
}

// Blocks start in the order of their numbers, or backwards, or in steps of a number that has no divisor in common with theirs.
inline void choose_block_order(Grid& grid) {
  if (machine.options.order == kReverse) {
    grid.stride = grid.blocks - 1;
    grid.offset = grid.blocks - 1;
  } else if (by_chance()) {
    do grid.stride = 1 + machine.random.below(std::min<uint64_t>(grid.blocks, 1 << 30));
    while (std::gcd(grid.stride, grid.blocks) != 1);
    grid.offset = machine.random.below(grid.blocks);
  }
}

inline void start_grid(std::shared_ptr<HappensBefore>& last_start, std::shared_ptr<HappensBefore>& last_complete) {
  machine.running.push_back(std::move(machine.queued.front()));
  machine.queued.pop_front();
  Grid& grid = *machine.running.back();
  grid.previous_complete = machine.running.size() == 1;
  if (!grid.launch.overlaps_previous) {  // its threads come after all that ran before
    machine.spare_threads.insert(machine.spare_threads.end(), machine.retired_threads.begin(), machine.retired_threads.end());
    machine.retired_threads.clear();
  }
  choose_block_order(grid);
  const auto& options = machine.options;
  const uint64_t wave = std::max(1u, std::min(options.resident_blocks, kMostWaveThreads / grid.threads));
  grid.resident = grid.launch.cooperative ? grid.blocks : std::min(grid.blocks, wave);
  grid.before_start = grid.launch.overlaps_previous ? last_start : last_complete;
  grid.before_wait = last_complete;
  grid.complete = std::make_shared<HappensBefore>();
  last_start = grid.before_start;
  last_complete = grid.complete;
  ++machine.statistics.grids;
  machine.statistics.most_grids = std::max(machine.statistics.most_grids, uint64_t(machine.running.size()));
}

// The oldest grid has completed: those that depend on it may go on.
inline void complete_grid() {
  const std::unique_ptr<Grid> grid = std::move(machine.running.front());
  machine.running.pop_front();
  for (Thread* thread : grid->dependents) wake(*thread);
  if (!machine.running.empty()) machine.running.front()->previous_complete = true;
}

// ----------------------------------------------------------------------------------------------------------- the loop

// Where the threads that wait do so, and how many in each place.
inline std::string waiting_places() {
  std::map<std::string, unsigned> places;
  for (const auto& block : machine.live_blocks)
    for (const Thread* thread : block->threads)
      if (thread->state == ThreadState::kWaiting)
        ++places["block " + text(block->index) + " of " + block->grid->launch.name + " in " + text(thread->site)];
  std::string list;
  constexpr size_t kMostPlaces = 6;
  size_t shown = 0;
  for (const auto& [place, threads] : places) {
    if (++shown > kMostPlaces) return list + ", and " + std::to_string(places.size() - kMostPlaces) + " more places";
    list += (shown == 1 ? "" : ", ") + std::to_string(threads) + (threads == 1 ? " thread of " : " threads of ") + place;
  }
  return list;
}

// Gives up on all that runs and waits to run. The fibers stay where they are and are not used again.
inline void abandon_all() {
  HappensBefore end;
  for (const auto& block : machine.live_blocks) {
    release_shared(*block);
    for (Thread* thread : block->threads) thread->fiber.abandon(end);
  }
  for (const auto& grid : machine.running) grid->complete->acquire();
  end.acquire();
  std::erase_if(machine.threads, [](const auto& thread) { return thread->fiber.abandoned(); });
  machine.live_blocks.clear();
  machine.running.clear();
  machine.queued.clear();
  machine.threads_alive = 0;
}

// Runs until nothing is left to run or something is wrong.
inline void run_all() {
  std::shared_ptr<HappensBefore> last_start = machine.host_before, last_complete = machine.host_before;
  machine.may_start = true;
  for (;;) {
    if (machine.may_start) {
      machine.may_start = false;
      auto& running = machine.running;
      while (!running.empty() && running.front()->blocks_finished == running.front()->blocks) complete_grid();
      while (!machine.queued.empty() && may_start(*machine.queued.front())) start_grid(last_start, last_complete);
      for (auto& grid : running)
        while (grid->blocks_started < grid->blocks && grid->blocks_started - grid->blocks_finished < grid->resident)
          start_block(*grid);
    }
    if (machine.ready.empty()) {
      if (!machine.running.empty()) machine.error = "deadlock: " + waiting_places();
      break;
    }
    Thread& next = machine.ready.take();
    ++machine.statistics.switches;
    current = &next;
    machine.polls = 0;
    machine.host.switch_to(next.fiber);
    current = nullptr;
    if (!machine.error.empty()) break;
    if (next.state == ThreadState::kDone && next.block->alive == 0) finish_block(*next.block);
    if (!machine.error.empty()) break;
  }
  last_complete->acquire();
}

// Runs all that has been launched; throws Error if anything was wrong, and then has forgotten the rest.
inline void synchronize() {
  std::string error;
  {
    Quiet quiet;
    if (current) fail("synchronize() in a kernel");
    machine.host.adopt_host();
    machine.host_before = std::make_shared<HappensBefore>();
    machine.host_before->release();
    machine.ready.reset(machine.options.order, &machine.random);
    machine.spins = 0;
    try {
      run_all();
    } catch (const Error& none_left) {  // of the memory for stacks
      machine.error = none_left.what();
    }
    error = std::exchange(machine.error, {});
    if (!error.empty()) abandon_all();
  }
  if (!error.empty()) throw Error(error);
}

}  // namespace cuda_on_host
