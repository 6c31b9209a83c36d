// Attention of some query rows over the keys and values of one head. Included inside a target region, behind
// vector_math.h: the same text for every instruction set.
//
// Keys are taken in blocks (kKeys), and blocks in chunks (kChunk positions from a multiple of it), each chunk with a
// softmax of its own; chunks are joined in order (Dao et al., FlashAttention; Milakov & Gimelshein, online softmax). All
// sums of a row are in the order of positions, so a row's bits depend neither on its neighbours nor on who computes it.
#pragma once

namespace starling {
namespace {

constexpr int kVectors = 4;                                 // of a row's scores that are in registers
constexpr int kKeys = kVectors * Vector::width;             // of a block
constexpr int kRows = Vector::width == 16 ? 6 : 3;          // that are in registers together
constexpr float kNothing = -std::numeric_limits<float>::infinity();

static_assert(kChunk % kKeys == 0);

// out = x [head_dim] with its pairs rotated by a position's angles, times scale. Pairs are (i, i + half), or (2 i, 2 i + 1)
// if interleaved; what is behind them is only scaled.
inline void rotate(const float* x, const Angles& angles, bool interleaved, int head_dim, float scale, float* out) {
  const int half = angles.count;
  int i = 0;
  if (!interleaved) {
    for (; i + Vector::width <= half; i += Vector::width) {
      const Vector a = Vector::load(x + i) * Vector::all(scale), b = Vector::load(x + i + half) * Vector::all(scale);
      const Vector cos = Vector::load(angles.cos + i), sin = Vector::load(angles.sin + i);
      fnma(b, sin, a * cos).store(out + i);
      fma(a, sin, b * cos).store(out + i + half);
    }
  }
  const int next = interleaved ? 1 : half, stride = interleaved ? 2 : 1;
  for (; i < half; ++i) {
    const float a = x[i * stride] * scale, b = x[i * stride + next] * scale;
    out[i * stride] = a * angles.cos[i] - b * angles.sin[i];
    out[i * stride + next] = b * angles.cos[i] + a * angles.sin[i];
  }
  for (i = 2 * half; i < head_dim; ++i) out[i] = x[i] * scale;
}

// Transposed keys of one block: out [head_dim][kKeys]. `count` of them exist, the others become zero.
inline void transpose_keys(const float* keys, int head_dim, int count, float* out) {
  for (int key = 0; key < kKeys; key += Vector::width) {
    if (key + Vector::width <= count) {
      for (int d = 0; d < head_dim; d += Vector::width) {
        transpose(keys + static_cast<size_t>(key) * head_dim + d, head_dim, out + static_cast<size_t>(d) * kKeys + key,
                  kKeys);
      }
      continue;
    }
    for (int k = key; k < key + Vector::width; ++k) {
      for (int d = 0; d < head_dim; ++d) {
        out[static_cast<size_t>(d) * kKeys + k] = k < count ? keys[static_cast<size_t>(k) * head_dim + d] : 0.0f;
      }
    }
  }
}

// acc [Rows][head_dim] += weights [Rows][kKeys] · values [count][head_dim], `Width` vectors of columns from `column`.
template <int Rows, int Width>
inline void add_values(const float* weights, const float* values, int head_dim, int count, int column, float* acc) {
  Vector sums[Rows][Width];
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < Width; ++w) sums[r][w] = Vector::load(acc + r * head_dim + column + w * Vector::width);
  }
  for (int key = 0; key < count; ++key) {
    Vector v[Width];
    for (int w = 0; w < Width; ++w) {
      v[w] = Vector::load(values + static_cast<size_t>(key) * head_dim + column + w * Vector::width);
    }
    for (int r = 0; r < Rows; ++r) {
      const Vector weight = Vector::all(weights[r * kKeys + key]);
      for (int w = 0; w < Width; ++w) sums[r][w] = fma(weight, v[w], sums[r][w]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < Width; ++w) sums[r][w].store(acc + r * head_dim + column + w * Vector::width);
  }
}

// `Rows` query rows against one block of keys.
template <int Rows>
inline void attend_rows(const AttentionRows& rows, int row, const float* transposed, const float* values, int begin,
                        int count, const Partial& out) {
  const int head_dim = rows.head_dim;
  const float* query = rows.queries + static_cast<size_t>(row) * head_dim;
  Vector scores[Rows][kVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < kVectors; ++w) scores[r][w] = Vector::zero();
  }
  for (int d = 0; d < head_dim; ++d) {
    Vector keys[kVectors];
    for (int w = 0; w < kVectors; ++w) keys[w] = Vector::load(transposed + d * kKeys + w * Vector::width);
    for (int r = 0; r < Rows; ++r) {
      const Vector q = Vector::all(query[r * head_dim + d]);
      for (int w = 0; w < kVectors; ++w) scores[r][w] = fma(q, keys[w], scores[r][w]);
    }
  }
  float weights[Rows * kKeys];
  float* acc = out.sums + static_cast<size_t>(row) * head_dim;
  for (int r = 0; r < Rows; ++r) {
    // Of this block the row sees keys [from, to).
    const int position = rows.position + (row + r) / rows.heads;
    const int to = std::min(count, position + 1 - begin);
    const int from = rows.window > 0 ? position + 1 - rows.window - begin : 0;
    Vector greatest = Vector::all(kNothing);
    Vector::Mask seen[kVectors];
    for (int w = 0; w < kVectors; ++w) {
      seen[w] = Vector::not_in(Vector::first(to - w * Vector::width), Vector::first(from - w * Vector::width));
      scores[r][w] = Vector::select(seen[w], scores[r][w], Vector::all(kNothing));
      greatest = max(greatest, scores[r][w]);
    }
    float& most = out.greatest[row + r];
    const float before = most;
    most = std::max(before, greatest.greatest());
    Vector total = Vector::zero();
    for (int w = 0; w < kVectors; ++w) {
      const Vector weight = Vector::select(seen[w], exp(scores[r][w] - Vector::all(most)), Vector::zero());
      weight.store(weights + r * kKeys + w * Vector::width);
      total = total + weight;
    }
    float& sum = out.totals[row + r];
    if (before == most || before == kNothing) {
      sum += total.sum();
      continue;
    }
    const float shrink = std::exp(before - most);
    sum = sum * shrink + total.sum();
    for (int d = 0; d < head_dim; d += Vector::width) {
      (Vector::load(acc + r * head_dim + d) * Vector::all(shrink)).store(acc + r * head_dim + d);
    }
  }
  int column = 0;
  for (; column + kVectors * Vector::width <= head_dim; column += kVectors * Vector::width) {
    add_values<Rows, kVectors>(weights, values, head_dim, count, column, acc);
  }
  for (; column < head_dim; column += Vector::width) {
    add_values<Rows, 1>(weights, values, head_dim, count, column, acc);
  }
}

template <int Rows>
inline void attend_rest(int left, const AttentionRows& rows, int row, const float* transposed, const float* values,
                        int begin, int count, const Partial& out) {
  if constexpr (Rows > 0) {
    if (left == Rows) return attend_rows<Rows>(rows, row, transposed, values, begin, count, out);
    attend_rest<Rows - 1>(left, rows, row, transposed, values, begin, count, out);
  }
}

// Positions [begin, end) of one chunk, for all rows; `out` is started afresh.
inline void attend_chunk(const AttentionRows& rows, int begin, int end, float* scratch, const Partial& out) {
  std::fill_n(out.greatest, rows.count, kNothing);
  std::fill_n(out.totals, rows.count, 0.0f);
  std::fill_n(out.sums, static_cast<size_t>(rows.count) * rows.head_dim, 0.0f);
  for (int block = begin; block < end; block += kKeys) {
    const int count = std::min(kKeys, end - block);
    transpose_keys(rows.keys + static_cast<size_t>(block) * rows.head_dim, rows.head_dim, count, scratch);
    const float* values = rows.values + static_cast<size_t>(block) * rows.head_dim;
    int row = 0;
    for (; row + kRows <= rows.count; row += kRows) attend_rows<kRows>(rows, row, scratch, values, block, count, out);
    attend_rest<kRows - 1>(rows.count - row, rows, row, scratch, values, block, count, out);
  }
}

// into = into joined with the later chunk `next`, for all rows.
inline void join(const AttentionRows& rows, const Partial& next, const Partial& into) {
  for (int row = 0; row < rows.count; ++row) {
    if (next.greatest[row] == kNothing) continue;
    const float most = std::max(into.greatest[row], next.greatest[row]);
    const float keep = into.greatest[row] == kNothing ? 0.0f : std::exp(into.greatest[row] - most);
    const float add = std::exp(next.greatest[row] - most);
    into.greatest[row] = most;
    into.totals[row] = into.totals[row] * keep + next.totals[row] * add;
    float* a = into.sums + static_cast<size_t>(row) * rows.head_dim;
    const float* b = next.sums + static_cast<size_t>(row) * rows.head_dim;
    for (int d = 0; d < rows.head_dim; d += Vector::width) {
      fma(Vector::load(a + d), Vector::all(keep), Vector::load(b + d) * Vector::all(add)).store(a + d);
    }
  }
}

}  // namespace
}  // namespace starling
