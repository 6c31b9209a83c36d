// The operator starling::QuantizedLinear on an NVIDIA GPU: kernels of engine/kernels/cuda for the rows of a decode
// step, dequantized weights and cuBLAS for more.
//
// This library is built without CUDA: Python loads CUDA's libraries, compiles the kernels, and hands both over.
#pragma once

#include <array>
#include <cstdint>

#include "operators/op.h"

namespace starling {

// A kernel of linear.cu for up to `rows` rows of x; its grid is for `n` rows of weights. Laid out as in operators.py.
struct CudaKernel {
  int32_t k, n, norm, epilogue, rows;
  uint32_t grid, threads, shared;
  void* function;
};

// A kernel of dense.cu or norm.cu, whose grid follows from the call.
struct CudaFunction {
  void* function;
  uint32_t threads, shared;
};

struct CudaLaunch;

// What the operators of one session share. Laid out as in operators.py, which keeps it alive.
struct CudaSession {
  int (*launch)(const CudaLaunch*, void* function, void** parameters, void** extra);  // cuLaunchKernelEx
  int (*copy)(uint64_t destination, uint64_t source, size_t bytes, void* stream);     // cuMemcpyDtoDAsync
  int (*multiply)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type,
                  int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                  int compute_type, int algorithm);  // cublasGemmEx
  void* blas;                                        // a cublasHandle_t on the stream
  void* stream;                                      // the session's own
  void* weights;                                     // scratch for weights as float16
  size_t weights_bytes;
  void* activations;  // scratch for normed rows and, after them, for gates and values
  size_t activations_bytes;
  CudaFunction dequantize, rms_norm, gate;
  const CudaKernel* kernels;
  int32_t count;
  int32_t early;  // a kernel may start before the one before it is over
};

using CudaContext = const CudaSession*;

class CudaLinear {
 public:
  static constexpr const char* name = "QuantizedLinear";
  // x [..., K], data [N, K / 32, 32], scales [N, K / 32], norm_weight [K], bias (none), residual [..., N]
  static constexpr std::array<InputSpec, 6> inputs = {{{ort::kFloat16},
                                                       {ort::kUInt8},
                                                       {ort::kFloat16},
                                                       {ort::kFloat16, true},
                                                       {ort::kFloat16, true},
                                                       {ort::kFloat16, true}}};
  static constexpr std::array<ort::ElementType, 1> outputs = {ort::kFloat16};
  static constexpr const char* provider = "CUDAExecutionProvider";

  CudaLinear(const NodeInfo& node, CudaContext context);
  void compute(const Call& call) const;

 private:
  struct Tensors;
  void check_weights(const Call& call) const;
  const CudaKernel* kernel_for(const Tensors& tensors) const;
  void normalize(Tensors& tensors) const;
  void multiply(const CudaKernel& kernel, const Tensors& tensors) const;
  bool multiply_in_slices(const Tensors& tensors, int width) const;
  void multiply_dense(const Tensors& tensors) const;
  void launch(void* function, uint32_t grid, uint32_t threads, uint32_t shared, void* arguments) const;

  CudaContext context_;
  int k_, n_;
  bool gated_;
  float epsilon_;
  mutable const void* checked_ = nullptr;  // weights that have the size that K and N say; calls come one by one
};

}  // namespace starling
