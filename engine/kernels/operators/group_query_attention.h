// The operator starling::GroupQueryAttention: com.microsoft's, in float32, over a cache of float32 or 16 bits that is
// past and present in one.
#pragma once

#include <array>
#include <cstdint>

#include "attention/attention_kernels.h"
#include "operators/op.h"

namespace starling {

// Rotates queries and keys, writes keys and values at the new positions of the cache, and attends. Attributes:
// num_heads, kv_num_heads, scale, local_window_size (-1: none), do_rotary, rotary_interleaved, and reduced_precision: 1
// allows products of bfloat16.
class GroupQueryAttention {
 public:
  static constexpr const char* name = "GroupQueryAttention";
  static constexpr const char* provider = "CPUExecutionProvider";

  GroupQueryAttention(const NodeInfo& node, CacheType type);
  void compute(const Call& call) const;

 private:
  struct Part;
  struct Task;
  struct Step;

  static Part read_part(const int32_t* numbers);
  static Part read_row(int row, int32_t last, int tokens);
  void write_tokens(const Call& call, const Step& step) const;
  void write_token(const Step& step, const Part& part, int token) const;
  void attend(const Call& call, const Step& step) const;
  size_t add_tiles(const Step& step, int part, Task* tasks, size_t count) const;
  size_t add_chunks(const Step& step, int part, Task* tasks, size_t count, size_t* partials) const;
  void attend_tile(const Step& step, const Task& task) const;
  void attend_chunk(const Step& step, const Task& task, float* sums) const;
  void join_chunks(const Call& call, const Step& step, const Task* tasks, size_t count, float* sums) const;
  AttentionRows rows_of(const Step& step, const Task& task) const;
  void write_result(const Step& step, const Task& task, const AttentionRows& rows, const Partial& sums) const;

  int heads_, kv_heads_, window_;
  float scale_;
  size_t cache_bytes_;  // of a number
  bool rotates_, interleaved_;
  const AttentionKernels* kernels_;
};

// ONNX Runtime takes the one whose types are the node's.
template <ort::ElementType Cache>
class GroupQueryAttentionOf : public GroupQueryAttention {
 public:
  // query [batch, sequence, heads * head_dim], or query, key and value side by side in it; key and value
  // [batch, sequence, kv_heads * head_dim]; past_key and past_value [batch, kv_heads, positions, head_dim];
  // seqlens_k [batch]: valid positions after the step, minus 1; or, where batch is 1, [3 * parts]: the tokens are those
  // of several rows of the cache, which may then have any number of rows, one part after the other; of each part its
  // row (ascending), the position of its first token, and how many it has; total_sequence_length (not used); cos and
  // sin [positions, rotated / 2].
  static constexpr std::array<InputSpec, 9> inputs = {{{ort::kFloat},
                                                       {ort::kFloat, true},
                                                       {ort::kFloat, true},
                                                       {Cache},
                                                       {Cache},
                                                       {ort::kInt32},
                                                       {ort::kInt32},
                                                       {ort::kFloat, true},
                                                       {ort::kFloat, true}}};
  // output [batch, sequence, heads * head_dim]; present_key and present_value: the memory of past_key and past_value.
  static constexpr std::array<ort::ElementType, 3> outputs = {ort::kFloat, Cache, Cache};

  GroupQueryAttentionOf(const NodeInfo& node, NoContext) : GroupQueryAttention(node, type()) {}

 private:
  static constexpr CacheType type() {
    if (Cache == ort::kFloat16) return CacheType::kFloat16;
    return Cache == ort::kBFloat16 ? CacheType::kBFloat16 : CacheType::kFloat32;
  }
};

}  // namespace starling
