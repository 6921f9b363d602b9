// The operators of the CPU, and the schemas of all devices.
#include "cpu/on_cpu.h"
#include "stack_operators.h"

namespace fusedrnn {

const CpuEngine& cpu_engine(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return avx2::kEngine;
  if (isa == Isa::kAvx512) return avx512::kEngine;
#endif
  (void)isa;
  return baseline::kEngine;
}

namespace {

// The layers of a stack are in one grid of a GPU's; a CPU has no such kernel, and runs them one after the other.
struct NoStack : OnCpu {
  using OnCpu::OnCpu;
  static void refuse(const char* op) { STD_TORCH_CHECK(false, op, ": weight_hh must be on a CUDA device, got one on the CPU"); }
  void stack(const StackParams&) const { refuse("fusedrnn::stack_forward"); }
  void stack_backward(const StackBackwardParams&, const Needs&, std::deque<NoStack>&) const { refuse("fusedrnn::stack_backward"); }
};

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY(fusedrnn, m) {
  m.def(fusedrnn::kForwardSchema);
  m.def(fusedrnn::kBackwardSchema);
  m.def(fusedrnn::in_place_schema().c_str());
  m.def(fusedrnn::kStackSchema);
  m.def(fusedrnn::kStackBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("recurrence_forward", TORCH_BOX(&fusedrnn::recurrence_forward<fusedrnn::OnCpu>));
  m.impl("recurrence_backward", TORCH_BOX(&fusedrnn::recurrence_backward<fusedrnn::OnCpu>));
  m.impl("recurrence_backward_", TORCH_BOX((&fusedrnn::recurrence_backward<fusedrnn::OnCpu, true>)));
  m.impl("stack_forward", TORCH_BOX(&fusedrnn::stack_forward<fusedrnn::NoStack>));
  m.impl("stack_backward", TORCH_BOX(&fusedrnn::stack_backward<fusedrnn::NoStack>));
}
