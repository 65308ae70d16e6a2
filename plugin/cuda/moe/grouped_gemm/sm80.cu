// SPDX-License-Identifier: Apache-2.0
// CUTLASS 2.x grouped GEMM. A persistent grid walks the tiles of all experts; each block finds its
// next tile from the problem sizes in device memory, so the host needs to know none of them.
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/thread/scale_type.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>
#include <cutlass/layout/matrix.h>

#include "cuda/device.h"
#include "cuda/moe/activate_fragment.h"
#include "cuda/moe/grouped_gemm/parts.h"

namespace adaptive_k::cuda {
// A tile of so many rows, weight rows and numbers along K. A type of its own, so that CUTLASS asks
// the visitor below in which order tiles come.
template <int kRows, int kWeights, int kK>
struct WeightsOnceShape : cutlass::gemm::GemmShape<kRows, kWeights, kK> {};
}  // namespace adaptive_k::cuda

// All of an expert's row tiles with one tile of its weights before the next weights, so that what
// is larger than the second-level cache is read from memory once. CUTLASS's own order would read
// all of the expert's weights again for each of its row tiles.
template <int kRows, int kWeights, int kK, cutlass::gemm::kernel::GroupScheduleMode kMode,
          int kPrefetched, int kThreads>
struct cutlass::gemm::kernel::GemmGroupedProblemVisitor<
    adaptive_k::cuda::WeightsOnceShape<kRows, kWeights, kK>, kMode, kPrefetched, kThreads, false>
    : GroupedProblemVisitor<detail::GemmGroupedProblemSizeHelper<
                                adaptive_k::cuda::WeightsOnceShape<kRows, kWeights, kK>, false>,
                            adaptive_k::cuda::WeightsOnceShape<kRows, kWeights, kK>, kMode,
                            kPrefetched, kThreads> {
  static constexpr bool kTransposed = false;
  using Base = GroupedProblemVisitor<
      detail::GemmGroupedProblemSizeHelper<adaptive_k::cuda::WeightsOnceShape<kRows, kWeights, kK>,
                                           false>,
      adaptive_k::cuda::WeightsOnceShape<kRows, kWeights, kK>, kMode, kPrefetched, kThreads>;
  using Base::Base;

  // The kernel takes its row tile from the quotient by the number of weight tiles, and its weight
  // tile from the remainder.
  CUTLASS_DEVICE int32_t threadblock_idx() const {
    const GemmCoord tiles = Base::grid_shape(this->problem_size());
    const int32_t at = Base::threadblock_idx();
    return at % tiles.m() * tiles.n() + at / tiles.m();
  }
};

namespace adaptive_k::cuda {
namespace {

// What becomes of the sums: CUTLASS's interface of an output operator without a source.
template <typename Element, int kCount_>
class ActivatedOutput {
 public:
  using ElementOutput = Element;
  using ElementSource = Element;
  using ElementC = Element;
  using ElementD = Element;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementScalar = float;
  static constexpr int kCount = kCount_;
  static constexpr auto kScale = cutlass::epilogue::thread::ScaleType::Nothing;
  using FragmentOutput = cutlass::Array<Element, kCount>;
  using FragmentSource = cutlass::Array<Element, kCount>;
  using FragmentAccumulator = cutlass::Array<float, kCount>;
  using FragmentCompute = cutlass::Array<float, kCount>;
  using Params = FragmentActivation;

  __host__ __device__ explicit ActivatedOutput(const Params& params) : params_(params) {}
  __host__ __device__ bool is_source_needed() const { return false; }
  __host__ __device__ void set_k_partition(int, int) {}

  __device__ FragmentOutput operator()(const FragmentAccumulator& sums) const {
    FragmentAccumulator values = sums;
    activate_fragment(params_, values);
    return cutlass::NumericArrayConverter<Element, float, kCount>()(values);
  }
  __device__ FragmentOutput operator()(const FragmentAccumulator& sums,
                                       const FragmentSource&) const {
    return (*this)(sums);
  }

 private:
  Params params_;
};

template <typename Element, typename TileShape, typename WarpShape, int kStages>
struct Sm80Gemm {
  static constexpr int kAlignment = 128 / cutlass::sizeof_bits<Element>::value;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
      Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kAlignment,     // a
      Element, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, kAlignment,  // b
      Element, cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, TileShape, WarpShape, cutlass::gemm::GemmShape<16, 8, 16>,
      ActivatedOutput<Element, kAlignment>,
      cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, kStages,
      cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmGrouped<Kernel>;
};

template <typename Element>
struct Sm80Arguments {
  cutlass::gemm::GemmCoord* sizes;
  Element** a;
  Element** b;
  Element** c;
  int64_t* lda;
  int64_t* ldb;
  int64_t* ldc;
};

template <typename Element>
__global__ void fill_sm80(GroupedGemm p, Sm80Arguments<Element> to) {
  const int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= p.experts) return;
  const int64_t begin = p.offsets[e];
  to.sizes[e] = {p.offsets[e + 1] - p.offsets[e], p.n, p.k};
  to.a[e] = static_cast<Element*>(const_cast<void*>(p.a)) + begin * p.k;
  to.b[e] = static_cast<Element*>(const_cast<void*>(p.b)) + static_cast<int64_t>(e) * p.n * p.k;
  to.c[e] = static_cast<Element*>(p.c) + begin * p.n;
  to.lda[e] = to.ldb[e] = p.k;
  to.ldc[e] = p.n;
}

template <typename Configuration>
cudaError_t run(const GroupedGemm& p, void* workspace, cudaStream_t stream) {
  using Gemm = typename Configuration::Gemm;
  using Element = typename Gemm::ElementC;
  Carver carver(workspace, p.experts);
  Sm80Arguments<Element> to;
  to.sizes = carver.take<cutlass::gemm::GemmCoord>();
  to.a = carver.take<Element*>();
  to.b = carver.take<Element*>();
  to.c = carver.take<Element*>();
  to.lda = carver.take<int64_t>();
  to.ldb = carver.take<int64_t>();
  to.ldc = carver.take<int64_t>();
  const auto blocks = static_cast<unsigned>(divide_up(p.experts, 128));
  ADAPTIVE_K_RETURN_IF(
      ADAPTIVE_K_LAUNCH(fill_sm80<Element>, dim3(blocks), dim3(128), 0, stream, p, to));

  const int grid = Gemm::sufficient();
  if (grid <= 0) return cudaErrorInvalidConfiguration;
  typename Gemm::Arguments arguments(to.sizes, p.experts, grid, {p.activated, p.activation}, to.a,
                                     to.b, to.c, to.c, to.lda, to.ldb, to.ldc, to.ldc);
  Gemm gemm;
  return status_of(gemm.initialize(arguments, nullptr, stream), [&] { return gemm.run(stream); });
}

template <typename Element>
cudaError_t run_for(const GroupedGemm& p, void* workspace, cudaStream_t stream) {
  using cutlass::gemm::GemmShape;
  if (few_rows_per_expert(p))
    return run<Sm80Gemm<Element, WeightsOnceShape<32, 128, 64>, GemmShape<32, 32, 64>, 4>>(
        p, workspace, stream);
  return run<Sm80Gemm<Element, WeightsOnceShape<128, 128, 32>, GemmShape<64, 64, 32>, 4>>(
      p, workspace, stream);
}

}  // namespace

cudaError_t grouped_gemm_sm80(const GroupedGemm& p, void* workspace, cudaStream_t stream) {
  if (p.element == ElementType::kFloat16) return run_for<cutlass::half_t>(p, workspace, stream);
  return run_for<cutlass::bfloat16_t>(p, workspace, stream);
}

}  // namespace adaptive_k::cuda
