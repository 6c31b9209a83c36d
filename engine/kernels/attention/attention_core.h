// Attention of some query rows over the keys and values of one head. Included inside a target region, after
// vector_math.h and halves_*.h: the same text for every instruction set.
//
// Keys are taken in blocks (kKeys), and blocks in chunks (kChunk positions from a multiple of it), each chunk with a
// softmax of its own; chunks are joined in order (Dao et al., FlashAttention; Milakov & Gimelshein, online softmax).
// All sums of a row are in the order of positions, so its bits depend neither on its neighbours nor on who computes it.
// A key that a row does not see has weight 0 in it: one that is not finite reaches the rows of its own sequence that
// share its block, and no other sequence.
//
// A `Product` says how numbers are multiplied: in float32, or in pairs of bfloat16. What it multiplies are 32-bit words
// of `Product::numbers` neighbours: of a head's dimensions in queries and keys, of keys in weights and values.
#pragma once

namespace starling {
namespace {

// Scores that are in registers together: of kRows rows with the kKeys keys of a block, in kVectors vectors each.
constexpr int kVectors = 4;
constexpr int kKeys = kVectors * Vector::width;
constexpr int kRows = Vector::registers == 32 ? 6 : 3;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

static_assert(kChunk % kKeys == 0 && kKeys <= kMostKeys);

// out [width][kKeys] = rows [count][width] transposed; of the kKeys columns those that do not exist become zero.
inline void transpose_words(const float* rows, int width, int count, float* out) {
  for (int key = 0; key < kKeys; key += Vector::width) {
    int d = 0;
    for (; key + Vector::width <= count && d + Vector::width <= width; d += Vector::width) {
      transpose(rows + static_cast<size_t>(key) * width + d, width, out + static_cast<size_t>(d) * kKeys + key, kKeys);
    }
    for (; d < width; ++d) {
      for (int k = key; k < key + Vector::width; ++k) {
        out[static_cast<size_t>(d) * kKeys + k] = k < count ? rows[static_cast<size_t>(k) * width + d] : 0.0f;
      }
    }
  }
}

// Products in float32. Values are read where they are.
struct Float32 {
  static constexpr int numbers = 1;

  static Vector multiply_add(Vector a, Vector b, Vector sum) { return fma(a, b, sum); }
  static const float* queries(const float* rows, int, int, float*) { return rows; }
  static const float* values(const float* rows, int, int, float*) { return rows; }
  static void store_weights(const Vector* weights, float* to) {
    for (int w = 0; w < kVectors; ++w) weights[w].store(to + w * Vector::width);
  }
  // out [head_dim][kKeys] = keys [count][head_dim] transposed; keys that do not exist become zero.
  static void keys(const float* rows, int head_dim, int count, float* out) {
    transpose_words(rows, head_dim, count, out);
  }
};

// A cache of float32, as Float16 and BFloat16 of halves_*.h are of 16 bits.
struct Floats {
  static void store(Vector x, float* to) { x.store(to); }
};

template <typename Cache>
constexpr size_t kCacheBytes = std::is_same_v<Cache, Floats> ? sizeof(float) : sizeof(uint16_t);

// `count` numbers of the cache, a multiple of 16, as float32: in `scratch`, or where they are.
template <typename Cache>
inline const float* widened(const void* from, int count, float* scratch) {
  if constexpr (std::is_same_v<Cache, Floats>) {
    return static_cast<const float*>(from);
  } else {
    const auto* halves = static_cast<const uint16_t*>(from);
    for (int i = 0; i < count; i += Vector::width) Cache::load(halves + i).store(scratch + i);
    return scratch;
  }
}

// A row [head_dim] into the cache.
template <typename Cache>
inline void store_row(const float* row, int head_dim, void* to) {
  using Stored = std::conditional_t<std::is_same_v<Cache, Floats>, float, uint16_t>;
  for (int d = 0; d < head_dim; d += Vector::width) Cache::store(Vector::load(row + d), static_cast<Stored*>(to) + d);
}

// How rows of the cache become what a Product multiplies: keys in `out`, values there or in `scratch` or where they
// are.
template <typename Product, typename Cache>
struct Reader {
  static void keys(const void* from, int head_dim, int count, float* scratch, float* out) {
    Product::keys(widened<Cache>(from, count * head_dim, scratch), head_dim, count, out);
  }
  static const float* values(const void* from, int head_dim, int count, float* scratch, float* out) {
    return Product::values(widened<Cache>(from, count * head_dim, scratch), head_dim, count, out);
  }
};

// out = x [head_dim] with its pairs rotated by a position's angles, times scale. Pairs are (i, i + half), if
// interleaved (2 i, 2 i + 1); what is after them is only scaled.
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

// acc [Rows][head_dim] += weights [Rows][words] · values [words][head_dim], `Width` vectors of columns from `column`.
template <typename Product, int Rows, int Width>
inline void add_values(const float* weights, const float* values, int head_dim, int words, int column, float* acc) {
  Vector sums[Rows][Width];
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < Width; ++w) sums[r][w] = Vector::load(acc + r * head_dim + column + w * Vector::width);
  }
  for (int word = 0; word < words; ++word) {
    Vector v[Width];
    for (int w = 0; w < Width; ++w) {
      v[w] = Vector::load(values + static_cast<size_t>(word) * head_dim + column + w * Vector::width);
    }
    for (int r = 0; r < Rows; ++r) {
      const Vector weight = Vector::all(weights[r * kKeys / Product::numbers + word]);
      for (int w = 0; w < Width; ++w) sums[r][w] = Product::multiply_add(weight, v[w], sums[r][w]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < Width; ++w) sums[r][w].store(acc + r * head_dim + column + w * Vector::width);
  }
}

// One block of keys, made ready: positions from `begin`, `count` of them.
struct KeyBlock {
  const float* keys;    // words [head_dim / numbers][kKeys]
  const float* values;  // words [kKeys / numbers][head_dim]
  int begin;
  int count;
};

// What a row's scores of a block weigh, as words in `weights`; what the row has so far is made to fit its new greatest.
template <typename Product>
inline void weigh(const AttentionRows& rows, int row, const KeyBlock& block, Vector (&scores)[kVectors], float* weights,
                  const Partial& out) {
  // Of this block the row sees keys [from, to).
  const int position = rows.position + row / rows.heads;
  const int to = std::min(block.count, position + 1 - block.begin);
  const int from = rows.window > 0 ? position + 1 - rows.window - block.begin : 0;
  Vector greatest = Vector::all(kNothing), seen_weights[kVectors];
  Vector::Mask seen[kVectors];
  for (int w = 0; w < kVectors; ++w) {
    seen[w] = Vector::not_in(Vector::first(to - w * Vector::width), Vector::first(from - w * Vector::width));
    scores[w] = Vector::select(seen[w], scores[w], Vector::all(kNothing));
    greatest = max(greatest, scores[w]);
  }
  float& most = out.greatest[row];
  const float before = most;
  most = std::max(before, greatest.greatest());
  Vector total = Vector::zero();
  for (int w = 0; w < kVectors; ++w) {
    seen_weights[w] = Vector::select(seen[w], exp(scores[w] - Vector::all(most)), Vector::zero());
    total = total + seen_weights[w];
  }
  Product::store_weights(seen_weights, weights);
  float& sum = out.totals[row];
  if (before == most || before == kNothing) {
    sum += total.sum();
    return;
  }
  float* acc = out.sums + static_cast<size_t>(row) * rows.head_dim;
  const float shrink = std::exp(before - most);
  sum = sum * shrink + total.sum();
  for (int d = 0; d < rows.head_dim; d += Vector::width) {
    (Vector::load(acc + d) * Vector::all(shrink)).store(acc + d);
  }
}

// `Rows` query rows, as words, against one block.
template <typename Product, int Rows>
inline void attend_rows(const AttentionRows& rows, const float* queries, int row, const KeyBlock& block,
                        const Partial& out) {
  const int head_dim = rows.head_dim, words = head_dim / Product::numbers;
  const float* query = queries + static_cast<size_t>(row) * words;
  Vector scores[Rows][kVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < kVectors; ++w) scores[r][w] = Vector::zero();
  }
  for (int word = 0; word < words; ++word) {
    Vector keys[kVectors];
    for (int w = 0; w < kVectors; ++w) keys[w] = Vector::load(block.keys + word * kKeys + w * Vector::width);
    for (int r = 0; r < Rows; ++r) {
      const Vector q = Vector::all(query[r * words + word]);
      for (int w = 0; w < kVectors; ++w) scores[r][w] = Product::multiply_add(q, keys[w], scores[r][w]);
    }
  }
  float weights[Rows * kKeys / Product::numbers];
  for (int r = 0; r < Rows; ++r) {
    weigh<Product>(rows, row + r, block, scores[r], weights + r * kKeys / Product::numbers, out);
  }
  float* acc = out.sums + static_cast<size_t>(row) * head_dim;
  const int seen_words = (block.count + Product::numbers - 1) / Product::numbers;
  int column = 0;
  for (; column + kVectors * Vector::width <= head_dim; column += kVectors * Vector::width) {
    add_values<Product, Rows, kVectors>(weights, block.values, head_dim, seen_words, column, acc);
  }
  for (; column < head_dim; column += Vector::width) {
    add_values<Product, Rows, 1>(weights, block.values, head_dim, seen_words, column, acc);
  }
}

template <typename Product, int Rows>
inline void attend_rest(int left, const AttentionRows& rows, const float* queries, int row, const KeyBlock& block,
                        const Partial& out) {
  if constexpr (Rows > 0) {
    if (left == Rows) return attend_rows<Product, Rows>(rows, queries, row, block, out);
    attend_rest<Product, Rows - 1>(left, rows, queries, row, block, out);
  }
}

// Positions [begin, end) of one chunk, block by block: `attend`(queries, block) for all rows. `out` is started afresh.
template <typename Product, typename Cache, typename Attend>
inline void each_block(const AttentionRows& rows, int begin, int end, float* scratch, const Partial& out,
                       const Attend& attend) {
  std::fill_n(out.greatest, rows.count, kNothing);
  std::fill_n(out.totals, rows.count, 0.0f);
  std::fill_n(out.sums, static_cast<size_t>(rows.count) * rows.head_dim, 0.0f);
  const size_t size = static_cast<size_t>(kMostKeys) * rows.head_dim;
  float *keys = scratch, *values = keys + size, *scratch_rows = values + size;
  const float* queries = Product::queries(rows.queries, rows.count, rows.head_dim, scratch_rows + size);
  for (int first = begin; first < end; first += kKeys) {
    const int count = std::min(kKeys, end - first);
    const size_t place = static_cast<size_t>(first) * rows.head_dim * kCacheBytes<Cache>;
    const auto *key_rows = static_cast<const uint8_t*>(rows.keys) + place,
               *value_rows = static_cast<const uint8_t*>(rows.values) + place;
    Reader<Product, Cache>::keys(key_rows, rows.head_dim, count, scratch_rows, keys);
    const float* ready = Reader<Product, Cache>::values(value_rows, rows.head_dim, count, scratch_rows, values);
    attend(queries, KeyBlock{keys, ready, first, count});
  }
}

template <typename Product, typename Cache>
void attend_chunk(const AttentionRows& rows, int begin, int end, float* scratch, const Partial& out) {
  each_block<Product, Cache>(rows, begin, end, scratch, out, [&](const float* queries, const KeyBlock& block) {
    int row = 0;
    for (; row + kRows <= rows.count; row += kRows) attend_rows<Product, kRows>(rows, queries, row, block, out);
    attend_rest<Product, kRows - 1>(rows.count - row, rows, queries, row, block, out);
  });
}

// into = into joined with the later chunk `next`, for all rows.
inline void join(const AttentionRows& rows, const Partial& next, const Partial& into) {
  for (int row = 0; row < rows.count; ++row) {
    if (next.totals[row] == 0) continue;  // it saw none of the keys
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

template <typename Product, typename Cache>
constexpr AttentionKernels kernels = {rotate, store_row<Cache>, attend_chunk<Product, Cache>, join};

}  // namespace
}  // namespace starling
