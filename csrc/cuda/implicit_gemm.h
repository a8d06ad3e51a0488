// A convolution as a matrix product (positions by filters) whose tiles are gathered from x as they are needed: CUTLASS's main
// loop, the epilogue of epilogue.h, and the launch. CUTLASS combines the two for matrix products only; the kernel here is the
// counterpart of cutlass::conv::kernel::ImplicitGemmConvolution for an epilogue with callbacks.
#pragma once

#include <cutlass/conv/conv2d_problem_size.h>
#include <cutlass/conv/kernel/default_conv2d_fprop.h>
#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/epilogue/threadblock/epilogue_with_visitor_callbacks.h>
#include <cutlass/gemm/threadblock/threadblock_swizzle.h>

#include "cuda/convolution.h"
#include "cuda/epilogue.h"

namespace chainzrule {

using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>;

template <class Mma_, class Epilogue_>
struct FusedConvolution {
  using Mma = Mma_;
  using Epilogue = Epilogue_;
  using Tile = typename Mma::Shape;
  using Element = typename Mma::IteratorA::Element;
  static constexpr int kThreadCount = 32 * Mma::WarpCount::kCount;

  struct Params {
    cutlass::conv::Conv2dProblemSize problem;
    cutlass::gemm::GemmCoord tiles;
    int swizzle_log_tile;
    int iterations;
    int iterations_per_channel;
    typename Mma::IteratorA::Params x_iterator;
    typename Mma::IteratorB::Params weight_iterator;
    const Element* x;
    const Element* weight;
    typename Epilogue::Params epilogue;
  };

  union SharedStorage {
    typename Mma::SharedStorage main_loop;
    typename Epilogue::SharedStorage epilogue;
  };

  CUTLASS_DEVICE void operator()(const Params& params, SharedStorage& shared) {
    const cutlass::gemm::GemmCoord tile = Swizzle{}.get_tile_offset(params.swizzle_log_tile);
    if (tile.m() >= params.tiles.m() || tile.n() >= params.tiles.n()) return;

    const int thread = static_cast<int>(threadIdx.x);
    // From lane 0, so that the compiler knows that it is the same for the whole warp.
    const int warp = __shfl_sync(0xFFFFFFFFu, thread / 32, 0);
    const int lane = thread % 32;
    // The iterators advance pointers and write through none of them.
    typename Mma::IteratorA x_iterator(params.x_iterator, params.problem, const_cast<Element*>(params.x), thread,
                                       cutlass::MatrixCoord(tile.m() * Tile::kM, 0));
    typename Mma::IteratorB weight_iterator(params.weight_iterator, params.problem, const_cast<Element*>(params.weight), thread,
                                            cutlass::MatrixCoord(0, tile.n() * Tile::kN));
    typename Mma::FragmentC accumulators;
    accumulators.clear();
    Mma main_loop(shared.main_loop, thread, warp, lane);
    main_loop(params.iterations, accumulators, x_iterator, weight_iterator, accumulators, params.iterations_per_channel);

    Epilogue epilogue(params.epilogue, shared.epilogue, thread, warp, lane);
    epilogue(accumulators, tile, int{Tile::kM}, thread);
  }
};

// One instantiation. `Operand` is what CUTLASS multiplies, kAlignment the elements of x and W that move at a time, kVector those of
// y and s.
template <class Element, class OperatorClass, class Tile, class Warp, class Instruction, int kStages, int kAlignment, int kVector>
struct ConvolutionKernel {
  // CUTLASS's own epilogue is not run; it decides which thread visits which outputs.
  using Donor = typename cutlass::conv::kernel::DefaultConv2dFprop<
      Element, cutlass::layout::TensorNHWC, Element, cutlass::layout::TensorNHWC, Element, cutlass::layout::TensorNHWC, float,
      OperatorClass, cutlass::arch::Sm80, Tile, Warp, Instruction,
      cutlass::epilogue::thread::LinearCombination<Element, kVector, float, float>, Swizzle, kStages,
      cutlass::arch::OpMultiplyAdd, cutlass::conv::IteratorAlgorithm::kOptimized, cutlass::conv::StrideSupport::kStrided,
      kAlignment, kAlignment>::Kernel;
  using Mma = typename Donor::Mma;
  using ThreadMap = typename Donor::Epilogue::OutputTileIterator::ThreadMap;
  using Fused = PolynomialEpilogue<ThreadMap, Element, Tile::kN>;
  // One stage: the accumulators fill the registers. Not unrolled: every step is the same code.
  using Epilogue = cutlass::epilogue::threadblock::EpilogueWithVisitorCallbacks<typename Donor::Epilogue, Fused, 1, false>;
  using Kernel = FusedConvolution<Mma, Epilogue>;

  static cutlass::conv::Conv2dProblemSize problem(const Convolution& c) {
    // Of the constructors that take plain numbers, two differ in their order only, and others derive the output's size, wrongly
    // for dilations beyond 1.
    const cutlass::Tensor4DCoord input(c.batch, c.height, c.width, c.channels);
    const cutlass::Tensor4DCoord window(c.filters, c.kernel_height, c.kernel_width, c.channels);
    const cutlass::Tensor4DCoord padding(c.padding_height, c.padding_height, c.padding_width, c.padding_width);
    const cutlass::Tensor4DCoord output(c.batch, c.out_height, c.out_width, c.filters);
    return {input,  window, padding, cutlass::MatrixCoord(c.stride_height, c.stride_width),
            cutlass::MatrixCoord(c.dilation_height, c.dilation_width),
            output, cutlass::conv::Mode::kCrossCorrelation};
  }

  static bool can_convolve(const Convolution& c) {
    const auto size = problem(c);
    return c.filters % kVector == 0 && c.degree >= 1 && c.degree <= kMaxDegree &&
           Mma::IteratorA::can_implement(size) == cutlass::Status::kSuccess &&
           Mma::IteratorB::can_implement(size) == cutlass::Status::kSuccess &&
           size.activation_size() * sizeof(Element) < kMaxTensorBytes && size.filter_size() * sizeof(Element) < kMaxTensorBytes &&
           size.output_size() * sizeof(Element) < kMaxTensorBytes;
  }

  static const char* convolve(const Convolution& c, cudaStream_t stream) {
    if (!can_convolve(c)) return "the fused convolution does not take this problem";
    using Layout = cutlass::layout::TensorNHWC;
    typename Kernel::Params params;
    params.problem = problem(c);
    params.tiles = Swizzle::get_tiled_shape(
        cutlass::conv::implicit_gemm_problem_size(cutlass::conv::Operator::kFprop, params.problem), {Tile::kM, Tile::kN, Tile::kK}, 1);
    params.swizzle_log_tile = Swizzle::get_log_tile(params.tiles);
    constexpr auto kAlgorithm = cutlass::conv::IteratorAlgorithm::kOptimized;
    params.iterations = cutlass::conv::implicit_gemm_k_iterations(cutlass::conv::Operator::kFprop, Tile::kK, params.problem, kAlgorithm,
                                                                  cutlass::conv::GroupMode::kNone, Tile::kN);
    params.iterations_per_channel =
        cutlass::conv::implicit_gemm_k_iterations_per_channel(cutlass::conv::Operator::kFprop, params.problem, kAlgorithm);
    params.x_iterator = Mma::IteratorA::getParams(params.problem, Layout::packed({c.batch, c.height, c.width, c.channels}));
    params.weight_iterator = typename Mma::IteratorB::Params(
        params.problem, Layout::packed({c.filters, c.kernel_height, c.kernel_width, c.channels}));
    params.x = static_cast<const Element*>(c.x);
    params.weight = static_cast<const Element*>(c.weight);

    auto& epilogue = params.epilogue;
    epilogue.rows = c.batch * c.out_height * c.out_width;
    epilogue.columns = c.filters;
    epilogue.positions = cutlass::FastDivmod(c.out_height * c.out_width);
    epilogue.bias = c.bias;
    epilogue.coefficients = c.coefficients;
    epilogue.degree = c.degree;
    epilogue.per_channel = c.per_channel;
    epilogue.tap_sq = c.tap_sq;
    epilogue.tap_sq_stride = c.tap_sq_per_position ? c.filters : 0;
    epilogue.y = static_cast<Element*>(c.y);
    epilogue.s = static_cast<Element*>(c.s);
    epilogue.row_sums = c.row_sums;
    epilogue.row_sums_stride = c.row_sums_stride;

    void (*const kernel)(typename Kernel::Params) = &cutlass::Kernel<Kernel>;
    constexpr int kSharedBytes = int(sizeof(typename Kernel::SharedStorage));
    if constexpr (kSharedBytes > (48 << 10)) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      if (error != cudaSuccess) return cudaGetErrorString(error);
    }
    const dim3 grid = Swizzle::get_grid_shape(params.tiles);
    void* arguments[] = {&params};
    const cudaError_t error =
        cudaLaunchKernel(kernel, grid, dim3(Kernel::kThreadCount), arguments, kSharedBytes, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
};

// The kernel for wide blocks of filters and the one for narrow ones.
template <class Wide, class Narrow>
struct ConvolutionKernels {
  static bool can_convolve(const Convolution& c) {
    return columns_of_tile(c.filters) == 128 ? Wide::can_convolve(c) : Narrow::can_convolve(c);
  }
  static const char* convolve(const Convolution& c, cudaStream_t stream) {
    return columns_of_tile(c.filters) == 128 ? Wide::convolve(c, stream) : Narrow::convolve(c, stream);
  }
};

// On tensor cores: tiles of 128 positions by 128 or 64 filters, four warps.
template <class Element, int kDepth, class Instruction>
struct TensorCoreKernels {
  template <int kColumns>
  using Tile = cutlass::gemm::GemmShape<128, kColumns, kDepth>;
  template <int kColumns>
  using Warp = cutlass::gemm::GemmShape<64, kColumns / 2, kDepth>;
  static constexpr int kVector = 16 / sizeof(Element);
  template <int kColumns>
  using Of = ConvolutionKernel<Element, cutlass::arch::OpClassTensorOp, Tile<kColumns>, Warp<kColumns>, Instruction, 4, kVector, kVector>;
  using Both = ConvolutionKernels<Of<128>, Of<64>>;
};

}  // namespace chainzrule
