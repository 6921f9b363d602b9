// The face of the CPU engine: one table of functions per instruction set, built from the same source.
#pragma once
#include "../params.h"
#include "capability.h"

namespace fusedrnn {

struct CpuEngine {
  int64_t (*forward_workspace)(const ForwardParams&);    // bytes that forward needs
  void (*forward)(const ForwardParams&, void* workspace);
  int64_t (*backward_workspace)(const BackwardParams&);
  void (*backward)(const BackwardParams&, void* workspace);
  int64_t (*grad_weights_workspace)(const GradWeightsParams&);
  void (*grad_weights)(const GradWeightsParams&, void* workspace);
};

const CpuEngine& cpu_engine(Isa isa);

namespace baseline { extern const CpuEngine kEngine; }
namespace avx2 { extern const CpuEngine kEngine; }
namespace avx512 { extern const CpuEngine kEngine; }

}  // namespace fusedrnn
