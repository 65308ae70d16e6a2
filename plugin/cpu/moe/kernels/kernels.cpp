// SPDX-License-Identifier: Apache-2.0
#include "cpu/moe/kernels/kernels.h"

#include "cpu/machine.h"

namespace adaptive_k::cpu {

const Kernels& kernels(WeightFormat weights, ActivationFormat activations) {
  const bool integers = activations == ActivationFormat::kInt8;
#if defined(ADAPTIVE_K_X86)
  switch (instruction_set()) {
    case InstructionSet::kAmx:
      if (integers) return kAmxIntegerKernels;
      return weights == WeightFormat::kBFloat16 ? kAmxKernels : kAvx512Kernels;
    case InstructionSet::kAvx512Vnni:
      return integers ? kAvx512VnniIntegerKernels : kAvx512Kernels;
    case InstructionSet::kAvx512:
      return integers ? kAvx512IntegerKernels : kAvx512Kernels;
    case InstructionSet::kAvxVnni:
      return integers ? kAvxVnniIntegerKernels : kAvx2Kernels;
    case InstructionSet::kAvx2:
      return integers ? kAvx2IntegerKernels : kAvx2Kernels;
    case InstructionSet::kPortable:
      break;
  }
#endif
  (void)weights;
  return integers ? kPortableIntegerKernels : kPortableKernels;
}

}  // namespace adaptive_k::cpu
