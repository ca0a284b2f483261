// What is rounded: rows of inputs, as they are, normed, or gated.
//
// Each step's result is rounded to the type of the inputs, as a model's own modules do.
#pragma once

#include <w6a8_device.h>

#include "w6a8.h"

struct Float32 {
  using Stored = uint32_t;
  static __device__ __forceinline__ float value(Stored bits) { return as_float(bits); }
  static __device__ __forceinline__ Stored stored(float value) { return as_bits(value); }
};
struct Float16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float value(Stored bits) { return from_half(bits); }
  static __device__ __forceinline__ Stored stored(float value) {
    return static_cast<Stored>(to_half(value));
  }
};
struct BFloat16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float value(Stored bits) {
    return from_bfloat(bits);
  }
  static __device__ __forceinline__ Stored stored(float value) {
    return static_cast<Stored>(to_bfloat(value));
  }
};

template <class T>
__device__ __forceinline__ float through(float value) {
  return T::value(T::stored(value));
}

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

// Makes values of inputs and of what goes with them: a norm's weight, or what is gated.
template <class T, int kEach>
__device__ __forceinline__ void combine(int kind, float factor, float (&v)[kEach],
                                        const float (&w)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (kind == W6A8_NORM)
      v[i] = through<T>(w[i] * through<T>(v[i] * factor));
    else if (kind == W6A8_NORM_PLUS_ONE)
      v[i] = through<T>(v[i] * factor * (1.0f + w[i]));
    else if (kind == W6A8_GATED)
      v[i] = through<T>(through<T>(divided(v[i], 1.0f + exponential(-v[i]))) * w[i]);
  }
}

__device__ __forceinline__ bool is_norm(int kind) {
  return kind == W6A8_NORM || kind == W6A8_NORM_PLUS_ONE;
}

__device__ __forceinline__ float norm_factor(float squares, const W6A8Values &a) {
  return inverse_root(divided(squares, static_cast<float>(a.columns)) + a.epsilon);
}

template <class T>
struct Row {
  using Stored = typename T::Stored;
  const Stored *x;
  const Stored *other;  // weight of the norm, or what is gated
  int kind;
  float factor = 1.0f;  // of the norm: 1 / sqrt(mean(x^2) + epsilon)

  __device__ __forceinline__ Row(const W6A8Values &a, int64_t row)
      : x(static_cast<const Stored *>(a.inputs) +
          row * a.columns * (a.kind == W6A8_GATED ? 2 : 1)),
        other(a.kind == W6A8_GATED ? x + a.columns : static_cast<const Stored *>(a.norm)),
        kind(a.kind) {}

  // Whether kEach inputs can be loaded at once at every multiple of kEach.
  template <int kEach>
  __device__ __forceinline__ bool is_aligned() const {
    const auto bits = reinterpret_cast<uintptr_t>(x) |
                      (kind == W6A8_PLAIN ? 0 : reinterpret_cast<uintptr_t>(other));
    return bits % (kEach * sizeof(Stored)) == 0;
  }

  template <int kEach>
  __device__ __forceinline__ float squares(int at, bool aligned) const {
    float v[kEach], sum = 0.0f;
    load<T, kEach>(x + at, aligned, v);
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum = fmaf(v[i], v[i], sum);
    return sum;
  }

  template <int kEach>
  __device__ __forceinline__ void values(int at, bool aligned, float (&v)[kEach]) const {
    load<T, kEach>(x + at, aligned, v);
    if (kind == W6A8_PLAIN) return;
    float w[kEach];
    load<T, kEach>(other + at, aligned, w);
    combine<T>(kind, factor, v, w);
  }
};

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

__device__ __forceinline__ uint32_t codes_of(const float *x, float inverse) {
  return code_of(x[0], inverse) | code_of(x[1], inverse) << 8 |
         code_of(x[2], inverse) << 16 | code_of(x[3], inverse) << 24;
}

template <int kEach>
__device__ __forceinline__ uint32_t largest_of(const float (&v)[kEach]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) most = max(most, as_bits(v[i]) & 0x7FFFFFFFu);
  return most;
}
