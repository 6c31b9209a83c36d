// What a custom operator is made of: its inputs, its call, and errors that reach ONNX Runtime as a status.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "operators/ort_abi.h"

namespace starling {

inline void check(const ort::Api& api, ort::Status* status, const char* what) {
  if (status == nullptr) return;
  const std::string reason = api.message(status);
  api.release(status);
  throw std::runtime_error(std::string("ONNX Runtime refused ") + what + ": " + reason);
}

inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// Of a session that registers the library where Python would not.
constexpr const char* kNoKernels = "this processor lacks the instructions that the CPU kernels need";

// The greatest size, count or position that the operators take: what is rounded up to a tile from there, or goes a
// chunk beyond, is still an int.
constexpr int64_t kMost = int64_t{1} << 30;

// A number of the graph, which says whatever its author wrote, as an int. Throws where it is not 0 … kMost.
inline int to_int(int64_t number, const char* message) {
  require(number >= 0 && number <= kMost, message);
  return static_cast<int>(number);
}

// a * b. Throws where no int64_t holds it.
inline int64_t times(int64_t a, int64_t b) {
  int64_t product = 0;
  require(!__builtin_mul_overflow(a, b, &product), "a tensor has too many elements");
  return product;
}

// number / by, rounded up.
inline int ceil_div(int number, int by) { return number / by + (number % by != 0); }

// The type of an input, and whether a node may leave it out.
struct InputSpec {
  ort::ElementType type;
  bool optional = false;
};

struct Shape {
  std::array<int64_t, 8> dims{};
  size_t rank = 0;

  int64_t operator[](size_t axis) const { return dims[axis]; }
  int64_t back() const { return dims[rank - 1]; }
  int64_t elements() const {
    int64_t product = 1;
    for (size_t axis = 0; axis < rank; ++axis) product = times(product, dims[axis]);  // {0, INT64_MAX} is a shape
    return product;
  }
};

inline Shape shape_of(const ort::Api& api, const ort::Value* value) {
  ort::ShapeInfo* info = nullptr;
  check(api, api.shape_info(value, &info), "a tensor's shape");
  Shape shape;
  ort::Status* status = api.dimensions_count(info, &shape.rank);
  if (status == nullptr && shape.rank <= shape.dims.size()) {
    status = api.dimensions(info, shape.dims.data(), shape.rank);
  }
  api.release(info);
  check(api, status, "a tensor's dimensions");
  require(shape.rank <= shape.dims.size(), "a tensor has too many axes");
  return shape;
}

template <typename T>
T* data_of(const ort::Api& api, const ort::Value* value) {
  void* data = nullptr;
  check(api, api.tensor_data(const_cast<ort::Value*>(value), &data), "a tensor's data");
  return static_cast<T*>(data);
}

// What a node says about itself when its kernel is made.
class NodeInfo {
 public:
  NodeInfo(const ort::Api& api, const ort::KernelInfo* info) : api(api), info_(info) {}

  int64_t integer(const char* name) const {
    int64_t value = 0;
    check(api, api.int_attribute(info_, name, &value), name);
    return value;
  }
  float real(const char* name) const {
    float value = 0;
    check(api, api.float_attribute(info_, name, &value), name);
    return value;
  }
  // The initializer at `index`. Throws where the node has none there.
  const ort::Value* initializer(size_t index, const char* message) const {
    const ort::Value* value = initializer_if_any(index);
    require(value != nullptr, message);
    return value;
  }

  // The same, or nullptr where the node leaves it out or feeds it at every call.
  const ort::Value* initializer_if_any(size_t index) const {
    int is_constant = 0;
    const ort::Value* value = nullptr;
    check(api, api.constant_input(info_, index, &is_constant, &value), "an initializer");
    return is_constant != 0 ? value : nullptr;
  }

  const ort::Api& api;

 private:
  const ort::KernelInfo* info_;
};

// One call of a kernel.
class Call {
 public:
  Call(const ort::Api& api, ort::KernelContext* context) : api(api), context_(context) {}

  // nullptr where the node leaves the input out.
  const ort::Value* input(size_t index) const {
    const ort::Value* value = nullptr;
    check(api, api.input(context_, index, &value), "an input");
    return value;
  }
  template <typename T>
  const T* input_data(size_t index) const {
    const ort::Value* value = input(index);
    return value == nullptr ? nullptr : data_of<const T>(api, value);
  }
  Shape input_shape(size_t index) const { return shape_of(api, input(index)); }
  template <typename T>
  T* output(size_t index, const Shape& shape) const {
    ort::Value* value = nullptr;
    check(api, api.output(context_, index, shape.dims.data(), shape.rank, &value), "an output");
    return data_of<T>(api, value);
  }
  // task(0) … task(count - 1) on the session's own threads. Throws where one of them has thrown.
  template <typename Task>
  void parallel(size_t count, const Task& task) const {
    if (count == 1) return task(size_t{0});
    struct Loop {
      const Task& task;
      std::atomic<bool> has_failed{false};
    } loop{task};
    const auto run = [](void* state, size_t index) {
      auto* of = static_cast<Loop*>(state);
      try {
        of->task(index);
      } catch (...) {  // nothing may leave a thread of the pool
        of->has_failed = true;
      }
    };
    check(api, api.parallel_for(context_, run, count, 0, &loop), "a parallel loop");
    if (loop.has_failed) throw std::runtime_error("out of memory");
  }

  const ort::Api& api;

 private:
  ort::KernelContext* context_;
};

// What the kernels of one registration share; nothing on the CPU.
struct NoContext {};

// An operator whose kernel is a class Kernel with
//   static constexpr const char* name; static constexpr std::array<InputSpec, n> inputs;
//   static constexpr std::array<ort::ElementType, m> outputs; static constexpr const char* provider;
//   Kernel(const NodeInfo&, Context&); void compute(const Call&).
template <typename Kernel, typename Context = NoContext>
class Op : public ort::CustomOp {
 public:
  explicit Op(Context context = {}) : ort::CustomOp{}, context_(context) {
    version = ort::kApiVersion;
    get_name = [](const CustomOp*) { return Kernel::name; };
    get_provider = [](const CustomOp*) { return Kernel::provider; };
    get_input_count = [](const CustomOp*) { return Kernel::inputs.size(); };
    get_input_type = [](const CustomOp*, size_t index) { return Kernel::inputs[index].type; };
    get_input_presence = [](const CustomOp*, size_t index) {
      return Kernel::inputs[index].optional ? ort::kOptional : ort::kRequired;
    };
    get_input_memory = [](const CustomOp*, size_t) { return 0; };
    get_output_count = [](const CustomOp*) { return Kernel::outputs.size(); };
    get_output_type = [](const CustomOp*, size_t index) { return Kernel::outputs[index]; };
    get_output_presence = [](const CustomOp*, size_t) { return ort::kRequired; };
    get_variadic_input_minimum = [](const CustomOp*) { return 1; };
    get_variadic_input_homogeneity = [](const CustomOp*) { return 1; };
    get_variadic_output_minimum = [](const CustomOp*) { return 1; };
    get_variadic_output_homogeneity = [](const CustomOp*) { return 1; };
    get_start_version = [](const CustomOp*) { return 1; };
    get_end_version = [](const CustomOp*) { return INT32_MAX; };
    create_kernel_v2 = [](const CustomOp* self, const void* const* table, const ort::KernelInfo* info, void** made) {
      const ort::Api api(table);
      const Context& context = static_cast<const Op*>(self)->context_;
      return guarded(api, [&] { *made = new State{api, Kernel(NodeInfo(api, info), context)}; });
    };
    compute_v2 = [](void* kernel, ort::KernelContext* context) {
      auto* state = static_cast<State*>(kernel);
      return guarded(state->api, [&] { state->kernel.compute(Call(state->api, context)); });
    };
    destroy = [](void* kernel) { delete static_cast<State*>(kernel); };
  }

 private:
  struct State {
    ort::Api api;
    Kernel kernel;
  };

  Context context_;

  template <typename Action>
  static ort::Status* guarded(const ort::Api& api, const Action& action) {
    try {
      action();
      return nullptr;
    } catch (const std::exception& error) {
      const std::string message = std::string(Kernel::name) + ": " + error.what();
      return api.create_status(ort::kInvalidArgument, message.c_str());
    }
  }
};

}  // namespace starling
