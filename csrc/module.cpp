// The Python module fusedrnn._C: what the library is and what the processor can do. It reports and computes nothing, and
// it knows no torch, so it can say what is wrong where the operators themselves do not load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "build_record.h"
#include "cells/cells.h"
#include "cpu/capability.h"

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
  const int gates = Cell::kGates, pre = Cell::kPre, states = Cell::kStates, saved = Cell::kSaved;
  return py::dict("gates"_a = gates, "pre"_a = pre, "states"_a = states, "saved"_a = saved, "x_pre"_a = x_pre,
                  "h_pre"_a = h_pre);
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

std::string cpu_isa() { return fusedrnn::isa_name(fusedrnn::selected_isa()); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_record", &build_record, "dict: version, compiler, flags, torch and instruction sets of this build");
  m.def("cell_traits", &cell_traits, "{cell: {gates, pre, states, saved, x_pre: [gates], h_pre: [gates]}}");
  m.def("cpu_isas", &cpu_isas, "instruction sets that were built and that this processor has, the best last");
  m.def("cpu_isa", &cpu_isa, "the instruction set that a call would use now; RuntimeError if FUSEDRNN_CPU_ISA is wrong");
}
