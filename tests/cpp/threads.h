// The OpenMP runtime of the test programs (threads.cpp): what the engines ask of it, and what a test may ask.
#pragma once

namespace test {

struct TeamControl {
  int granted = 1 << 20;         // at most so many threads are given, whatever is asked for
  int skipped = -1;              // this one of the engine's barriers does not wait (in builds whose barriers can be left out)
  bool delays = false;           // random pauses at the start of a thread and at barriers
};
extern thread_local TeamControl control;  // of the calling thread's next parallel regions
int most_asked();                // the most threads asked for since the last call of this
long barriers_met();             // how often a thread came to a barrier that can be left out, ever

}  // namespace test

// Called by test builds of the engine in front of barrier number `barrier`: whether to wait at it.
extern "C" bool fusedrnn_test_barrier(int barrier);
