// Codes and scales of inputs, by the rule of core/inputs.py, bit for bit.
//
// The largest magnitude is found among the bits of the absolute values: there a NaN is
// larger than infinity and that is larger than any number, so nothing is lost.
#pragma once

#include <w6a8_device.h>

#include "w6a8.h"

constexpr int kQuantizeThreads = 512;  // with 8 values each: 4096 columns at once

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

// Neighbouring values at once where the address allows it.
template <class T, int kEach>
__device__ __forceinline__ void load(const typename T::Stored *from, bool aligned,
                                     float (&x)[kEach]) {
  struct alignas(kEach * sizeof(typename T::Stored)) Pack {
    typename T::Stored at[kEach];
  } pack;
  if (aligned) {
    pack = *reinterpret_cast<const Pack *>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kEach; ++i) pack.at[i] = from[i];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) x[i] = T::value(pack.at[i]);
}

template <class T, int kEach>
__device__ __forceinline__ bool is_aligned(const typename T::Stored *x) {
  return reinterpret_cast<uintptr_t>(x) % (kEach * sizeof(*x)) == 0;
}

template <class T, int kEach>
__device__ __forceinline__ uint32_t largest_bits(const typename T::Stored *x, int count,
                                                 int thread, int threads) {
  uint32_t most = 0;
  const bool aligned = is_aligned<T, kEach>(x);
  const int whole = count / kEach * kEach;
#pragma unroll 2
  for (int i = kEach * thread; i < whole; i += kEach * threads) {
    float v[kEach];
    load<T, kEach>(x + i, aligned, v);
#pragma unroll
    for (int j = 0; j < kEach; ++j) most = max(most, as_bits(v[j]) & 0x7FFFFFFFu);
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

template <class T, int kEach>
__device__ __forceinline__ void write_codes(const typename T::Stored *x, int count,
                                            float inverse, int8_t *codes, int padded,
                                            int thread, int threads) {
  const bool aligned = is_aligned<T, kEach>(x);
  const int whole = count / kEach * kEach;
#pragma unroll 2
  for (int i = kEach * thread; i < whole; i += kEach * threads) {
    float v[kEach];
    load<T, kEach>(x + i, aligned, v);
    struct alignas(kEach) {
      uint32_t at[kEach / 4];
    } words;
#pragma unroll
    for (int j = 0; j < kEach; j += 4)
      words.at[j / 4] = code_of(v[j], inverse) | code_of(v[j + 1], inverse) << 8 |
                        code_of(v[j + 2], inverse) << 16 |
                        code_of(v[j + 3], inverse) << 24;
    *reinterpret_cast<decltype(words) *>(codes + i) = words;
  }
  for (int i = whole + thread; i < padded; i += threads)
    codes[i] = static_cast<int8_t>(i < count ? code_of(T::value(x[i]), inverse) : 0);
}

// One block a row.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows(const W6A8Quantize a) {
  let_next_begin();
  wait_for_kernel_before();
  const int thread = threadIdx.x, warp = thread >> 5;
  if (blockIdx.x == 0)
    for (int i = thread; i < a.ticket_count; i += kQuantizeThreads) a.tickets[i] = 0;
  const int64_t row = blockIdx.x;
  const auto *x = static_cast<const typename T::Stored *>(a.inputs) + row * a.columns;
  uint32_t most = largest_bits<T, 8>(x, a.columns, thread, kQuantizeThreads);
  uint32_t *of_warps = reinterpret_cast<uint32_t *>(shared_memory());
  most = largest_of_warp(most);
  if ((thread & 31) == 0) of_warps[warp] = most;
  __syncthreads();
  for (int i = 0; i < kQuantizeThreads / 32; ++i) most = max(most, of_warps[i]);
  const Rule rule = rule_of(most);
  if (thread == 0) a.scales[row] = rule.scale;
  write_codes<T, 8>(x, a.columns, rule.inverse, a.codes + row * a.padded, a.padded,
                    thread, kQuantizeThreads);
}

// One warp a group; groups are multiples of 32 columns.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_groups(const W6A8Quantize a) {
  let_next_begin();
  wait_for_kernel_before();
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
  const uint32_t most = largest_of_warp(largest_bits<T, 4>(x, a.group, lane, 32));
  const Rule rule = rule_of(most);
  if (lane == 0) a.scales[place] = rule.scale;
  const int padded = group == groups - 1 ? a.padded - start : a.group;
  write_codes<T, 4>(x, a.group, rule.inverse, a.codes + row * a.padded + start, padded,
                    lane, 32);
}
