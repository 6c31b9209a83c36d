// Which kernels the 64-bit ARM processor at hand can run. NEON itself is in all of them.
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "attention/attention_kernels.h"
#include "operators/processor.h"
#include "product/block_product.h"
#include "product/half_product.h"

namespace starling {
namespace {

// Bits of Linux's ABI, by number where its headers are older than the instructions.
bool has_dot_products() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }           // HWCAP_ASIMDDP
bool has_products_of_matrices() { return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }  // HWCAP2_I8MM

}  // namespace

// One that cannot multiply bytes takes ONNX Runtime's operators for all.
const HalfKernels* half_kernels(bool is_bfloat16) {
  if (!has_dot_products()) return nullptr;
  return is_bfloat16 ? &kBFloat16Neon : &kFloat16Neon;
}

const BlockKernels* block_kernels() {
  if (!has_dot_products()) return nullptr;
  return has_products_of_matrices() && !is_held_to("neon") ? &kNeonI8mm : &kNeon;
}

const AttentionKernels* attention_kernels(bool, CacheType type) {
  return has_dot_products() ? &kAttentionNeon[static_cast<size_t>(type)] : nullptr;
}

}  // namespace starling
