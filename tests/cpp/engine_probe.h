// What engine_test wants to know of the engine it is linked with.
#pragma once
#include "cpu/engine.h"
#include "params.h"

namespace test {

// How a call with at most `granted` threads is divided; the rest as Division in csrc/cpu/team.h.
struct Shares {
  int granted, strands, slices, members;
};
const fusedrnn::CpuEngine& engine_under_test();
Shares forward_shares(const fusedrnn::ForwardParams& p, int granted);
Shares backward_shares(const fusedrnn::BackwardParams& p, int granted);

}  // namespace test
