// SPDX-License-Identifier: Apache-2.0
// What the processor has.
#pragma once

#include <cstdint>

namespace adaptive_k::cpu {

enum class InstructionSet { kPortable, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAmx };

// The set in use: the best that this machine runs, or the one that the environment variable
// ADAPTIVE_K_ISA names (portable, avx2, avx_vnni, avx512, avx512_vnni, amx). Throws
// std::invalid_argument when it cannot be had.
InstructionSet instruction_set();
const char* instruction_set_name();

// Bytes of a core's second-level cache.
int64_t second_level_cache_bytes();

}  // namespace adaptive_k::cpu
