// Which instruction set the CPU kernels run on.
#pragma once

#include <string>

namespace peftkern {

// In rising order: each level implies the ones before it.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The best level of this CPU for which this build holds kernels.
Isa best_isa();
// The level in use: the forced one, else the best one.
Isa active_isa();
// Throws std::invalid_argument for an unknown name or one that this CPU or build lacks; "" lifts the force.
void force_isa(const std::string& name);
const char* isa_name(Isa isa);
// Every level that this build holds, comma separated.
std::string built_isas();

}  // namespace peftkern
