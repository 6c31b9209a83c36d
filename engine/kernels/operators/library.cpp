// The way in for ONNX Runtime: `SessionOptions.register_custom_ops_library` calls RegisterCustomOps.
#include <mutex>

#include "operators/group_query_attention.h"
#include "operators/op.h"
#include "operators/quantized_linear.h"

namespace {

constexpr const char* kDomain = "starling";

}  // namespace

// libstdc++'s shared_ptr reads this variable of glibc 2.32 and later. The library's own says "maybe several threads",
// so that the library also loads where glibc is older (manylinux_2_28).
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

extern "C" __attribute__((visibility("default"))) starling::ort::Status* RegisterCustomOps(
    starling::ort::SessionOptions* options, const starling::ort::ApiBase* base) {
  using namespace starling;
  static const Op<QuantizedLinear> linear;
  static const Op<GroupQueryAttention> attention;
  const void* const* table = base->get_api(ort::kApiVersion);
  if (table == nullptr) return nullptr;  // older than 1.17: the session then says that it does not know the operators
  const ort::Api api(table);
  // One domain for the life of the process, as sessions refer to it.
  static std::mutex mutex;
  static ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    ort::CustomOpDomain* made = nullptr;
    if (ort::Status* status = api.create_domain(kDomain, &made)) return status;
    if (ort::Status* status = api.add_op(made, &linear)) return status;
    if (ort::Status* status = api.add_op(made, &attention)) return status;
    domain = made;
  }
  return api.add_domain(options, domain);
}

// What the kernels use on this processor; nullptr where they cannot run.
extern "C" __attribute__((visibility("default"))) const char* starling_instruction_set() {
  const starling::BlockKernels* kernels = starling::block_kernels();
  return kernels == nullptr ? nullptr : kernels->name;
}
