// The next token after each row of logits: the likeliest, or one drawn by temperature, top-k, top-p and min-p with the
// meaning of engine/generation/sampler.py. A block takes a row.
//
// Nothing is sorted: 16-bit logits have 65,536 values, so that a threshold is found by two histograms of 256 bins. All
// that is summed is whole numbers, 2^31 for the likeliest token, so that the order of the sums changes nothing.
#include "primitives.h"

struct SamplingArguments {
  const half_bits* logits;   // [rows, kept, vocabulary]
  const float* temperature;  // [rows]; above zero
  const long long* top_k;    // [rows]; 1: the likeliest, 0: off
  const float* top_p;        // [rows]
  const float* min_p;        // [rows]
  const float* noise;        // [rows, positions], uniform in [0, 1), by the position that a token comes after
  const int* lengths;        // [rows]: positions of the row that are written
  long long* tokens;         // [rows, kept]; -1 where the greatest logit is not finite
  int vocabulary, positions;
};

constexpr int kThreads = SAMPLING_THREADS, kBins = 256;
// A bin is counted in so many places, by lane: most logits fall into few bins, and additions to one word take turns.
constexpr int kCopies = 8;
constexpr float kOne = 2147483648.0f;

typedef unsigned long long wide;

struct Shared {
  unsigned low[kBins * kCopies], high[kBins * kCopies];  // halves of the weights, else a bin may overflow
  wide sums[kBins];
  wide partial[kThreads];
  wide rest;  // what is left to find in the bin that was found
  int bin;
};

#if SAMPLING_BFLOAT16
DEVICE float value_of(half_bits h) { return bfloat_to_float(h); }
constexpr unsigned kInfinity = 0x7f80;
#else
DEVICE float value_of(half_bits h) { return to_float(h); }
constexpr unsigned kInfinity = 0x7c00;
#endif

// Ascends with the value; both zeros are one.
DEVICE unsigned key_of(half_bits h) {
  const unsigned bits = h == 0x8000u ? 0u : h;
  return bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
}

DEVICE half_bits bits_of(unsigned key) { return static_cast<half_bits>(key & 0x8000u ? key & 0x7fffu : ~key); }

// The weight of a token; `floor` of it, where it has one, is what min-p asks for.
struct Weights {
  float peak, scale, floor;
  unsigned least;  // key

  DEVICE unsigned of(half_bits h) const {
    if (key_of(h) < least) return 0;
    const float weight = expf((value_of(h) - peak) * scale);
    return weight < floor ? 0u : static_cast<unsigned>(weight * kOne);
  }
};

// The greatest of all threads' values.
DEVICE wide block_max(Shared& shared, wide value) {
  shared.partial[threadIdx.x] = value;
  block_barrier();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      const wide other = shared.partial[threadIdx.x + half];
      if (other > shared.partial[threadIdx.x]) shared.partial[threadIdx.x] = other;
    }
    block_barrier();
  }
  const wide greatest = shared.partial[0];
  block_barrier();
  return greatest;
}

// The sums of the threads up to each one, its own included, in `partial`.
DEVICE void block_scan(Shared& shared, wide value) {
  shared.partial[threadIdx.x] = value;
  block_barrier();
  for (int step = 1; step < kThreads; step *= 2) {
    const wide before = threadIdx.x >= step ? shared.partial[threadIdx.x - step] : 0;
    block_barrier();
    shared.partial[threadIdx.x] += before;
    block_barrier();
  }
}

// How much each bin holds: of the keys' upper bytes, or of the lower ones where the upper is `upper`. `amount` of a
// token is up to 2^31.
template <class Amount>
DEVICE void fill_bins(Shared& shared, const half_bits* x, int vocabulary, int upper, Amount amount) {
  for (int i = threadIdx.x; i < kBins * kCopies; i += kThreads) shared.low[i] = shared.high[i] = 0;
  block_barrier();
  const int copy = threadIdx.x % kCopies;
  for (int i = threadIdx.x; i < vocabulary; i += kThreads) {
    const unsigned key = key_of(x[i]);
    if (upper >= 0 && key >> 8 != static_cast<unsigned>(upper)) continue;
    const unsigned has = amount(x[i]);
    if (has == 0) continue;
    const int at = (upper < 0 ? key >> 8 : key & 255u) * kCopies + copy;
    shared_add(&shared.low[at], has & 0xffffu);
    shared_add(&shared.high[at], has >> 16);
  }
  block_barrier();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    wide sum = 0;
    for (int c = 0; c < kCopies; ++c) {
      sum += shared.low[bin * kCopies + c] + (static_cast<wide>(shared.high[bin * kCopies + c]) << 16);
    }
    shared.sums[bin] = sum;
  }
  block_barrier();
}

DEVICE wide all_bins(const Shared& shared) {
  wide sum = 0;
  for (int bin = 0; bin < kBins; ++bin) sum += shared.sums[bin];
  return sum;
}

// The bin, from the greatest keys down, with which `wanted` is reached, and what of it that bin must give.
DEVICE int find_bin(Shared& shared, wide wanted) {
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
    wide above = 0;
    for (int b = kBins - 1; b > bin; --b) above += shared.sums[b];
    if (shared.sums[bin] > 0 && above < wanted && above + shared.sums[bin] >= wanted) {
      shared.bin = bin;
      shared.rest = wanted - above;
    }
  }
  block_barrier();
  const int found = shared.bin;
  block_barrier();
  return found;
}

// The key of the last token, from the likeliest down, that is needed for `wanted`, whose bins of upper bytes are there.
template <class Amount>
DEVICE unsigned last_needed(Shared& shared, const half_bits* x, int vocabulary, wide wanted, Amount amount) {
  const int upper = find_bin(shared, wanted);
  const wide rest = shared.rest;
  fill_bins(shared, x, vocabulary, upper, amount);
  return static_cast<unsigned>(upper) << 8 | static_cast<unsigned>(find_bin(shared, rest));
}

// The first token, in the vocabulary's order, at which the running sum of the weights passes `uniform` of it all.
DEVICE void draw(Shared& shared, const half_bits* x, int vocabulary, const Weights& weights, float uniform,
                 long long* token) {
  const int each = (vocabulary + kThreads - 1) / kThreads, begin = threadIdx.x * each;
  const int end = min(begin + each, vocabulary);
  wide mine = 0;
  for (int i = begin; i < end; ++i) mine += weights.of(x[i]);
  block_scan(shared, mine);
  const wide target =
      static_cast<wide>(static_cast<double>(uniform) * static_cast<double>(shared.partial[kThreads - 1]));
  wide running = shared.partial[threadIdx.x] - mine;
  if (running > target || running + mine <= target) return;
  int i = begin;
  while ((running += weights.of(x[i])) <= target) ++i;
  *token = i;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) sample(const SamplingArguments a) {
  DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int row = blockIdx.x, kept = gridDim.y, vocabulary = a.vocabulary;
  const long long at = static_cast<long long>(row) * kept + blockIdx.y;
  const half_bits* x = a.logits + at * vocabulary;
  wide best = 0;
  for (int i = threadIdx.x; i < vocabulary; i += kThreads) {
    const wide candidate = static_cast<wide>(key_of(x[i])) << 32 | (0xffffffffu - static_cast<unsigned>(i));
    if (candidate > best) best = candidate;
  }
  best = block_max(shared, best);
  const half_bits peak = bits_of(static_cast<unsigned>(best >> 32));
  const long long top_k = a.top_k[row];
  if ((peak & 0x7fffu) >= kInfinity || top_k == 1) {
    if (threadIdx.x == 0) a.tokens[at] = (peak & 0x7fffu) >= kInfinity ? -1 : 0xffffffffu - (best & 0xffffffffu);
    return;
  }
  Weights weights = {value_of(peak), 1.0f / a.temperature[row], 0.0f, 0};
  if (top_k > 0 && top_k < vocabulary) {
    const auto one = [](half_bits) { return 1u; };
    fill_bins(shared, x, vocabulary, -1, one);
    weights.least = last_needed(shared, x, vocabulary, static_cast<wide>(top_k), one);
  }
  const float top_p = a.top_p[row];
  if (top_p < 1.0f) {
    const auto weight = [weights](half_bits h) { return weights.of(h); };
    fill_bins(shared, x, vocabulary, -1, weight);
    const wide wanted = static_cast<wide>(static_cast<double>(top_p) * static_cast<double>(all_bins(shared)));
    weights.least = last_needed(shared, x, vocabulary, wanted > 0 ? wanted : 1, weight);
  }
  weights.floor = a.min_p[row];
  const long long position = a.lengths[row] - kept + static_cast<int>(blockIdx.y);
  draw(shared, x, vocabulary, weights, a.noise[static_cast<long long>(row) * a.positions + position], &a.tokens[at]);
}

#ifdef HOST_EMULATION
extern "C" void emulate_sample(const SamplingArguments* arguments, unsigned rows, unsigned kept) {
  static SamplingArguments now;
  now = *arguments;
  emulation::launch({rows, kept}, {kThreads}, [] { sample(now); });
}
extern "C" unsigned shared_bytes() { return sizeof(Shared); }
#endif
