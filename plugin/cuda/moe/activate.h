// SPDX-License-Identifier: Apache-2.0
// The activation by its value at run time. The switch is the same for all threads and costs
// nothing beside the products; a kernel for each activation would make seven of every kernel.
#pragma once

#include "operator/activation.h"

namespace adaptive_k::cuda {

ADAPTIVE_K_HD float activate(Activation activation, float gate, float up) {
  switch (activation) {
    case Activation::kSwiglu:
      return adaptive_k::activate<Activation::kSwiglu>(gate, up);
    case Activation::kGeglu:
      return adaptive_k::activate<Activation::kGeglu>(gate, up);
    case Activation::kSilu:
      return adaptive_k::activate<Activation::kSilu>(gate, up);
    case Activation::kGelu:
      return adaptive_k::activate<Activation::kGelu>(gate, up);
    case Activation::kGeluTanh:
      return adaptive_k::activate<Activation::kGeluTanh>(gate, up);
    case Activation::kRelu:
      return adaptive_k::activate<Activation::kRelu>(gate, up);
    case Activation::kRelu2:
      return adaptive_k::activate<Activation::kRelu2>(gate, up);
  }
  return up;
}

}  // namespace adaptive_k::cuda
