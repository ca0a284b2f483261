// Adds up what warpgroups and blocks have of a part, and writes the result.
#pragma once

#include "w6a8_hopper_shape.cuh"

// Rows, tokens and shared memory of a thread that computes, and the part it is at.
template <class S>
struct Place {
  static constexpr int kTokens = S::kTokens;
  using Totals = float[kTokens / 2];

  const W6A8Linear &a;
  const Ring<S> ring;
  const int thread, lane, warp, across;  // thread and warp of those on the same columns
  Part part;
  int row;  // of this lane's first results; the others are 8 below

  __device__ __forceinline__ Place(const W6A8Linear &arguments, const Ring<S> &ring)
      : a(arguments),
        ring(ring),
        thread(threadIdx.x % (128 * S::kDown)),
        lane(threadIdx.x & 31),
        warp(threadIdx.x / 32 % (4 * S::kDown)),
        across(same_in_warp(threadIdx.x / (128 * S::kDown))) {}

  __device__ __forceinline__ void go_to(const Part &given) {
    part = given;
    row = part.row_block * S::kRows + warp * W6A8_TILE_ROWS + (lane >> 2);
  }

  // Token and row of a lane's result i.
  __device__ __forceinline__ int64_t token_of(int i) const {
    return static_cast<int64_t>(part.token_block) * kTokens + 8 * (i >> 2) +
           ((lane & 3) << 1) + (i & 1);
  }
  __device__ __forceinline__ int row_of(int i) const { return row + 8 * (i >> 1 & 1); }
};

template <class S>
struct Finisher : Place<S> {
  using Base = Place<S>;
  using Base::a, Base::across, Base::kTokens, Base::lane, Base::part, Base::ring, Base::row,
      Base::row_of, Base::thread, Base::token_of, Base::warp;
  using typename Base::Totals;
  using Base::Base;

  // Adds up parts of the columns, and writes the result.
  __device__ __forceinline__ void finish(float (&totals)[kTokens / 2]) const {
    if (S::kAcross > 1 && !is_first(totals)) return;
    if (a.splits > 1 && !is_last(totals)) return;
    if (a.output_dtype == W6A8_FLOAT32 || a.rows % 8 != 0) {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) store(totals[i], i);
    } else {
#pragma unroll
      for (int first = 0; first < kTokens; first += S::kOutTokens) store_turned(totals, first);
    }
  }

  __device__ __forceinline__ float finished(float total, int i) const {
    float value = total * 0.25f;  // codes are held times four
    if constexpr (S::kScalesOfInputs == Inputs::kOfTokens)
      value *= a.input_scales[min(token_of(i), a.tokens - 1)];
    if (a.bias != nullptr) {
      const int at = min(row_of(i), a.rows - 1);
      if (a.output_dtype == W6A8_FLOAT32) {
        value += static_cast<const float *>(a.bias)[at];
      } else {
        const uint16_t bias = static_cast<const uint16_t *>(a.bias)[at];
        value += a.output_dtype == W6A8_FLOAT16 ? from_half(bias) : from_bfloat(bias);
      }
    }
    return value;
  }

  __device__ __forceinline__ uint32_t rounded_16(float value) const {
    return a.output_dtype == W6A8_FLOAT16 ? to_half(value) : to_bfloat(value);
  }

  __device__ __forceinline__ void store(float total, int i) const {
    const float value = finished(total, i);
    const int at_row = row_of(i);
    if (token_of(i) >= a.tokens || at_row >= a.rows) return;
    const int64_t at = token_of(i) * a.rows + at_row;
    if (a.output_dtype == W6A8_FLOAT32)
      static_cast<float *>(a.outputs)[at] = value;
    else
      static_cast<uint16_t *>(a.outputs)[at] = static_cast<uint16_t>(rounded_16(value));
  }

  // Turns a warp's 16 rows of some tokens round in shared memory: of each token, eight
  // rows are written at once.
  __device__ __forceinline__ void store_turned(const float (&totals)[kTokens / 2],
                                           int first) const {
    const uint32_t memory = ring.base + S::kOut + warp * S::kOutBytes;
    __syncwarp();  // what was there has been read
#pragma unroll
    for (int b = 0; b < S::kOutTokens / 16; ++b) {
      uint32_t r[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {  // rows, rows + 8, and both of the next 8 tokens
        const int i = first / 2 + 8 * b + 4 * (m >> 1) + 2 * (m & 1);
        r[m] = rounded_16(finished(totals[i], i)) |
               rounded_16(finished(totals[i + 1], i + 1)) << 16;
      }
      const int token = 16 * b + (lane >> 4 << 3) + (lane & 7);
      store_transposed(memory + place(token, lane >> 3 & 1), r);
    }
    __syncwarp();
    const int start = part.row_block * S::kRows + warp * W6A8_TILE_ROWS;
#pragma unroll
    for (int i = lane; i < 2 * S::kOutTokens; i += 32) {
      const int64_t token =
          static_cast<int64_t>(part.token_block) * kTokens + first + i / 2;
      const int at_row = start + 8 * (i & 1);
      if (token >= a.tokens || at_row >= a.rows) continue;
      uint4 value;
      load_16(memory + place(i / 2, i & 1), value.x, value.y, value.z, value.w);
      *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(a.outputs) + token * a.rows +
                                 at_row) = value;
    }
  }

  // Where eight rows of a token wait: eight tokens' are in different groups of banks.
  static __device__ __forceinline__ uint32_t place(int token, int half) {
    return token * 32 + ((half ^ (token >> 2 & 1)) << 4);
  }

  // A barrier of those on the same columns.
  __device__ __forceinline__ void meet_down() const { meet<2>(128 * S::kDown); }

  // Gives all totals to the first of the warpgroups on columns.
  __device__ __forceinline__ bool is_first(float (&totals)[kTokens / 2]) const {
    meet<1>(S::kConsumers);  // the shares before have been read
    const uint32_t shares = ring.base + S::kShares + 16 * thread;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i)
      if (across > 0)
        store_16(shares + (across - 1) * S::kShareBytes + i * 2048 * S::kDown,
                 as_bits(totals[4 * i]), as_bits(totals[4 * i + 1]),
                 as_bits(totals[4 * i + 2]), as_bits(totals[4 * i + 3]));
    meet<1>(S::kConsumers);
    if (across > 0) return false;
#pragma unroll
    for (int other = 0; other < S::kAcross - 1; ++other) {
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        uint32_t bits[4];
        load_16(shares + other * S::kShareBytes + i * 2048 * S::kDown, bits[0], bits[1],
                bits[2], bits[3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) totals[4 * i + j] += as_float(bits[j]);
      }
    }
    return true;
  }

  // Leaves this block's share, and takes all if the others have left theirs.
  __device__ __forceinline__ bool is_last(float (&totals)[kTokens / 2]) const {
    constexpr int kThreads = 128 * S::kDown;
    const int64_t block =
        part.row_block * blocks_along<S>(a) + part.token_block;
    constexpr int kShare = S::kRows * kTokens / 4;  // in float4
    float4 *shares = reinterpret_cast<float4 *>(a.partial) + block * a.splits * kShare;
    float4 *own = shares + part.split * kShare + thread;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i)
      own[i * kThreads] = make_float4(totals[4 * i], totals[4 * i + 1],
                                           totals[4 * i + 2], totals[4 * i + 3]);
    __threadfence();
    meet_down();
    if (thread == 0) {
      const uint32_t before = atomicAdd(a.tickets + block, 1u);
      store_4(ring.base + S::kFlag, before == static_cast<uint32_t>(a.splits) - 1);
    }
    meet_down();
    const bool is_last = load_4(ring.base + S::kFlag) != 0;
    meet_down();  // before the flag is written again
    if (!is_last) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) totals[i] = 0.0f;
#pragma unroll 1
    for (int split = 0; split < a.splits; ++split) {
      const float4 *from = shares + split * kShare + thread;
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        const float4 share = __ldcg(from + i * kThreads);
        totals[4 * i] += share.x, totals[4 * i + 1] += share.y;
        totals[4 * i + 2] += share.z, totals[4 * i + 3] += share.w;
      }
    }
    return true;
  }
};
