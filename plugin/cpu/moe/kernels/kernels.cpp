// SPDX-License-Identifier: Apache-2.0
#include "cpu/moe/kernels/kernels.h"

#include "cpu/machine.h"

namespace adaptive_k::cpu {

const Kernels& kernels(WeightFormat format) {
#if defined(ADAPTIVE_K_X86)
  switch (instruction_set()) {
    case InstructionSet::kAmx:
      return format == WeightFormat::kBFloat16 ? kAmxKernels : kAvx512Kernels;
    case InstructionSet::kAvx512:
      return kAvx512Kernels;
    case InstructionSet::kAvx2:
      return kAvx2Kernels;
    case InstructionSet::kPortable:
      break;
  }
#endif
  (void)format;
  return kPortableKernels;
}

}  // namespace adaptive_k::cpu
