#include "operators/group_query_attention.h"

#include <algorithm>
#include <utility>

#include "simd/memory.h"

namespace starling {
namespace {

enum Input : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLengths, kTotal, kCos, kSin };

constexpr int kTileRows = 96;   // query rows that share a pass over the keys
constexpr int kSplitRows = 24;  // up to so many rows of a head, its chunks are shared out to threads instead

// Memory of `rows` partial results in one piece of scratch.
size_t partial_size(int rows, int head_dim) { return static_cast<size_t>(rows) * (head_dim + 2); }

Partial partial_at(float* memory, int rows) { return {memory, memory + rows, memory + 2 * rows}; }

}  // namespace

// What one call works on.
struct GroupQueryAttention::Step {
  const float *query, *key, *value, *cos, *sin;
  float *past_key, *past_value, *output, *queries;
  const int32_t* lengths;
  int batch, tokens, head_dim, positions;
  int half, angles;                 // pairs that are rotated; positions of the rotary tables
  size_t query_stride, key_stride;  // from one token to the next
  int group, tile, tiles;           // query heads of a key head; tokens of a tile; tiles of a row

  // compute() has checked that it lies in the cache.
  int start(int row) const { return lengths[row] + 1 - tokens; }
  size_t cache_place(int row, int kv_heads, int head, int position) const {
    return ((static_cast<size_t>(row) * kv_heads + head) * positions + position) * head_dim;
  }
  // The rotated queries of one token and key head: [batch][kv_heads][tokens][group][head_dim].
  float* queries_at(int row, int kv_heads, int head, int token) const {
    return queries + ((static_cast<size_t>(row) * kv_heads + head) * tokens + token) * group * head_dim;
  }
};

GroupQueryAttention::GroupQueryAttention(const NodeInfo& node, NoContext)
    : heads_(to_int(node.integer("num_heads"), "num_heads is unusable")),
      kv_heads_(to_int(node.integer("kv_num_heads"), "kv_num_heads is unusable")),
      window_(static_cast<int>(std::clamp<int64_t>(node.integer("local_window_size"), 0, kMost))),
      scale_(node.real("scale")),
      rotates_(node.integer("do_rotary") != 0),
      interleaved_(node.integer("rotary_interleaved") != 0),
      kernels_(attention_kernels(node.integer("reduced_precision") != 0)) {
  require(kernels_ != nullptr, "this processor has neither AVX-512 nor AVX2");
  require(kv_heads_ > 0 && heads_ > 0 && heads_ % kv_heads_ == 0, "num_heads is not a multiple of kv_num_heads");
}

void GroupQueryAttention::compute(const Call& call) const {
  Shape shape = call.input_shape(kQuery);
  const Shape cache = call.input_shape(kPastKey), lengths = call.input_shape(kLengths);
  require(shape.rank == 3 && cache.rank == 4 && lengths.elements() == shape[0], "query, cache and lengths do not fit");
  require(cache[0] == shape[0] && cache[1] == kv_heads_, "past_key has other rows or heads");
  require(call.input_shape(kPastValue).elements() == cache.elements(), "past_value has another shape than past_key");
  Step step{};
  require(cache[3] > 0 && cache[3] % 16 == 0 && cache[3] <= kMostHeadDim, "head_dim is not a multiple of 16 up to 256");
  step.batch = to_int(shape[0], "there are too many rows");
  step.tokens = to_int(shape[1], "there are too many tokens");
  step.positions = to_int(cache[2], "the cache has too many positions");
  step.head_dim = static_cast<int>(cache[3]);
  step.group = heads_ / kv_heads_;
  to_int(std::max(times(times(step.batch, step.tokens), step.group),
                  times(times(step.batch, kv_heads_), ceil_div(step.positions, kChunk))),
         "there are too many rows, tokens and heads");
  step.query = call.input_data<float>(kQuery);
  step.key = call.input_data<float>(kKey);
  step.value = call.input_data<float>(kValue);
  const bool packed = step.key == nullptr;
  const size_t query_width = static_cast<size_t>(heads_) * step.head_dim;
  const size_t key_width = static_cast<size_t>(kv_heads_) * step.head_dim;
  require(static_cast<size_t>(shape.back()) == query_width + (packed ? 2 * key_width : 0), "query has another width");
  if (!packed) {
    const int64_t elements = shape[0] * shape[1] * static_cast<int64_t>(key_width);
    require(step.value != nullptr && call.input_shape(kKey).elements() == elements &&
                call.input_shape(kValue).elements() == elements,
            "key or value has another shape");
  }
  step.query_stride = static_cast<size_t>(shape.back());
  step.key_stride = packed ? step.query_stride : key_width;
  if (packed) {
    step.key = step.query + query_width;
    step.value = step.key + key_width;
  }
  if (rotates_) {
    step.cos = call.input_data<float>(kCos);
    step.sin = call.input_data<float>(kSin);
    require(step.cos != nullptr && step.sin != nullptr, "do_rotary without its tables");
    const Shape angles = call.input_shape(kCos);
    require(
        angles.rank == 2 && call.input_shape(kSin).elements() == angles.elements() && angles[1] <= step.head_dim / 2,
        "cos and sin do not fit the heads");
    step.half = static_cast<int>(angles[1]);
    step.angles = to_int(angles[0], "the rotary tables have too many positions");
  }
  step.lengths = call.input_data<int32_t>(kLengths);
  for (int row = 0; row < step.batch; ++row) {
    const int64_t last = step.lengths[row];
    require(last + 1 - step.tokens >= 0 && last < step.positions, "seqlens_k lies outside the cache");
    require(!rotates_ || last < step.angles, "seqlens_k lies outside the rotary tables");
  }
  shape.dims[2] = static_cast<int64_t>(query_width);
  step.output = call.output<float>(0, shape);
  step.past_key = call.output<float>(1, cache);
  step.past_value = call.output<float>(2, cache);
  require(step.past_key == call.input_data<float>(kPastKey) && step.past_value == call.input_data<float>(kPastValue),
          "present must be bound to the memory of past");
  if (step.batch == 0 || step.tokens == 0) return;

  thread_local Array<float> queries;
  step.queries = grow(queries, static_cast<size_t>(step.batch) * step.tokens * query_width);
  const size_t all_tokens = static_cast<size_t>(step.batch) * step.tokens;
  constexpr size_t kSerialTokens = 4;  // waking the other threads costs more than writing this few
  if (all_tokens <= kSerialTokens) {
    for (size_t token = 0; token < all_tokens; ++token) write_token(step, token);
  } else {
    call.parallel(all_tokens, [&](size_t token) { write_token(step, token); });
  }
  if (step.tokens * step.group <= kSplitRows) return attend_split(call, step);
  step.tile = std::max(kTileRows / step.group, 1);
  step.tiles = ceil_div(step.tokens, step.tile);
  call.parallel(static_cast<size_t>(step.batch) * kv_heads_ * step.tiles,
                [&](size_t task) { attend_tile(step, task); });
}

// Rotate one token's queries and key; key and value go into the cache.
void GroupQueryAttention::write_token(const Step& step, size_t index) const {
  const int row = static_cast<int>(index / step.tokens), token = static_cast<int>(index % step.tokens);
  const int position = step.start(row) + token, half = step.half;
  const Angles angles{step.cos + static_cast<size_t>(position) * half, step.sin + static_cast<size_t>(position) * half,
                      half};
  const float* query = step.query + index * step.query_stride;
  for (int head = 0; head < heads_; ++head) {
    float* out = step.queries_at(row, kv_heads_, head / step.group, token) + head % step.group * step.head_dim;
    const float* from = query + static_cast<size_t>(head) * step.head_dim;
    kernels_->rotate(from, angles, interleaved_, step.head_dim, scale_, out);
  }
  for (int head = 0; head < kv_heads_; ++head) {
    const size_t place = step.cache_place(row, kv_heads_, head, position);
    const size_t source = index * step.key_stride + static_cast<size_t>(head) * step.head_dim;
    kernels_->rotate(step.key + source, angles, interleaved_, step.head_dim, 1.0f, step.past_key + place);
    std::copy_n(step.value + source, step.head_dim, step.past_value + place);
  }
}

AttentionRows GroupQueryAttention::rows_of(const Step& step, int row, int head, int token, int tokens) const {
  const size_t cache = step.cache_place(row, kv_heads_, head, 0);
  return {step.queries_at(row, kv_heads_, head, token),
          step.past_key + cache,
          step.past_value + cache,
          tokens * step.group,
          step.head_dim,
          step.group,
          step.start(row) + token,
          window_};
}

// One tile of tokens against all chunks, one after the other.
void GroupQueryAttention::attend_tile(const Step& step, size_t task) const {
  const int pairs = step.batch * kv_heads_;
  const int rank = static_cast<int>(task / pairs), pair = static_cast<int>(task % pairs);
  // Later tiles see more keys: taken from both ends, contiguous shares of the tasks are equally long.
  const int tile = rank % 2 == 0 ? rank / 2 : step.tiles - 1 - rank / 2;
  const int row = pair / kv_heads_, head = pair % kv_heads_, token = tile * step.tile;
  const AttentionRows rows = rows_of(step, row, head, token, std::min(step.tile, step.tokens - token));
  const int end = rows.position + rows.count / rows.heads;
  const int first = window_ > 0 ? std::max(rows.position + 1 - window_, 0) / kChunk : 0;

  thread_local Array<float> memory;
  const size_t size = partial_size(rows.count, rows.head_dim);
  float* scratch = grow(memory, 2 * size + attend_scratch(rows.count, rows.head_dim));
  const Partial sums = partial_at(scratch, rows.count), next = partial_at(scratch + size, rows.count);
  for (int begin = first * kChunk; begin < end; begin += kChunk) {
    const bool is_first = begin == first * kChunk;
    kernels_->attend(rows, begin, std::min(begin + kChunk, end), scratch + 2 * size, is_first ? sums : next);
    if (!is_first) kernels_->join(rows, next, sums);
  }
  write_result(step, rows, sums, row, head, token);
}

// Few tokens: every chunk of every head is a task, and their results are joined when all are there.
void GroupQueryAttention::attend_split(const Call& call, const Step& step) const {
  const int pairs = step.batch * kv_heads_, count = step.tokens * step.group;
  int chunks = 0;
  for (int row = 0; row < step.batch; ++row) chunks = std::max(chunks, ceil_div(step.lengths[row] + 1, kChunk));
  const size_t size = partial_size(count, step.head_dim);
  thread_local Array<float> memory;
  float* partials = grow(memory, size * pairs * chunks);
  const auto bounds = [&](int row) {
    const int first = window_ > 0 ? std::max(step.start(row) + 1 - window_, 0) / kChunk : 0;
    return std::pair(first, ceil_div(step.lengths[row] + 1, kChunk));
  };
  call.parallel(static_cast<size_t>(pairs) * chunks, [&](size_t task) {
    const int pair = static_cast<int>(task / chunks), chunk = static_cast<int>(task % chunks);
    const auto [first, last] = bounds(pair / kv_heads_);
    if (chunk < first || chunk >= last) return;
    const AttentionRows rows = rows_of(step, pair / kv_heads_, pair % kv_heads_, 0, step.tokens);
    const int end = std::min((chunk + 1) * kChunk, step.lengths[pair / kv_heads_] + 1);
    thread_local Array<float> prepared;
    float* scratch = grow(prepared, attend_scratch(count, rows.head_dim));
    kernels_->attend(rows, chunk * kChunk, end, scratch, partial_at(partials + task * size, count));
  });
  for (int pair = 0; pair < pairs; ++pair) {
    const int row = pair / kv_heads_, head = pair % kv_heads_;
    const auto [first, last] = bounds(row);
    const AttentionRows rows = rows_of(step, row, head, 0, step.tokens);
    const auto partial = [&](int chunk) {
      return partial_at(partials + (static_cast<size_t>(pair) * chunks + chunk) * size, count);
    };
    for (int chunk = first + 1; chunk < last; ++chunk) kernels_->join(rows, partial(chunk), partial(first));
    write_result(step, rows, partial(first), row, head, 0);
  }
}

void GroupQueryAttention::write_result(const Step& step, const AttentionRows& rows, const Partial& sums, int row,
                                       int head, int token) const {
  for (int i = 0; i < rows.count; ++i) {
    const float factor = 1.0f / sums.totals[i];
    const size_t at = static_cast<size_t>(row) * step.tokens + token + i / rows.heads;
    float* out = step.output + (at * heads_ + head * rows.heads + i % rows.heads) * rows.head_dim;
    const float* from = sums.sums + static_cast<size_t>(i) * rows.head_dim;
    for (int d = 0; d < rows.head_dim; ++d) out[d] = from[d] * factor;
  }
}

}  // namespace starling
