// Four numbers of 16 bits as floats, and back. Included after vector_neon.h.
#pragma once

namespace starling {
namespace {

struct Float16 {
  static Vector load(const uint16_t* from) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)))}; }
  static void store(Vector x, uint16_t* to) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(x.v))); }
  // Two inputs of 16 outputs, as HalfWeights has them.
  static void load_inputs(const uint16_t* line, Vector* even, Vector* odd) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      even[quarter] = load(line + quarter * 4);
      odd[quarter] = load(line + 16 + quarter * 4);
    }
  }
};

struct BFloat16 {
  static Vector load(const uint16_t* from) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16))}; }
  // To the nearest, of two the even one; what is not a number stays none.
  static void store(Vector x, uint16_t* to) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t near = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(to, vshrn_n_u32(vbslq_u32(vceqq_f32(x.v, x.v), near, quiet), 16));
  }
  static void load_inputs(const uint16_t* line, Vector* even, Vector* odd) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      const uint32x4_t both = vreinterpretq_u32_u16(vld1q_u16(line + quarter * 8));
      even[quarter] = {vreinterpretq_f32_u32(vshlq_n_u32(both, 16))};
      odd[quarter] = {vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xFFFF0000u)))};
    }
  }
};

}  // namespace
}  // namespace starling
