// The part of ONNX Runtime's C ABI that a library of custom operators needs.
//
// ONNX Runtime's wheel brings no headers. Its function table only ever grows at the end (onnxruntime_c_api.h: "the
// ordering of these fields must not change"), so the few entries used here are named by their places in it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace starling::ort {

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct ShapeInferContext;

// Version 17 is the first with KernelContext_ParallelFor (onnxruntime 1.17).
constexpr uint32_t kApiVersion = 17;

enum ErrorCode { kInvalidArgument = 2 };
enum ElementType { kFloat = 1, kUInt8 = 2, kInt32 = 6, kFloat16 = 10, kBFloat16 = 16 };
enum Presence { kRequired = 0, kOptional = 1 };

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

// The structure that describes an operator to ONNX Runtime, field by field as it is laid out there.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* const* api, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_provider)(const CustomOp*);
  ElementType (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  ElementType (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  Presence (*get_input_presence)(const CustomOp*, size_t);
  Presence (*get_output_presence)(const CustomOp*, size_t);
  int (*get_input_memory)(const CustomOp*, size_t);
  int (*get_variadic_input_minimum)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_minimum)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* const* api, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, ShapeInferContext*);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  size_t (*get_may_inplace)(int** inputs, int** outputs);
  void (*release_may_inplace)(int* inputs, int* outputs);
  size_t (*get_alias_map)(int** inputs, int** outputs);
  void (*release_alias_map)(int* inputs, int* outputs);
};

// Typed access to the function table.
class Api {
 public:
  explicit Api(const void* const* table) : table_(table) {}

  Status* create_status(ErrorCode code, const char* message) const {
    return at<Status* (*)(ErrorCode, const char*)>(0)(code, message);
  }
  const char* message(const Status* status) const { return at<const char* (*)(const Status*)>(2)(status); }
  Status* create_domain(const char* name, CustomOpDomain** domain) const {
    return at<Status* (*)(const char*, CustomOpDomain**)>(26)(name, domain);
  }
  Status* add_op(CustomOpDomain* domain, const CustomOp* op) const {
    return at<Status* (*)(CustomOpDomain*, const CustomOp*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return at<Status* (*)(SessionOptions*, CustomOpDomain*)>(28)(options, domain);
  }
  Status* tensor_data(Value* value, void** data) const { return at<Status* (*)(Value*, void**)>(51)(value, data); }
  Status* dimensions_count(const ShapeInfo* info, size_t* count) const {
    return at<Status* (*)(const ShapeInfo*, size_t*)>(61)(info, count);
  }
  Status* dimensions(const ShapeInfo* info, int64_t* values, size_t count) const {
    return at<Status* (*)(const ShapeInfo*, int64_t*, size_t)>(62)(info, values, count);
  }
  Status* shape_info(const Value* value, ShapeInfo** info) const {
    return at<Status* (*)(const Value*, ShapeInfo**)>(65)(value, info);
  }
  Status* float_attribute(const KernelInfo* info, const char* name, float* value) const {
    return at<Status* (*)(const KernelInfo*, const char*, float*)>(85)(info, name, value);
  }
  Status* int_attribute(const KernelInfo* info, const char* name, int64_t* value) const {
    return at<Status* (*)(const KernelInfo*, const char*, int64_t*)>(86)(info, name, value);
  }
  Status* input(const KernelContext* context, size_t index, const Value** value) const {
    return at<Status* (*)(const KernelContext*, size_t, const Value**)>(90)(context, index, value);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* shape, size_t rank, Value** value) const {
    return at<Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, shape, rank,
                                                                                        value);
  }
  void release(Status* status) const { at<void (*)(Status*)>(93)(status); }
  void release(ShapeInfo* info) const { at<void (*)(ShapeInfo*)>(99)(info); }
  Status* constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** value) const {
    return at<Status* (*)(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, is_constant, value);
  }
  Status* parallel_for(const KernelContext* context, void (*task)(void*, size_t), size_t count, size_t batches,
                       void* state) const {
    return at<Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, task, count, batches, state);
  }

 private:
  template <typename Function>
  Function at(size_t place) const {
    return reinterpret_cast<Function>(const_cast<void*>(table_[place]));
  }

  const void* const* table_;
};

}  // namespace starling::ort
