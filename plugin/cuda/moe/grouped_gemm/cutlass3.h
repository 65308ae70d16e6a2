// SPDX-License-Identifier: Apache-2.0
// CUTLASS 3.x grouped GEMM with pointers and problem sizes in device memory, for the architectures
// with a tensor memory accelerator. A persistent grid; each block rewrites its tensor maps when it
// goes on to another expert.
//
// The product is computed transposed, c^T = b . a^T: the weights take the tile's long side (M), an
// expert's rows, of which there may be few, its short side (N).
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/device.h"
#include "cuda/moe/activate_fragment.h"
#include "cuda/moe/grouped_gemm/parts.h"

namespace adaptive_k::cuda {

// The activation as a node of CUTLASS's epilogue tree.
template <typename T>
struct ActivateNode;
template <>
struct ActivateNode<float> {
  using Arguments = FragmentActivation;
};
template <int kCount>
struct ActivateNode<cutlass::Array<float, kCount>> {
  using Arguments = FragmentActivation;
  __device__ cutlass::Array<float, kCount> operator()(cutlass::Array<float, kCount> values,
                                                      const Arguments& how) const {
    activate_fragment(how, values);
    return values;
  }
};

template <typename Element_, typename ArchTag, typename TileShape, typename ClusterShape,
          typename KernelSchedule, typename EpilogueSchedule>
struct Cutlass3Gemm {
  using Element = Element_;
  using Problem = cute::Shape<int, int, int>;
  using ProblemShape = cutlass::gemm::GroupProblemShape<Problem>;
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits<Element>::value;
  using Output = cutlass::layout::ColumnMajor;  // transposed: c is row-major

  using Activated = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<ActivateNode, Element, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      cutlass::epilogue::fusion::Sm90AccFetch>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      ArchTag, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Output*, kAlignment,
      Element, Output*, kAlignment, EpilogueSchedule, Activated>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      ArchTag, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor*, kAlignment,
      Element, cutlass::layout::ColumnMajor*, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      KernelSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

template <typename Configuration>
struct Cutlass3Arguments {
  using Element = typename Configuration::Element;
  using Kernel = typename Configuration::Kernel;
  typename Configuration::Problem* sizes;
  const Element** weights;
  const Element** rows;
  Element** output;
  typename Kernel::InternalStrideA* weights_stride;
  typename Kernel::InternalStrideB* rows_stride;
  typename Kernel::InternalStrideD* output_stride;
};

template <typename Configuration>
__global__ void fill_cutlass3(GroupedGemm p, Cutlass3Arguments<Configuration> to) {
  using Element = typename Configuration::Element;
  const int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= p.experts) return;
  const int64_t begin = p.offsets[e];
  to.sizes[e] = cute::make_shape(p.n, p.offsets[e + 1] - p.offsets[e], p.k);
  to.weights[e] = static_cast<const Element*>(p.b) + static_cast<int64_t>(e) * p.n * p.k;
  to.rows[e] = static_cast<const Element*>(p.a) + begin * p.k;
  to.output[e] = static_cast<Element*>(p.c) + begin * p.n;
  cute::get<0>(to.weights_stride[e]) = p.k;
  cute::get<0>(to.rows_stride[e]) = p.k;
  cute::get<1>(to.output_stride[e]) = p.n;
}

// All of an expert's row tiles (along N) with one tile of its weights before the next weights, so
// that what is larger than the second-level cache is read from memory once. CUTLASS's own order,
// along M, would read all of the expert's weights again for each of its row tiles.
template <typename Kernel>
constexpr auto kRasterOrder = Kernel::TileScheduler::RasterOrderOptions::AlongN;

template <typename Configuration>
cudaError_t run_cutlass3(const GroupedGemm& p, void* workspace, cudaStream_t stream) {
  using Gemm = typename Configuration::Gemm;
  using Kernel = typename Configuration::Kernel;
  using Element = typename Configuration::Element;
  Carver carver(workspace, p.experts);
  Cutlass3Arguments<Configuration> to;
  to.sizes = carver.take<typename Configuration::Problem>();
  to.weights = carver.take<const Element*>();
  to.rows = carver.take<const Element*>();
  to.output = carver.take<Element*>();
  to.weights_stride = carver.take<typename Kernel::InternalStrideA>();
  to.rows_stride = carver.take<typename Kernel::InternalStrideB>();
  to.output_stride = carver.take<typename Kernel::InternalStrideD>();
  const auto blocks = static_cast<unsigned>(divide_up(p.experts, 128));
  ADAPTIVE_K_RETURN_IF(
      ADAPTIVE_K_LAUNCH(fill_cutlass3<Configuration>, dim3(blocks), dim3(128), 0, stream, p, to));

  typename Gemm::Arguments arguments;
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  arguments.problem_shape = {p.experts, to.sizes, nullptr};
  arguments.mainloop = {to.weights, to.weights_stride, to.rows, to.rows_stride};
  arguments.epilogue = {{}, nullptr, nullptr, to.output, to.output_stride};
  arguments.epilogue.thread = {{}, {p.activated, p.activation}};
  arguments.scheduler.raster_order = kRasterOrder<Kernel>;
  ADAPTIVE_K_RETURN_IF(cudaGetDevice(&arguments.hw_info.device_id));
  arguments.hw_info.sm_count = multiprocessors();
  if (Gemm::get_workspace_size(arguments) > kGroupedKernelBytes)
    return cudaErrorInvalidConfiguration;
  Gemm gemm;
  return status_of(gemm.initialize(arguments, carver.rest(), stream),
                   [&] { return gemm.run(stream); });
}

}  // namespace adaptive_k::cuda
