// Which instruction sets the library was built for, which the processor has, and which one a call uses.
#pragma once
#include <vector>

namespace fusedrnn {

enum class Isa { kBaseline, kAvx2, kAvx512 };

const char* isa_name(Isa isa);        // "baseline", "avx2", "avx512": the words FUSEDRNN_CPU_ISA knows
std::vector<Isa> available_isas();    // built in and supported by this processor, the best last
// The best one, or the one that the environment variable FUSEDRNN_CPU_ISA names. It is read at every call.
// Throws std::runtime_error if the name is unknown or that instruction set is not available.
Isa selected_isa();
// Whether a call on packed weights takes AVX-512's products of pairs besides (VNNI and BF16): where the processor has them, and
// FUSEDRNN_CPU_ISA names no instruction set.
bool selects_dots();

}  // namespace fusedrnn
