// How the engine of this instruction set (ENGINE, FUSEDRNN_VECTOR_BYTES) divides a call among threads: engine_test makes sure
// with it that its cases meet every kind of division. In a namespace of its own, and without any of the engine's code.
#define FUSEDRNN_ISA probe
#include <algorithm>

#include "cells/cells.h"
#include "cpu/backward.h"
#include "cpu/engine.h"
#include "cpu/forward.h"
#include "engine_probe.h"

namespace test {
namespace {

using namespace fusedrnn::probe;

template <template <class, class, class> class Pass, class Params>
Shares shares(const Params& p, int granted) {
  Shares found{};
  fusedrnn::for_each_cell([&](int id, auto cell) {
    if (id != p.cell) return;
    auto divide = [&](auto f) {
      using F = decltype(f);
      fusedrnn::Arena arena{nullptr};
      const Pass<decltype(cell), F, F> pass(p, arena);
      const int threads = std::min({granted, p.threads, pass.divide_among(p.threads).threads()});
      const Division division = pass.divide_among(threads);
      found = {threads, division.strands, division.slices, division.members};
    };
    p.dtype == fusedrnn::Dtype::kFloat64 ? divide(double{}) : divide(float{});
  });
  return found;
}

}  // namespace

const fusedrnn::CpuEngine& engine_under_test() { return fusedrnn::ENGINE::kEngine; }
Shares forward_shares(const fusedrnn::ForwardParams& p, int granted) { return shares<ForwardPass>(p, granted); }
Shares backward_shares(const fusedrnn::BackwardParams& p, int granted) { return shares<BackwardPass>(p, granted); }

}  // namespace test
