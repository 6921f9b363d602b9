// The body of each engine_<isa>.cpp: picks the pass for the cell and the formats of a call.
#include "../cells/cells.h"
#include "backward.h"
#include "engine.h"
#include "forward.h"
#include "grad_weights.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {
namespace {

// Calls fn(Cell{}, F{}, S{}): the cell, the type of the arithmetic, the format in memory.
template <class Fn>
void with_types(const LayerParams& p, const Fn& fn) {
  for_each_cell([&](int id, auto cell) {
    if (id != p.cell) return;
    switch (p.dtype) {
      case Dtype::kFloat32:
        return fn(cell, float{}, float{});
      case Dtype::kFloat64:
        return fn(cell, double{}, double{});
      case Dtype::kBFloat16:
        return fn(cell, float{}, Bf16{});
      case Dtype::kFloat16:
        return fn(cell, float{}, Fp16{});
    }
  });
}

template <template <class, class, class> class Pass, class Params>
int64_t workspace_of(const Params& p) {
  int64_t bytes = 0;
  with_types(p, [&](auto cell, auto f, auto s) {
    Arena arena{nullptr};
    Pass<decltype(cell), decltype(f), decltype(s)>(p, arena);
    bytes = arena.used;
  });
  return bytes;
}

template <template <class, class, class> class Pass, class Params>
void run(const Params& p, void* workspace) {
  with_types(p, [&](auto cell, auto f, auto s) {
    Arena arena{static_cast<char*>(workspace)};
    Pass<decltype(cell), decltype(f), decltype(s)>(p, arena).run();
  });
}

}  // namespace

const CpuEngine kEngine = {workspace_of<ForwardPass, ForwardParams>, run<ForwardPass, ForwardParams>,
                           workspace_of<BackwardPass, BackwardParams>, run<BackwardPass, BackwardParams>,
                           workspace_of<GradWeightsPass, GradWeightsParams>, run<GradWeightsPass, GradWeightsParams>};

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
