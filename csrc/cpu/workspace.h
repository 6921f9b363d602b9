// Memory for what an engine needs during a call of an operator.
#pragma once
#include <cstring>

#include "../operators.h"

namespace fusedrnn {

// Runs an engine in memory of its own. A small one lies on the stack and costs no allocation. It is filled with NaN, as
// torch can be asked to fill what it allocates (torch.utils.deterministic), so that a number read before it is written
// shows.
template <class Params>
void run_in_workspace(const Tensor& like, const Params& p, int64_t (*workspace_of)(const Params&),
                      void (*engine)(const Params&, void*)) {
  constexpr int64_t kOnStack = 64 << 10;  // half of the smallest stack that a thread commonly has (musl)
  const int64_t bytes = workspace_of(p);
  if (bytes > kOnStack) return engine(p, allocate(like, {bytes}, ScalarType::Byte).data_ptr());
  alignas(64) unsigned char workspace[kOnStack];
  std::memset(workspace, 0xff, size_t(bytes));
  engine(p, workspace);
}

}  // namespace fusedrnn
