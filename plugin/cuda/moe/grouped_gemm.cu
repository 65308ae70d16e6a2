// SPDX-License-Identifier: Apache-2.0
// Takes the product that the device's architecture has. Which of them this library holds follows
// from the architectures that it is built for.
#include "cuda/device.h"
#include "cuda/moe/grouped_gemm.h"
#include "cuda/moe/grouped_gemm/parts.h"

namespace adaptive_k::cuda {

bool grouped_gemm_supports(ElementType element) { return element != ElementType::kFloat32; }

size_t grouped_gemm_workspace(int32_t experts) {
  return kGroupedArrays * 128 + static_cast<size_t>(experts) * kGroupedBytesPerExpert +
         kGroupedKernelBytes;
}

cudaError_t grouped_gemm(const GroupedGemm& p, void* workspace, cudaStream_t stream) {
  if (!grouped_gemm_supports(p.element)) return cudaErrorInvalidValue;
  int device = 0, major = 0, minor = 0;
  ADAPTIVE_K_RETURN_IF(cudaGetDevice(&device));
  ADAPTIVE_K_RETURN_IF(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  ADAPTIVE_K_RETURN_IF(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  // sm_90a and sm_100a code runs on exactly these.
#if defined(ADAPTIVE_K_GEMM_SM90)
  if (major == 9 && minor == 0) return grouped_gemm_sm90(p, workspace, stream);
#endif
#if defined(ADAPTIVE_K_GEMM_SM100)
  if (major == 10 && minor == 0) return grouped_gemm_sm100(p, workspace, stream);
#endif
#if defined(ADAPTIVE_K_GEMM_SM80)
  return grouped_gemm_sm80(p, workspace, stream);
#else
  return cudaErrorNoKernelImageForDevice;
#endif
}

}  // namespace adaptive_k::cuda
