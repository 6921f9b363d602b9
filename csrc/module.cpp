// The Python module fusedrnn._C: what the library is and what the processor can do. It reports and computes nothing, and
// it knows no torch, so it can say what is wrong where the operators themselves do not load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "build_record.h"
#include "cells/cells.h"
#include "cpu/capability.h"
#include "cuda/plan.h"
#include "pages.h"

namespace py = pybind11;

namespace {

// The record setup.py wrote when it built this file, as a dict.
py::object build_record() { return py::module_::import("json").attr("loads")(kBuildRecord); }

template <class Cell>
py::dict traits_of() {
  std::vector<int> x_pre, h_pre;
  for (int gate = 0; gate < Cell::kGates; ++gate) {
    x_pre.push_back(Cell::x_pre(gate));
    h_pre.push_back(Cell::h_pre(gate));
  }
  using namespace py::literals;
  const int gates = Cell::kGates, pre = Cell::kPre, states = Cell::kStates, saved = Cell::kSaved, unit = Cell::kUnit;
  const int norms = Cell::kNorms, late = Cell::kLate;
  const bool chooses = Cell::kChooses, multiplies = Cell::kMultiplies;
  return py::dict("gates"_a = gates, "pre"_a = pre, "states"_a = states, "saved"_a = saved, "unit"_a = unit,
                  "norms"_a = norms, "late"_a = late, "chooses"_a = chooses, "multiplies"_a = multiplies, "x_pre"_a = x_pre, "h_pre"_a = h_pre);
}

py::dict cell_traits() {
  py::dict traits;
  fusedrnn::for_each_cell([&](int, auto cell) { traits[decltype(cell)::kName] = traits_of<decltype(cell)>(); });
  return traits;
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (fusedrnn::Isa isa : fusedrnn::available_isas()) names.push_back(fusedrnn::isa_name(isa));
  return names;
}

py::dict describe(const fusedrnn::ProductPlan& plan) {
  using namespace py::literals;
  return py::dict("blocks"_a = plan.blocks(), "threads"_a = plan.threads(), "shared_bytes"_a = plan.shared_bytes,
                  "unit_tiles"_a = plan.unit_tiles, "sharers"_a = plan.sharers, "batch_tiles"_a = plan.batch_tiles, "block_rows"_a = plan.block_rows,
                  "depth_blocks"_a = plan.depth_blocks, "tiles"_a = plan.tiles, "split"_a = plan.split, "groups"_a = plan.groups, "slots"_a = plan.slots,
                  "regime"_a = fusedrnn::kRegimeNames[int(plan.regime)]);
}

fusedrnn::Dtype dtype_named(const std::string& dtype) {  // as torch names it
  const char* names[] = {"float32", "float64", "bfloat16", "float16"};  // in the order of Dtype
  const auto* name = std::find(std::begin(names), std::end(names), dtype);
  if (name == std::end(names)) throw py::value_error("dtype must be float32, float64, bfloat16 or float16, got '" + dtype + "'");
  return fusedrnn::Dtype(name - names);
}

fusedrnn::CellKind kind_named(const std::string& cell) {
  fusedrnn::CellKind kind{};
  fusedrnn::for_each_cell([&](int, auto type) {
    if (cell == decltype(type)::kName) kind = fusedrnn::kKindOf<decltype(type)>;
  });
  if (!kind.gates) throw py::value_error("there is no cell '" + cell + "'");
  return kind;
}

// How a chip would be given a layer's steps. P = H where there is no projection.
py::dict cuda_plan(const std::string& cell, const std::string& dtype, int64_t T, int64_t B, int64_t H, int64_t P, int64_t D, int64_t N,
                   int multiprocessors, int64_t shared_bytes, int major, bool tf32, const std::string& kernel) {
  using namespace py::literals;
  fusedrnn::LayerParams p{};
  p.dtype = dtype_named(dtype);
  p.steps.T = T, p.steps.B = B, p.H = H, p.P = P, p.D = D, p.N = N;
  if (P != H) p.weight_hr[0] = &p;  // there is one; plans do not look at it
  const fusedrnn::Regimes regimes = fusedrnn::regimes_named(kernel);
  const fusedrnn::StepPlan plan = fusedrnn::plan_step({multiprocessors, shared_bytes, major}, p, kind_named(cell), tf32, regimes);
  return py::dict("cell"_a = describe(plan.cell), "projection"_a = describe(plan.projection), "dh"_a = describe(plan.dh),
                  "dunprojected"_a = describe(plan.dunprojected));
}

// How many of `layers` layers, one upon the other, a chip would run in one grid, 1 where each goes by itself; and how it would, forward and backward.
py::tuple cuda_stack(const std::string& cell, const std::string& dtype, int64_t T, int64_t B, int64_t H, int64_t layers,
                     int multiprocessors, int64_t shared_bytes, int major, bool tf32, bool wanted) {
  fusedrnn::LayerParams p{};
  p.dtype = dtype_named(dtype);
  p.steps.T = T, p.steps.B = B, p.H = p.P = H, p.D = 1;
  const fusedrnn::Chip chip{multiprocessors, shared_bytes, major};
  const fusedrnn::CellKind kind = kind_named(cell);
  const int64_t found = fusedrnn::plan_stack(chip, p, kind, tf32, layers, wanted);
  fusedrnn::ProductPlan back = fusedrnn::plan_stacked(chip, p, kind, tf32, found, true);
  if (!wanted && !fusedrnn::stacks_backward(back, p, tf32, found)) back = {};
  return py::make_tuple(found, describe(fusedrnn::plan_stacked(chip, p, kind, tf32, found, false)), describe(back));
}

// Which kernels each cell has in a format.
py::dict cuda_kernels(const std::string& dtype) {
  py::dict kernels;
  fusedrnn::for_each_cell([&](int, auto cell) {
    const fusedrnn::CellKind kind = fusedrnn::kKindOf<decltype(cell)>;
    const fusedrnn::Regime first = kind.multiplies ? fusedrnn::Regime::kStep : fusedrnn::Regime::kAlone;
    const char* const* name = fusedrnn::kRegimeNames + int(first);
    kernels[decltype(cell)::kName] = std::vector<std::string>(name, name + (stays(kind, dtype == "float64") ? fusedrnn::kChosenRegimes : 1));
  });
  return kernels;
}

std::string cpu_isa() { return fusedrnn::isa_name(fusedrnn::selected_isa()); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_record", &build_record, "dict: version, compiler, flags, torch and instruction sets of this build");
  m.def("cell_traits", &cell_traits, "{cell: {gates, pre, states, saved, unit, norms, late, chooses, multiplies, x_pre: [gates], h_pre: [gates]}}");
  m.def("cpu_isas", &cpu_isas, "instruction sets that were built and that this processor has, the best last");
  m.def("cuda_plan", &cuda_plan, py::arg("cell"), py::arg("dtype"), py::kw_only(), py::arg("T"), py::arg("B"), py::arg("H"), py::arg("P"),
        py::arg("D"), py::arg("N") = 1, py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("major") = 9,
        py::arg("tf32") = false, py::arg("kernel") = "",
        "{kernel: {blocks and threads of its grid, what they take of the sums}} of the kernels on such a GPU");
  m.def("cuda_stack", &cuda_stack, py::arg("cell"), py::arg("dtype"), py::kw_only(), py::arg("T"), py::arg("B"), py::arg("H"),
        py::arg("layers"), py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("major") = 9, py::arg("tf32") = false,
        py::arg("wanted") = false,
        "(how many layers of a stack go in one grid on such a GPU, 1: each by itself; what that grid's blocks take forward, and backward, of regime step: each by itself). "
        "wanted: wherever they fit");
  m.def("cuda_kernels", &cuda_kernels, py::arg("dtype") = "float32", "{cell: [names of the kernels that run its steps on a GPU]}");
  m.def("want_large_pages", [](uintptr_t data, int64_t bytes) { fusedrnn::want_large_pages(reinterpret_cast<void*>(data), bytes); },
        py::arg("data"), py::arg("bytes"), "ask for large pages under memory that nobody has written yet (csrc/pages.h)");
  m.def("cpu_isa", &cpu_isa, "the instruction set that a call would use now; RuntimeError if FUSEDRNN_CPU_ISA is wrong");
}
