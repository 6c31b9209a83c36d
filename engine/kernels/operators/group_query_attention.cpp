#include "operators/group_query_attention.h"

#include <algorithm>
#include <utility>

#include "simd/memory.h"

namespace starling {
namespace {

enum Input : size_t { kQuery, kKey, kValue, kPastKey, kPastValue, kLengths, kTotal, kCos, kSin };

constexpr int kTileRows = 96;        // query rows that share a pass over the keys
constexpr int kSplitRows = 96;       // up to so many rows of a head, its chunks are shared out to threads instead
constexpr int kSerialTokens = 4;     // waking the other threads costs more than writing this few
constexpr int64_t kPartNumbers = 3;  // of a part: its row, first position and count of tokens

// Memory of `rows` partial results in one piece of scratch.
size_t partial_size(int rows, int head_dim) { return static_cast<size_t>(rows) * (head_dim + 2); }

Partial partial_at(float* memory, int rows) { return {memory, memory + rows, memory + 2 * rows}; }

}  // namespace

// Tokens that follow each other in one row of the cache; the first of them is token `first` of the call.
struct GroupQueryAttention::Part {
  int row, start, tokens, first;

  int end() const { return start + tokens; }
};

// Some tokens of a part against one chunk of a head's keys, or, where `chunk` is -1, against all that they see.
struct GroupQueryAttention::Task {
  int part, head, token, tokens, chunk;
  size_t partial;  // where a chunk's result goes
};

// What one call works on.
struct GroupQueryAttention::Step {
  const float *query, *key, *value, *cos, *sin;
  uint8_t *past_key, *past_value;
  float *output, *queries;
  const Part* parts;
  int count, tokens, head_dim, positions;  // parts; tokens of all of them
  int half, angles;                        // pairs that are rotated; positions of the rotary tables
  size_t query_stride, key_stride;         // from one token to the next
  int group;                               // query heads of a key head

  size_t cache_place(int row, int kv_heads, int head, int position) const {
    return ((static_cast<size_t>(row) * kv_heads + head) * positions + position) * head_dim;
  }
  // The rotated queries of one token and key head: of each part [kv_heads][tokens][group][head_dim].
  float* queries_at(const Part& part, int kv_heads, int head, int token) const {
    const size_t before = static_cast<size_t>(part.first) * kv_heads + static_cast<size_t>(head) * part.tokens + token;
    return queries + before * group * head_dim;
  }
  bool is_split(const Part& part) const { return part.tokens * group <= kSplitRows; }
};

GroupQueryAttention::GroupQueryAttention(const NodeInfo& node, CacheType type)
    : heads_(to_int(node.integer("num_heads"), "num_heads is unusable")),
      kv_heads_(to_int(node.integer("kv_num_heads"), "kv_num_heads is unusable")),
      window_(static_cast<int>(std::clamp<int64_t>(node.integer("local_window_size"), 0, kMost))),
      scale_(node.real("scale")),
      cache_bytes_(type == CacheType::kFloat32 ? sizeof(float) : sizeof(uint16_t)),
      rotates_(node.integer("do_rotary") != 0),
      interleaved_(node.integer("rotary_interleaved") != 0),
      kernels_(attention_kernels(node.integer("reduced_precision") != 0, type)) {
  require(kernels_ != nullptr, kNoKernels);
  require(kv_heads_ > 0 && heads_ > 0 && heads_ % kv_heads_ == 0, "num_heads is not a multiple of kv_num_heads");
}

void GroupQueryAttention::compute(const Call& call) const {
  Shape shape = call.input_shape(kQuery);
  const Shape cache = call.input_shape(kPastKey), lengths = call.input_shape(kLengths);
  require(shape.rank == 3 && cache.rank == 4, "query and cache do not fit");
  const bool by_parts = shape[0] == 1 && lengths.elements() != 1;
  require(by_parts ? lengths.elements() % kPartNumbers == 0 : lengths.elements() == shape[0],
          "query and lengths do not fit");
  require((by_parts || cache[0] == shape[0]) && cache[1] == kv_heads_, "past_key has other rows or heads");
  require(call.input_shape(kPastValue).elements() == cache.elements(), "past_value has another shape than past_key");
  Step step{};
  require(cache[3] > 0 && cache[3] % 16 == 0 && cache[3] <= kMostHeadDim, "head_dim is not a multiple of 16 up to 256");
  step.tokens = to_int(times(shape[0], shape[1]), "there are too many tokens");
  step.positions = to_int(cache[2], "the cache has too many positions");
  step.head_dim = static_cast<int>(cache[3]);
  step.group = heads_ / kv_heads_;
  to_int(std::max(times(step.tokens, heads_), times(times(cache[0], kv_heads_), ceil_div(step.positions, kChunk))),
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
  thread_local Array<Part> parts;
  const auto* numbers = call.input_data<int32_t>(kLengths);
  step.count = static_cast<int>(by_parts ? lengths.elements() / kPartNumbers : shape[0]);
  require(step.count > 0 || step.tokens == 0, "query and lengths do not fit");
  step.parts = grow(parts, static_cast<size_t>(step.count));
  for (int part = 0, first = 0; part < step.count; ++part) {
    Part& made = parts.data()[part];
    made = by_parts ? read_part(numbers + part * kPartNumbers)
                    : read_row(part, numbers[part], to_int(shape[1], "there are too many tokens"));
    made.first = first;
    const bool is_in_order = part == 0 || made.row > parts.data()[part - 1].row;
    require(is_in_order && made.row < cache[0], "seqlens_k names rows that the cache does not have, or in no order");
    require(made.start >= 0 && made.tokens >= 0 && made.tokens <= step.tokens - first &&
                made.start <= step.positions - made.tokens,
            "seqlens_k lies outside the cache");
    require(!rotates_ || made.end() <= step.angles, "seqlens_k lies outside the rotary tables");
    first += made.tokens;
    require(part + 1 < step.count || first == step.tokens, "seqlens_k has parts of another number of tokens");
  }
  shape.dims[2] = static_cast<int64_t>(query_width);
  step.output = call.output<float>(0, shape);
  step.past_key = call.output<uint8_t>(1, cache);
  step.past_value = call.output<uint8_t>(2, cache);
  require(
      step.past_key == call.input_data<uint8_t>(kPastKey) && step.past_value == call.input_data<uint8_t>(kPastValue),
      "present must be bound to the memory of past");
  if (step.tokens == 0 || step.count == 0) return;

  thread_local Array<float> queries;
  step.queries = grow(queries, static_cast<size_t>(step.tokens) * query_width);
  write_tokens(call, step);
  attend(call, step);
}

// Rotate the tokens' queries and keys; keys and values go into the cache.
void GroupQueryAttention::write_tokens(const Call& call, const Step& step) const {
  thread_local Array<const Part*> memory;
  const Part** owners = grow(memory, static_cast<size_t>(step.tokens));
  for (int part = 0; part < step.count; ++part) {
    std::fill_n(owners + step.parts[part].first, step.parts[part].tokens, step.parts + part);
  }
  const auto write = [&](size_t index) {
    write_token(step, *owners[index], static_cast<int>(index) - owners[index]->first);
  };
  if (step.tokens > kSerialTokens) return call.parallel(static_cast<size_t>(step.tokens), write);
  for (int index = 0; index < step.tokens; ++index) write(static_cast<size_t>(index));
}

void GroupQueryAttention::write_token(const Step& step, const Part& part, int token) const {
  const int position = part.start + token, half = step.half;
  const size_t index = static_cast<size_t>(part.first) + token;
  const Angles angles{step.cos + static_cast<size_t>(position) * half, step.sin + static_cast<size_t>(position) * half,
                      half};
  const float* query = step.query + index * step.query_stride;
  for (int head = 0; head < heads_; ++head) {
    float* out = step.queries_at(part, kv_heads_, head / step.group, token) + head % step.group * step.head_dim;
    const float* from = query + static_cast<size_t>(head) * step.head_dim;
    kernels_->rotate(from, angles, interleaved_, step.head_dim, scale_, out);
  }
  for (int head = 0; head < kv_heads_; ++head) {
    const size_t place = step.cache_place(part.row, kv_heads_, head, position) * cache_bytes_;
    const size_t source = index * step.key_stride + static_cast<size_t>(head) * step.head_dim;
    alignas(64) float rotated[kMostHeadDim];
    kernels_->rotate(step.key + source, angles, interleaved_, step.head_dim, 1.0f, rotated);
    kernels_->store(rotated, step.head_dim, step.past_key + place);
    kernels_->store(step.value + source, step.head_dim, step.past_value + place);
  }
}

// Parts of few tokens are cut by chunks of keys, so that all threads have work, the others by tiles of tokens.
void GroupQueryAttention::attend(const Call& call, const Step& step) const {
  thread_local Array<Task> memory;
  size_t most = 0;
  for (int part = 0; part < step.count; ++part) {
    const Part& of = step.parts[part];
    most += static_cast<size_t>(kv_heads_) * std::max(ceil_div(of.end(), kChunk), of.tokens);
  }
  Task* tasks = grow(memory, most);
  size_t count = 0, partials = 0;
  for (int part = 0; part < step.count; ++part) {
    if (!step.is_split(step.parts[part])) count = add_tiles(step, part, tasks, count);
  }
  for (int part = 0; part < step.count; ++part) {
    if (step.is_split(step.parts[part])) count = add_chunks(step, part, tasks, count, &partials);
  }
  thread_local Array<float> results;
  float* sums = grow(results, partials);
  call.parallel(count, [&](size_t index) {
    const Task& task = tasks[index];
    task.chunk < 0 ? attend_tile(step, task) : attend_chunk(step, task, sums);
  });
  join_chunks(call, step, tasks, count, sums);
}

// The tiles of a part, of all heads.
size_t GroupQueryAttention::add_tiles(const Step& step, int part, Task* tasks, size_t count) const {
  const int tokens = step.parts[part].tokens, tile = std::max(kTileRows / step.group, 1);
  const int tiles = ceil_div(tokens, tile);
  for (int rank = 0; rank < tiles; ++rank) {
    // Later tiles see more keys: taken from both ends, contiguous shares of the tasks are equally long.
    const int token = (rank % 2 == 0 ? rank / 2 : tiles - 1 - rank / 2) * tile;
    for (int head = 0; head < kv_heads_; ++head) {
      tasks[count++] = {part, head, token, std::min(tile, tokens - token), -1, 0};
    }
  }
  return count;
}

// The chunks that a part's tokens see, head by head.
size_t GroupQueryAttention::add_chunks(const Step& step, int part, Task* tasks, size_t count, size_t* partials) const {
  const Part& of = step.parts[part];
  const int first = window_ > 0 ? std::max(of.start + 1 - window_, 0) / kChunk : 0;
  for (int head = 0; of.tokens > 0 && head < kv_heads_; ++head) {
    for (int chunk = first; chunk < ceil_div(of.end(), kChunk); ++chunk) {
      tasks[count++] = {part, head, 0, of.tokens, chunk, *partials};
      *partials += partial_size(of.tokens * step.group, step.head_dim);
    }
  }
  return count;
}

AttentionRows GroupQueryAttention::rows_of(const Step& step, const Task& task) const {
  const Part& part = step.parts[task.part];
  const size_t cache = step.cache_place(part.row, kv_heads_, task.head, 0) * cache_bytes_;
  return {step.queries_at(part, kv_heads_, task.head, task.token),
          step.past_key + cache,
          step.past_value + cache,
          task.tokens * step.group,
          step.head_dim,
          step.group,
          part.start + task.token,
          window_};
}

// One tile of tokens against all chunks, one after the other.
void GroupQueryAttention::attend_tile(const Step& step, const Task& task) const {
  const AttentionRows rows = rows_of(step, task);
  const int end = rows.position + task.tokens;
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
  write_result(step, task, rows, sums);
}

void GroupQueryAttention::attend_chunk(const Step& step, const Task& task, float* sums) const {
  const AttentionRows rows = rows_of(step, task);
  const int begin = task.chunk * kChunk, end = std::min(begin + kChunk, step.parts[task.part].end());
  thread_local Array<float> prepared;
  float* scratch = grow(prepared, attend_scratch(rows.count, rows.head_dim));
  kernels_->attend(rows, begin, end, scratch, partial_at(sums + task.partial, rows.count));
}

// The results of each head's chunks are joined in order, once all are there.
void GroupQueryAttention::join_chunks(const Call& call, const Step& step, const Task* tasks, size_t count,
                                      float* sums) const {
  thread_local Array<size_t> memory;
  size_t* firsts = grow(memory, static_cast<size_t>(step.count) * kv_heads_);
  size_t heads = 0;
  for (size_t index = 0; index < count; ++index) {
    const Task &task = tasks[index], &before = tasks[index - (index > 0)];
    const bool is_first = index == 0 || before.chunk < 0 || before.part != task.part || before.head != task.head;
    if (task.chunk >= 0 && is_first) firsts[heads++] = index;
  }
  const auto join = [&](size_t head) {
    const Task& task = tasks[firsts[head]];
    const size_t end = head + 1 < heads ? firsts[head + 1] : count;
    const AttentionRows rows = rows_of(step, task);
    const Partial into = partial_at(sums + task.partial, rows.count);
    for (size_t next = firsts[head] + 1; next < end; ++next) {
      kernels_->join(rows, partial_at(sums + tasks[next].partial, rows.count), into);
    }
    write_result(step, task, rows, into);
  };
  if (step.tokens > kSerialTokens && heads > 0) return call.parallel(heads, join);
  for (size_t head = 0; head < heads; ++head) join(head);
}

void GroupQueryAttention::write_result(const Step& step, const Task& task, const AttentionRows& rows,
                                       const Partial& sums) const {
  for (int i = 0; i < rows.count; ++i) {
    const float factor = 1.0f / sums.totals[i];
    const size_t at = static_cast<size_t>(step.parts[task.part].first) + task.token + i / rows.heads;
    float* out = step.output + (at * heads_ + task.head * rows.heads + i % rows.heads) * rows.head_dim;
    const float* from = sums.sums + static_cast<size_t>(i) * rows.head_dim;
    for (int d = 0; d < rows.head_dim; ++d) out[d] = from[d] * factor;
  }
}

// A part as `seqlens_k` has it, and a row of a batch: its last position.
GroupQueryAttention::Part GroupQueryAttention::read_part(const int32_t* numbers) {
  return {numbers[0], numbers[1], numbers[2], 0};
}

GroupQueryAttention::Part GroupQueryAttention::read_row(int row, int32_t last, int tokens) {
  require(last >= -1 && last < kMost, "seqlens_k lies outside the cache");
  return {row, last + 1 - tokens, tokens, 0};
}

}  // namespace starling
