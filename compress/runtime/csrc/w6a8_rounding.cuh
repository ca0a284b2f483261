// A block rounds all of its inputs, for itself, into shared memory.
#pragma once

#include "w6a8_values.cuh"

constexpr int kFewWarps = 8;
constexpr int kHeld = 7;  // times 8 values that a thread holds
constexpr int kSlots = kHeld * kFewWarps;

// A slot is 32 times 8 neighbouring values of a token; slots go round the warps, and
// what each finds is added up in their order. `notes` has room for 2 kSlots numbers;
// codes of a token lie `pitch` bytes after those before.
template <class T>
__device__ __noinline__ void round_inputs(const W6A8Values &given, int tokens, int padded,
                                          unsigned char *codes, int pitch, float *scales,
                                          float *notes) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float *sums = notes;
  uint32_t *most = reinterpret_cast<uint32_t *>(notes + kSlots);
  const int vectors = padded / 8, each = (vectors + 31) / 32, slots = tokens * each;
  struct alignas(16) Eight {
    typename T::Stored at[8];
  } held[kHeld];
  const bool is_normed = Row<T>(given, 0).is_normed();
  int known = -1;  // the token whose factor or rule is known
  float factor = 1.0f;
  if (is_normed) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int slot = i * kFewWarps + warp, vector = slot % each * 32 + lane;
      if (slot >= slots) break;
      const Row<T> row(given, slot / each);
      const float own =
          8 * vector < given.columns ? row.template squares<8>(8 * vector, true) : 0.0f;
      const float sum = sum_of_warp(own);
      if (lane == 0) sums[slot] = sum;
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int slot = i * kFewWarps + warp, vector = slot % each * 32 + lane;
    if (slot >= slots) break;
    const int token = slot / each;
    Row<T> row(given, token);
    if (is_normed && token != known) {
      float sum = 0.0f;
      for (int other = lane; other < each; other += 32) sum += sums[token * each + other];
      row.set_factor(sum_of_warp(sum), given);
      factor = row.factor, known = token;
    }
    row.factor = factor;
    float v[8] = {};
    if (8 * vector < given.columns) row.template values<8>(8 * vector, true, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) held[i].at[j] = T::stored(v[j]);
    const uint32_t largest = largest_of_warp(largest_of(v));
    if (lane == 0) most[slot] = largest;
  }
  __syncthreads();
  known = -1;
  Rule rule = {};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int slot = i * kFewWarps + warp, vector = slot % each * 32 + lane;
    if (slot >= slots) break;
    const int token = slot / each;
    if (token != known) {
      uint32_t largest = 0;
      for (int other = lane; other < each; other += 32)
        largest = max(largest, most[token * each + other]);
      rule = rule_of(largest_of_warp(largest)), known = token;
    }
    if (lane == 0 && slot % each == 0) scales[token] = rule.scale;
    if (vector >= vectors) continue;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = T::value(held[i].at[j]);
    auto *to = reinterpret_cast<uint32_t *>(codes + token * pitch + 8 * vector);
    to[0] = codes_of(v, rule.inverse), to[1] = codes_of(v + 4, rule.inverse);
  }
}
