// The way in for ONNX Runtime: `SessionOptions.register_custom_ops_library` calls RegisterCustomOps.
#include <initializer_list>
#include <mutex>

#include "operators/cuda_linear.h"
#include "operators/group_query_attention.h"
#include "operators/half_linear.h"
#include "operators/op.h"
#include "operators/quantized_linear.h"

namespace {

constexpr const char* kDomain = "starling";

// What the next session that this thread makes runs on: a GPU, where it is set.
thread_local const starling::CudaSession* next_session = nullptr;

starling::ort::Status* make_domain(const starling::ort::Api& api, starling::ort::CustomOpDomain** domain,
                                   std::initializer_list<const starling::ort::CustomOp*> operators) {
  if (starling::ort::Status* status = api.create_domain(kDomain, domain)) return status;
  for (const auto* each : operators) {
    if (starling::ort::Status* status = api.add_op(*domain, each)) return status;
  }
  return nullptr;
}

}  // namespace

// libstdc++'s shared_ptr reads this variable of glibc 2.32 and later. The library's own says "maybe several threads",
// so that the library also loads where glibc is older (manylinux_2_28).
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

extern "C" __attribute__((visibility("default"))) starling::ort::Status* RegisterCustomOps(
    starling::ort::SessionOptions* options, const starling::ort::ApiBase* base) {
  using namespace starling;
  const void* const* table = base->get_api(ort::kApiVersion);
  if (table == nullptr) return nullptr;  // older than 1.17: the session then says that it does not know the operators
  const ort::Api api(table);
  if (next_session != nullptr) {
    // ONNX Runtime keeps no copy of a domain and its operators, and says nothing when it is done with them.
    ort::CustomOpDomain* domain = nullptr;
    if (ort::Status* status = make_domain(api, &domain, {new Op<CudaLinear, CudaContext>(next_session)})) return status;
    next_session = nullptr;
    return api.add_domain(options, domain);
  }
  static const Op<QuantizedLinear> linear;
  static const Op<HalfLinearOf<ort::kFloat16>> linear_float16;
  static const Op<HalfLinearOf<ort::kBFloat16>> linear_bfloat16;
  static const Op<GroupQueryAttentionOf<ort::kFloat>> attention;
  static const Op<GroupQueryAttentionOf<ort::kFloat16>> attention_float16;
  static const Op<GroupQueryAttentionOf<ort::kBFloat16>> attention_bfloat16;
  // One domain for the life of the process, as sessions refer to it.
  static std::mutex mutex;
  static ort::CustomOpDomain* domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (domain == nullptr) {
    ort::CustomOpDomain* made = nullptr;
    if (ort::Status* status = make_domain(
            api, &made,
            {&linear, &linear_float16, &linear_bfloat16, &attention, &attention_float16, &attention_bfloat16}))
      return status;
    domain = made;
  }
  return api.add_domain(options, domain);
}

// The next session of this thread runs its operators on this GPU; the caller keeps `session` while that one lives.
extern "C" __attribute__((visibility("default"))) void starling_next_session_on_cuda(
    const starling::CudaSession* session) {
  next_session = session;
}

// What the kernels use on this processor; nullptr where they cannot run.
extern "C" __attribute__((visibility("default"))) const char* starling_instruction_set() {
  const starling::BlockKernels* kernels = starling::block_kernels();
  return kernels == nullptr ? nullptr : kernels->name;
}

// The same for products of weights of 16 bits.
extern "C" __attribute__((visibility("default"))) const char* starling_half_instruction_set(bool is_bfloat16) {
  const starling::HalfKernels* kernels = starling::half_kernels(is_bfloat16);
  return kernels == nullptr ? nullptr : kernels->name;
}
