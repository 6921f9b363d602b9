// The body of each frozen_<isa>.cpp: picks the pass for the cell and the format of the weights.
#include "../cells/cells.h"
#include "frozen.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {
namespace {

// Calls fn(Pass&) on the pass of these parameters, laid out over `workspace`, and returns the bytes it takes.
template <class Fn>
int64_t with_pass(const FrozenParams& p, void* workspace, const Fn& fn) {
  Arena arena{static_cast<char*>(workspace)};
  for_each_cell([&](int id, auto cell) {
    using Cell = decltype(cell);
    if constexpr (is_of_torch<Cell>) {
      if (id != p.cell) return;
      switch (p.layout.format) {
        case FrozenFormat::kFloat32:
          return fn(FrozenPass<Cell, Float32Lines>(p, arena));
        case FrozenFormat::kBFloat16:
          return fn(FrozenPass<Cell, BFloat16Lines>(p, arena));
        case FrozenFormat::kInt8:
          return fn(FrozenPass<Cell, Int8Lines>(p, arena));
      }
    }
  });
  return arena.used;
}

int64_t frozen_workspace(const FrozenParams& p) { return with_pass(p, nullptr, [](const auto&) {}); }
void frozen_forward(const FrozenParams& p, void* workspace) {
  with_pass(p, workspace, [](const auto& pass) { pass.run(); });
}

}  // namespace

const FrozenEngine kFrozenEngine = {frozen_workspace, frozen_forward};

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
