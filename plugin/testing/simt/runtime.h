// SPDX-License-Identifier: Apache-2.0
// The few names of CUDA's runtime that the launcher's interface uses, for builds in which the
// kernels run in the interpreter. Values as CUDA's.
#pragma once

#include <cstddef>

enum cudaError {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
using cudaError_t = cudaError;

// Every stream is the same: a launch has ended when it returns.
struct CUstream_st;
using cudaStream_t = CUstream_st*;

// Returns the error of the last failed launch and forgets it.
cudaError_t cudaGetLastError();
