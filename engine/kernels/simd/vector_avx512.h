// Sixteen floats at a time. Included inside a target region.
#pragma once

namespace starling {
namespace {

struct Vector {
  static constexpr int width = 16;
  static constexpr int registers = 32;
  using Mask = __mmask16;

  __m512 v;

  static Vector zero() { return {_mm512_setzero_ps()}; }
  static Vector all(float x) { return {_mm512_set1_ps(x)}; }
  static Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
  // The lanes of `mask`, zero in the others, whose memory is not touched.
  static Vector load(const float* from, Mask mask) { return {_mm512_maskz_loadu_ps(mask, from)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
  void store(float* to, Mask mask) const { _mm512_mask_storeu_ps(to, mask, v); }

  // The first `count` lanes: all of them from `width` on, none below 1.
  static Mask first(int count) {
    if (count >= width) return 0xFFFF;
    return count <= 0 ? 0 : static_cast<Mask>((1u << count) - 1);
  }
  static Mask not_in(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }
  // x in the lanes of `mask`, `other` in the rest.
  static Vector select(Mask mask, Vector x, Vector other) { return {_mm512_mask_blend_ps(mask, other.v, x.v)}; }

  float sum() const { return _mm512_reduce_add_ps(v); }
  float greatest() const { return _mm512_reduce_max_ps(v); }
  // Of numbers that are not negative: not a number where any of them is none.
  float greatest_magnitude() const {
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(v));
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    return magnitude;
  }
};

inline Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
// b where either is not a number.
inline Vector max(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
// Of a and |b|, for a that is not negative: bits of floats are in the order of their magnitudes, and what is not a
// number is above all.
inline Vector max_magnitude(Vector a, Vector b) {
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(_mm512_abs_ps(b.v))))};
}
inline Vector min(Vector a, Vector b) { return {_mm512_min_ps(a.v, b.v)}; }
// a * b + c in one rounding, and c - a * b.
inline Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vector fnma(Vector a, Vector b, Vector c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vector rounded(Vector a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for whole n.
inline Vector scaled(Vector a, Vector n) { return {_mm512_scalef_ps(a.v, n.v)}; }

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < 16.
inline void transpose(const float* from, size_t from_stride, float* to, size_t to_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4 i + j] holds column 4 c + j of rows 4 i … 4 i + 3 in its quarter c.
  for (int j = 0; j < 4; ++j) {
    const __m512 left = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x44),
                 right = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x44);
    const __m512 left2 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xEE);
    const __m512 right2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xEE);
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(left, right, 0x88));
    _mm512_storeu_ps(to + (j + 4) * to_stride, _mm512_shuffle_f32x4(left, right, 0xDD));
    _mm512_storeu_ps(to + (j + 8) * to_stride, _mm512_shuffle_f32x4(left2, right2, 0x88));
    _mm512_storeu_ps(to + (j + 12) * to_stride, _mm512_shuffle_f32x4(left2, right2, 0xDD));
  }
}

}  // namespace
}  // namespace starling
