#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedrnn {
namespace {

bool supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  return false;
#else
  return isa == Isa::kBaseline;
#endif
}

// What FUSEDRNN_CPU_ISA says, or null.
const char* wanted_isa() {
  const char* wanted = std::getenv("FUSEDRNN_CPU_ISA");
  return wanted && *wanted ? wanted : nullptr;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    default:
      return "baseline";
  }
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512})
    if (supported(isa)) isas.push_back(isa);
  return isas;
}

Isa selected_isa() {
  static const std::vector<Isa> available = available_isas();
  const char* wanted = wanted_isa();
  if (!wanted) return available.back();
  std::string names;
  for (Isa isa : available) {
    if (std::string(wanted) == isa_name(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::runtime_error("fusedrnn: FUSEDRNN_CPU_ISA must be one of " + names + " on this processor, got '" + wanted +
                           "'");
}

bool selects_dots() {
#if defined(__x86_64__)
  static const bool has = supported(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  return has && !wanted_isa();
#else
  return false;
#endif
}

}  // namespace fusedrnn
