// Eight floats at a time. Included inside a target region.
#pragma once

namespace starling {
namespace {

struct Vector {
  static constexpr int width = 8;
  static constexpr int registers = 16;
  using Mask = __m256i;

  __m256 v;

  static Vector zero() { return {_mm256_setzero_ps()}; }
  static Vector all(float x) { return {_mm256_set1_ps(x)}; }
  static Vector load(const float* from) { return {_mm256_loadu_ps(from)}; }
  // The lanes of `mask`, zero in the others, whose memory is not touched.
  static Vector load(const float* from, Mask mask) { return {_mm256_maskload_ps(from, mask)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
  void store(float* to, Mask mask) const { _mm256_maskstore_ps(to, mask, v); }

  // The first `count` lanes: all of them from `width` on, none below 1.
  static Mask first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Mask not_in(Mask a, Mask b) { return _mm256_andnot_si256(b, a); }
  // x in the lanes of `mask`, `other` in the rest.
  static Vector select(Mask mask, Vector x, Vector other) {
    return {_mm256_blendv_ps(other.v, x.v, _mm256_castsi256_ps(mask))};
  }

  float sum() const {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  float greatest() const {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  // Of numbers that are not negative: not a number where any of them is none.
  float greatest_magnitude() const {
    const __m256i bits = _mm256_castps_si256(v);
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1))));
  }
};

inline Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v)}; }
// b where either is not a number.
inline Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
// Of a and |b|, for a that is not negative: bits of floats are in the order of their magnitudes, and what is not a
// number is above all.
inline Vector max_magnitude(Vector a, Vector b) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), b.v);
  return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(magnitude)))};
}
inline Vector min(Vector a, Vector b) { return {_mm256_min_ps(a.v, b.v)}; }
// a * b + c in one rounding, and c - a * b.
inline Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vector fnma(Vector a, Vector b, Vector c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vector rounded(Vector a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for whole n between -126 and 127.
inline Vector scaled(Vector a, Vector n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(exponent))};
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < 8.
inline void transpose(const float* from, size_t from_stride, float* to, size_t to_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xEE);
    }
  }
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * to_stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
    _mm256_storeu_ps(to + (j + 4) * to_stride, _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
  }
}

}  // namespace
}  // namespace starling
