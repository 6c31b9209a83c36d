// Four floats at a time. Included inside a target region.
#pragma once

namespace starling {
namespace {

struct Vector {
  static constexpr int width = 4;
  static constexpr int registers = 32;
  using Mask = uint32x4_t;

  float32x4_t v;

  static Vector zero() { return {vdupq_n_f32(0.0f)}; }
  static Vector all(float x) { return {vdupq_n_f32(x)}; }
  static Vector load(const float* from) { return {vld1q_f32(from)}; }
  // The lanes of `mask`, zero in the others, whose memory is not touched.
  static Vector load(const float* from, Mask mask) {
    if (is_whole(mask)) return load(from);
    float lanes[width];
    for (int i = 0; i < width; ++i) lanes[i] = has(mask, i) ? from[i] : 0.0f;
    return load(lanes);
  }
  void store(float* to) const { vst1q_f32(to, v); }
  void store(float* to, Mask mask) const {
    if (is_whole(mask)) return store(to);
    float lanes[width];
    store(lanes);
    for (int i = 0; i < width; ++i) {
      if (has(mask, i)) to[i] = lanes[i];
    }
  }

  // The first `count` lanes: all of them from `width` on, none below 1.
  static Mask first(int count) {
    const int32_t lanes[width] = {0, 1, 2, 3};
    return vcgtq_s32(vdupq_n_s32(count), vld1q_s32(lanes));
  }
  static Mask not_in(Mask a, Mask b) { return vbicq_u32(a, b); }
  // x in the lanes of `mask`, `other` in the rest.
  static Vector select(Mask mask, Vector x, Vector other) { return {vbslq_f32(mask, x.v, other.v)}; }

  float sum() const { return vaddvq_f32(v); }
  float greatest() const { return vmaxnmvq_f32(v); }
  // Of numbers that are not negative: not a number where any of them is none.
  float greatest_magnitude() const {
    const int32_t bits = vmaxvq_s32(vreinterpretq_s32_f32(v));
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    return magnitude;
  }

 private:
  static bool is_whole(Mask mask) { return vminvq_u32(mask) != 0; }
  static bool has(Mask mask, int lane) {
    uint32_t lanes[width];
    vst1q_u32(lanes, mask);
    return lanes[lane] != 0;
  }
};

inline Vector operator+(Vector a, Vector b) { return {vaddq_f32(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {vsubq_f32(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {vmulq_f32(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {vdivq_f32(a.v, b.v)}; }
// b where either is not a number, as on x86: FMAX would give that, FMAXNM the other.
inline Vector max(Vector a, Vector b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vector min(Vector a, Vector b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
// Of a and |b|, for a that is not negative: bits of floats are in the order of their magnitudes, and what is not a
// number is above all.
inline Vector max_magnitude(Vector a, Vector b) {
  const int32x4_t magnitude = vreinterpretq_s32_f32(vabsq_f32(b.v));
  return {vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a.v), magnitude))};
}
// a * b + c in one rounding, and c - a * b.
inline Vector fma(Vector a, Vector b, Vector c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vector fnma(Vector a, Vector b, Vector c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
inline Vector rounded(Vector a) { return {vrndnq_f32(a.v)}; }
// a * 2^n for whole n between -126 and 127.
inline Vector scaled(Vector a, Vector n) {
  const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v), vdupq_n_s32(127)), 23);
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(exponent))};
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < 4.
inline void transpose(const float* from, size_t from_stride, float* to, size_t to_stride) {
  float32x4_t rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = vld1q_f32(from + i * from_stride);
  const float32x4x2_t upper = vtrnq_f32(rows[0], rows[1]), lower = vtrnq_f32(rows[2], rows[3]);
  for (int j = 0; j < 2; ++j) {
    vst1q_f32(to + j * to_stride, vcombine_f32(vget_low_f32(upper.val[j]), vget_low_f32(lower.val[j])));
    vst1q_f32(to + (j + 2) * to_stride, vcombine_f32(vget_high_f32(upper.val[j]), vget_high_f32(lower.val[j])));
  }
}

}  // namespace
}  // namespace starling
