// What there is while kernels run: threads in warps in blocks in grids, and the barriers they meet at. Only data; who may
// change it when is said where it is done.
#pragma once
#include <vector_types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "error.h"
#include "fiber.h"
#include "sanitize.h"

namespace cuda_on_host {

// One kernel launch, as the host asks for it.
struct Launch {
  const char* name;            // for messages; a literal, or alive until synchronize()
  dim3 grid, block;
  size_t shared_bytes;         // dynamic shared memory of a block
  bool overlaps_previous;      // programmatic dependent launch: may start before the previous grid has completed
  bool cooperative = false;    // all blocks are resident at once, so that they may wait for each other
  unsigned most_resident = ~0u;  // blocks of a cooperative grid that the device has room for
  unsigned cluster = 1;        // blocks, side by side in x, that may use each other's shared memory; of a cooperative grid only
};

struct Block;
struct Grid;
struct Thread;

// Where counted threads meet: a block's sixteen barriers and a grid's one. Empty between two meetings.
struct Barrier {
  unsigned expected = 0;
  Site site;                     // of the first to arrive
  std::vector<Thread*> waiting;  // all that have arrived
  // Meetings take turns with two, so that who wakes late does not know what those who arrived at the next meeting did.
  HappensBefore before[2];
  unsigned meetings = 0;

  void reset() {
    waiting.clear();
    before[0].forget();
    before[1].forget();
  }
};

// Where the threads of a cluster meet, in two halves: arriving, and waiting.
struct ClusterBarrier {
  unsigned arrived = 0;
  uint64_t meetings = 0;  // that are over
  uint64_t exited = 0;    // threads
  std::vector<Thread*> waiting;
  HappensBefore before[2];  // see Barrier
};

// An operation that the lanes of `mask` carry out together, and of which not all have arrived.
struct Collective {
  unsigned mask, arrived;
  Site site;
  void* operands[32];  // of each lane, on its stack
};

struct Warp {
  Block* block;
  unsigned number;       // in the block
  unsigned alive;        // lanes that have not exited
  std::vector<Collective> open;
  HappensBefore before[2];  // of __syncwarp; see Barrier
  unsigned meetings;
  // Kept by ReadyList in skewed order:
  std::vector<Thread*> ready;
  int64_t priority;
  size_t place;

  Thread* lane(unsigned i) const;
};

// The copies of cp.async that one thread has asked for, in order, and where its groups end among them.
struct AsyncCopies {
  struct Copy {
    void* to;
    const void* from;
    size_t bytes, source_bytes;
    bool done;
  };
  std::vector<Copy> copies;
  std::vector<size_t> group_ends;
  size_t groups_waited = 0;

  size_t first_pending() const { return groups_waited ? group_ends[groups_waited - 1] : 0; }
  bool pending() const { return copies.size() > first_pending(); }
  void clear() {
    copies.clear();
    group_ends.clear();
    groups_waited = 0;
  }
};

enum class ThreadState { kReady, kWaiting, kDone };

// A CUDA thread. Threads are reused: the fiber's entry is a loop that runs one after another.
struct Thread {
  Thread(size_t stack_bytes, void (*entry)()) : fiber(stack_bytes, entry) {}

  Fiber fiber;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  unsigned number = 0;  // in the block; x varies fastest
  ThreadState state = ThreadState::kDone;
  Site site;              // what it waits in
  AsyncCopies copies;
  size_t arrays_taken = 0;  // of shared memory
  bool triggered = false, waited = false;  // griddepcontrol
  bool arrived = false;                    // at the cluster's barrier, and has not waited
  uint64_t meeting = 0;                    // of that barrier

  unsigned lane() const { return number % 32; }
};

struct SharedArray {
  unsigned char* data;
  size_t bytes;
};

struct Block {
  Grid* grid = nullptr;
  uint3 index{};
  uint64_t number = 0;     // in the grid; x varies fastest
  unsigned alive = 0;      // threads that have not exited
  unsigned triggered = 0;  // threads that have called grid_dependency_trigger, or exited
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];  // 0 is __syncthreads
  std::vector<SharedArray> shared;
  size_t shared_used = 0;
};

struct Grid {
  Launch launch{};
  std::function<void()> body;
  uint64_t number = 0;  // in the stream
  uint64_t blocks = 0;
  unsigned threads = 0;  // of a block
  uint64_t blocks_started = 0, blocks_finished = 0, blocks_triggered = 0;
  uint64_t threads_exited = 0;
  uint64_t resident = 1;            // at most so many blocks at a time
  uint64_t stride = 1, offset = 0;  // the i-th block to start is number (i * stride + offset) % blocks
  Barrier barrier;                  // grid_sync
  std::vector<ClusterBarrier> clusters;
  std::vector<Thread*> dependents;  // threads of the next grid that wait for this one to complete
  bool previous_complete = true;
  // What orders memory between grids: what a thread comes after when it starts, what its wait comes after, what it precedes.
  std::shared_ptr<HappensBefore> before_start, before_wait, complete;
};

inline Thread* Warp::lane(unsigned i) const { return block->threads[number * 32 + i]; }

}  // namespace cuda_on_host
