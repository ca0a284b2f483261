// Codes and scales of inputs, by the rule of core/inputs.py, bit for bit.
//
// The largest magnitude is found among the bits of the absolute values: there a NaN is
// larger than infinity and that is larger than any number, so nothing is lost.
#pragma once

#include <w6a8_device.h>

#include "w6a8.h"

constexpr int kQuantizeThreads = 256;

struct Float32 {
  using Stored = uint32_t;
  static __device__ __forceinline__ float value(Stored bits) { return as_float(bits); }
};
struct Float16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float value(Stored bits) { return from_half(bits); }
};
struct BFloat16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float value(Stored bits) {
    return from_bfloat(bits);
  }
};

// Four values at once where the address allows it.
template <class T>
__device__ __forceinline__ void load_four(const typename T::Stored *from, bool aligned,
                                          float (&x)[4]) {
  struct alignas(4 * sizeof(typename T::Stored)) Four {
    typename T::Stored at[4];
  } four;
  if (aligned) {
    four = *reinterpret_cast<const Four *>(from);
  } else {
    for (int i = 0; i < 4; ++i) four.at[i] = from[i];
  }
  for (int i = 0; i < 4; ++i) x[i] = T::value(four.at[i]);
}

template <class T>
__device__ __forceinline__ uint32_t largest_bits(const typename T::Stored *x, int count,
                                                 int thread, int threads, bool aligned) {
  uint32_t most = 0;
  const int whole = count & ~3;
  for (int i = 4 * thread; i < whole; i += 4 * threads) {
    float v[4];
    load_four<T>(x + i, aligned, v);
    for (int j = 0; j < 4; ++j) most = max(most, as_bits(v[j]) & 0x7FFFFFFFu);
  }
  for (int i = whole + thread; i < count; i += threads)
    most = max(most, as_bits(T::value(x[i])) & 0x7FFFFFFFu);
  return most;
}

struct Rule {
  float inverse, scale;
};

__device__ __forceinline__ Rule rule_of(uint32_t most) {
  if (most >= 0x7F800000u) return {0.0f, as_float(0x7FC00000u)};  // NaN or infinite
  if (most < 0x00800000u) return {0.0f, 0.0f};                    // zero or subnormal
  const float amax = as_float(most);
  return {divided(127.0f, amax), divided(amax, 127.0f)};
}

__device__ __forceinline__ uint32_t code_of(float x, float inverse) {
  if (inverse == 0.0f) return 0;  // x may be NaN
  const int code = rounded(x * inverse);
  return static_cast<uint32_t>(min(max(code, -127), 127)) & 0xFFu;
}

template <class T>
__device__ __forceinline__ void write_codes(const typename T::Stored *x, int count,
                                            float inverse, int8_t *codes, int padded,
                                            int thread, int threads, bool aligned) {
  const int whole = count & ~3;
  for (int i = 4 * thread; i < whole; i += 4 * threads) {
    float v[4];
    load_four<T>(x + i, aligned, v);
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j) word |= code_of(v[j], inverse) << (8 * j);
    *reinterpret_cast<uint32_t *>(codes + i) = word;
  }
  for (int i = whole + thread; i < padded; i += threads)
    codes[i] = static_cast<int8_t>(i < count ? code_of(T::value(x[i]), inverse) : 0);
}

// One block a row.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows(const W6A8Quantize a) {
  const int thread = threadIdx.x, warp = thread >> 5;
  if (blockIdx.x == 0)
    for (int i = thread; i < a.ticket_count; i += kQuantizeThreads) a.tickets[i] = 0;
  const int64_t row = blockIdx.x;
  const auto *x = static_cast<const typename T::Stored *>(a.inputs) + row * a.columns;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % (4 * sizeof(*x)) == 0;
  uint32_t most = largest_bits<T>(x, a.columns, thread, kQuantizeThreads, aligned);
  uint32_t *of_warps = reinterpret_cast<uint32_t *>(shared_memory());
  most = largest_of_warp(most);
  if ((thread & 31) == 0) of_warps[warp] = most;
  __syncthreads();
  for (int i = 0; i < kQuantizeThreads / 32; ++i) most = max(most, of_warps[i]);
  const Rule rule = rule_of(most);
  if (thread == 0) a.scales[row] = rule.scale;
  write_codes<T>(x, a.columns, rule.inverse, a.codes + row * a.padded, a.padded, thread,
                 kQuantizeThreads, aligned);
}

// One warp a group; groups are multiples of 32 columns.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_groups(const W6A8Quantize a) {
  const int thread = threadIdx.x, lane = thread & 31;
  if (blockIdx.x == 0)
    for (int i = thread; i < a.ticket_count; i += kQuantizeThreads) a.tickets[i] = 0;
  const int groups = a.columns / a.group;
  const int64_t place =
      static_cast<int64_t>(blockIdx.x) * (kQuantizeThreads / 32) + (thread >> 5);
  if (place >= a.rows * groups) return;  // a whole warp
  const int64_t row = place / groups;
  const int group = static_cast<int>(place % groups), start = group * a.group;
  const auto *x =
      static_cast<const typename T::Stored *>(a.inputs) + row * a.columns + start;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % (4 * sizeof(*x)) == 0;
  const uint32_t most =
      largest_of_warp(largest_bits<T>(x, a.group, lane, 32, aligned));
  const Rule rule = rule_of(most);
  if (lane == 0) a.scales[place] = rule.scale;
  const int padded = group == groups - 1 ? a.padded - start : a.group;
  write_codes<T>(x, a.group, rule.inverse, a.codes + row * a.padded + start, padded,
                 lane, 32, aligned);
}
