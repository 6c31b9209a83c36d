#include "operators/cuda_linear.h"

#include <algorithm>
#include <string>

namespace starling {

// CUlaunchAttribute and CUlaunchConfig of cuda.h.
struct CudaAttribute {
  int32_t id, padding, value;
  char rest[60];
};
struct CudaLaunch {
  uint32_t grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
  void* stream;
  const CudaAttribute* attributes;
  uint32_t count;
};

namespace {

enum Input : size_t { kX, kData, kScales, kNormWeight, kBias, kResidual };
enum Epilogue : int32_t { kStore, kAddResidual, kGated };
constexpr int kBlock = 32, kRows = 128;
// A kernel runs so often for one product before the weights are dequantized: on an H200 a prompt of 128 tokens took
// 16 ms with dequantized weights, and a step of 16 rows 3.7.
constexpr int kMostSlices = 3;
constexpr int kStartsEarly = 6;                              // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int kTransposed = 1, kAsIs = 0;                    // cublasOperation_t
constexpr int kHalf = 2, kInFloat = 68, kAnyAlgorithm = -1;  // cudaDataType_t, cublasComputeType_t, cublasGemmAlgo_t

// The kernels' arguments, as in linear.cu, norm.cu and dense.cu.
struct LinearArguments {
  void* out;
  const void *x, *data, *scales, *norm, *residual;
  int32_t rows, n;
  float epsilon;
};
struct NormArguments {
  void* out;
  const void *x, *weight;
  int32_t width;
  float epsilon;
};
struct DequantizeArguments {
  void* out;
  const void *data, *scales;
  int64_t blocks;
};
struct GateArguments {
  void* out;
  const void* x;
  int32_t rows, width;
};

void check_cuda(int status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(status));
}

}  // namespace

struct CudaLinear::Tensors {
  uint16_t* out;
  const uint16_t* x;
  const uint8_t* data;
  const uint16_t *scales, *norm, *residual;
  int rows;
};

CudaLinear::CudaLinear(const NodeInfo& node, CudaContext context) : context_(context) {
  k_ = to_int(node.integer("K"), "K or N is unusable");
  n_ = to_int(node.integer("N"), "K or N is unusable");
  gated_ = node.integer("gated") != 0;
  epsilon_ = node.real("epsilon");
  require(node.integer("block_size") == kBlock && node.integer("bits") == 8,
          "weights must have 8 bits in blocks of 32");
  require(k_ > 0 && k_ % kBlock == 0 && n_ > 0 && (!gated_ || n_ % 16 == 0), "K or N is unusable");
}

void CudaLinear::compute(const Call& call) const {
  Shape shape = call.input_shape(kX);
  require(shape.rank > 0 && shape.back() == k_, "x's last axis is not K");
  require(call.input(kBias) == nullptr, "there is no kernel with a bias");
  Tensors tensors{};
  tensors.rows = to_int(shape.elements() / k_, "x has too many rows");
  check_weights(call);
  const int width = gated_ ? n_ / 2 : n_;
  shape.dims[shape.rank - 1] = width;
  const ort::Value* residual = call.input(kResidual);
  require(residual == nullptr || shape_of(call.api, residual).elements() == shape.elements(),
          "the residual has another shape");
  require(residual == nullptr || !gated_, "there is no kernel with a gate and a residual");
  tensors.x = call.input_data<uint16_t>(kX);
  tensors.data = call.input_data<uint8_t>(kData);
  tensors.scales = call.input_data<uint16_t>(kScales);
  tensors.norm = call.input_data<uint16_t>(kNormWeight);
  tensors.residual = call.input_data<uint16_t>(kResidual);
  tensors.out = call.output<uint16_t>(0, shape);
  if (tensors.rows == 0) return;
  const CudaKernel* kernel = kernel_for(tensors);
  if (kernel == nullptr && tensors.norm != nullptr) {  // many rows are normalized once, and not by each block
    normalize(tensors);
    kernel = kernel_for(tensors);
  }
  if (kernel != nullptr) {
    multiply(*kernel, tensors);
  } else if (!multiply_in_slices(tensors, width)) {
    multiply_dense(tensors);
  }
}

void CudaLinear::multiply(const CudaKernel& kernel, const Tensors& tensors) const {
  LinearArguments arguments{tensors.out,      tensors.x,    tensors.data, tensors.scales, tensors.norm,
                            tensors.residual, tensors.rows, n_,           epsilon_};
  launch(kernel.function, kernel.grid, kernel.threads, kernel.shared, &arguments);
}

// A few more rows than the kernels take, which read the weights once for each slice. False where they are too many.
bool CudaLinear::multiply_in_slices(const Tensors& tensors, int width) const {
  int most = 0;
  for (int32_t i = 0; i < context_->count; ++i) most = std::max(most, context_->kernels[i].rows);
  Tensors slice = tensors;
  slice.rows = std::min(most, tensors.rows);
  if (most == 0 || tensors.rows > kMostSlices * most || kernel_for(slice) == nullptr) return false;
  for (int first = 0; first < tensors.rows; first += most) {
    slice.rows = std::min(most, tensors.rows - first);
    slice.out = tensors.out + static_cast<int64_t>(first) * width;
    slice.x = tensors.x + static_cast<int64_t>(first) * k_;
    if (tensors.residual != nullptr) slice.residual = tensors.residual + static_cast<int64_t>(first) * width;
    multiply(*kernel_for(slice), slice);
  }
  return true;
}

// A kernel reads as much as K and N say: a graph with smaller tensors would have it read beyond them. Once for each
// tensor of weights, which stays the same from call to call.
void CudaLinear::check_weights(const Call& call) const {
  const void* data = call.input_data<uint8_t>(kData);
  if (data == checked_) return;
  const int64_t weights = int64_t{n_} * k_;
  const ort::Value* norm = call.input(kNormWeight);
  require(call.input_shape(kData).elements() == weights && call.input_shape(kScales).elements() == weights / kBlock,
          "the weights do not have the shapes that K and N say");
  require(norm == nullptr || shape_of(call.api, norm).elements() == k_, "the norm's weight has another length");
  checked_ = data;
}

// The one for the fewest rows that suffice; nullptr where there are too many.
const CudaKernel* CudaLinear::kernel_for(const Tensors& tensors) const {
  const int32_t epilogue = gated_ ? kGated : tensors.residual != nullptr ? kAddResidual : kStore;
  const CudaKernel* best = nullptr;
  for (int32_t i = 0; i < context_->count; ++i) {
    const CudaKernel& kernel = context_->kernels[i];
    const bool fits = kernel.k == k_ && kernel.n == n_ && kernel.norm == (tensors.norm != nullptr) &&
                      kernel.epilogue == epilogue && kernel.rows >= tensors.rows;
    if (fits && (best == nullptr || kernel.rows < best->rows)) best = &kernel;
  }
  return best;
}

// Puts x / sqrt(mean(x²) + epsilon) * norm in x's place.
void CudaLinear::normalize(Tensors& tensors) const {
  require(size_t{2} * tensors.rows * k_ <= context_->activations_bytes, "more rows than a prefill may have");
  NormArguments arguments{context_->activations, tensors.x, tensors.norm, k_, epsilon_};
  const CudaFunction& kernel = context_->rms_norm;
  launch(kernel.function, tensors.rows, kernel.threads, kernel.shared, &arguments);
  tensors.x = static_cast<const uint16_t*>(context_->activations);
  tensors.norm = nullptr;
}

void CudaLinear::multiply_dense(const Tensors& tensors) const {
  const CudaSession& cuda = *context_;
  const size_t normed = size_t{2} * tensors.rows * k_, gates = gated_ ? size_t{2} * tensors.rows * n_ : 0;
  require(normed + gates <= cuda.activations_bytes, "more rows than a prefill may have");
  uint16_t* product = gated_ ? reinterpret_cast<uint16_t*>(static_cast<char*>(cuda.activations) + normed) : tensors.out;
  if (tensors.residual != nullptr) {
    check_cuda(cuda.copy(reinterpret_cast<uint64_t>(tensors.out), reinterpret_cast<uint64_t>(tensors.residual),
                         size_t{2} * tensors.rows * n_, cuda.stream),
               "copy");
  }
  const float one = 1, beta = tensors.residual != nullptr ? 1 : 0;
  // So many rows of weights at a time that they are read again from the cache.
  // Multiples of kRows, since cuBLAS's fast kernels want aligned columns: 4 to 1 at the down projection.
  const int most = static_cast<int>(cuda.weights_bytes / (size_t{2} * k_)) / kRows * kRows;
  require(most > 0, "there is no room for a row of weights");
  // Blocks of one size: a small last one leaves most of the card idle, and 1,024 rows at the down projection are a
  // wave of tiles for 2,048 tokens where 1,152 are two.
  const int blocks_of_rows = (n_ + most - 1) / most;
  const int each = ((n_ + blocks_of_rows - 1) / blocks_of_rows + kRows - 1) / kRows * kRows;
  for (int first = 0; first < n_; first += each) {
    const int count = std::min(each, n_ - first);
    const size_t blocks_before = static_cast<size_t>(first) * (k_ / kBlock);
    const int64_t blocks = int64_t{count} * (k_ / kBlock);
    DequantizeArguments arguments{cuda.weights, tensors.data + blocks_before * kBlock, tensors.scales + blocks_before,
                                  blocks};
    // A thread takes 8 weights.
    const uint32_t grid =
        static_cast<uint32_t>((blocks * (kBlock / 8) + cuda.dequantize.threads - 1) / cuda.dequantize.threads);
    launch(cuda.dequantize.function, grid, cuda.dequantize.threads, cuda.dequantize.shared, &arguments);
    // In cuBLAS's columns: out[N, M] = W[K, N]^T x[K, M].
    check_cuda(cuda.multiply(cuda.blas, kTransposed, kAsIs, count, tensors.rows, k_, &one, cuda.weights, kHalf, k_,
                             tensors.x, kHalf, k_, &beta, product + first, kHalf, n_, kInFloat, kAnyAlgorithm),
               "cublasGemmEx");
  }
  if (gated_) {
    const int width = n_ / 2;
    GateArguments arguments{tensors.out, product, tensors.rows, width};
    const uint32_t grid =
        static_cast<uint32_t>((int64_t{tensors.rows} * width / 8 + cuda.gate.threads - 1) / cuda.gate.threads);
    launch(cuda.gate.function, grid, cuda.gate.threads, cuda.gate.shared, &arguments);
  }
}

void CudaLinear::launch(void* function, uint32_t grid, uint32_t threads, uint32_t shared, void* arguments) const {
  const CudaAttribute early{kStartsEarly, 0, 1, {}};
  const CudaLaunch launch{
      grid, 1, 1, threads, 1, 1, shared, context_->stream, &early, static_cast<uint32_t>(context_->early != 0)};
  void* parameters[] = {arguments};
  check_cuda(context_->launch(&launch, function, parameters, nullptr), "a kernel's launch");
}

}  // namespace starling
