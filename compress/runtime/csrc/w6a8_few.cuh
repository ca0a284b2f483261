// y = x W^T for up to sixteen tokens, limited by memory alone.
//
// A block of eight warps computes 16 `tiles` rows at a time over all columns: `tiles`
// warps stand side by side on rows, the others on columns, each with every `beside`-th
// step of 128. A warp copies its own tiles and scales, kDepth steps ahead, also into the
// next rows: blocks stay and go on. On Hopper and later copies of weights begin while the
// kernel before still runs. All inputs lie in shared memory.
//
// Sums are integers for kRun columns (0: all of a warp's); they start at 1.5 * 2^23 so
// that the same bits, read as a float, are that plus the sum. Then they are multiplied
// by the scales and added in ascending order in a warp, and of warps.
#pragma once

#include <w6a8_device.h>

#include "w6a8.h"

constexpr int kFewWarps = 8;
constexpr int kFewThreads = 32 * kFewWarps;
constexpr int kFewTokens = 16;
constexpr int kSetTokens = 8;  // of one product; more than these are two sets

// Where things lie in shared memory, in bytes.
struct FewPlaces {
  int slot, inputs, pitch, shares, share, bytes;
};

W6A8_BOTH int few_sets(const W6A8Linear &a) { return a.tokens > kSetTokens ? 2 : 1; }

W6A8_BOTH FewPlaces few_places(const W6A8Linear &a, int run) {
  const int runs = run == 0 ? 0 : W6A8_TILE_COLUMNS / run;
  FewPlaces at;
  at.slot = W6A8_TILE_BYTES + runs * W6A8_TILE_ROWS * 2;
  at.inputs = kFewWarps * a.depth * at.slot;
  at.pitch = a.across * W6A8_TILE_COLUMNS + 16;  // tokens in different banks
  at.shares = at.inputs + static_cast<int>(a.tokens) * at.pitch;
  at.share = (kFewWarps - a.tiles_of_block) * 512 * few_sets(a);
  at.bytes = at.shares + 2 * at.share;
  return at;
}

template <int kRun, int kDepth, int kSets>
struct Few {
  static constexpr int kRuns = kRun == 0 ? 1 : W6A8_TILE_COLUMNS / kRun;
  static constexpr int kEach = kRun == 0 ? 4 : kRun / 32;  // products of a run
  using Totals = float[kSets][4];

  const W6A8Linear &a;
  unsigned char *memory;
  FewPlaces at;
  const int lane, warp, beside, tile, across, parts;
  int next_part, next_step;  // to be copied
  const uint8_t *from;
  const uint16_t *scales;
  int copied = 0, used = 0;  // slots, in turn

  __device__ __forceinline__ explicit Few(const W6A8Linear &given)
      : a(given),
        memory(shared_memory()),
        at(few_places(given, kRun)),
        lane(threadIdx.x & 31),
        warp(threadIdx.x >> 5),
        beside(kFewWarps / given.tiles_of_block),
        tile(warp % given.tiles_of_block),
        across(warp / given.tiles_of_block),
        parts(given.down / given.tiles_of_block),
        next_part(blockIdx.x) {
    go_to_next_part();
  }

  __device__ __forceinline__ unsigned char *slot(int which) const {
    return memory + (warp * kDepth + which) * at.slot;
  }
  __device__ __forceinline__ void run() {
    let_next_begin();
#pragma unroll 1
    for (int i = 0; i < kDepth; ++i) copy_next();
    wait_for_kernel_before();
    copy_inputs();
    __syncthreads();
    int turn = 0;
#pragma unroll 1
    for (int part = blockIdx.x; part < parts; part += gridDim.x, turn ^= 1) {
      Totals totals;
      add(part, totals);
      finish(part, turn, totals);
    }
    wait_copies<0>();
  }

  __device__ __forceinline__ const uint8_t *tile_at(int row_tile, int step) const {
    const int64_t place =
        (static_cast<int64_t>(row_tile / W6A8_PANEL) * a.across + step) * W6A8_PANEL +
        row_tile % W6A8_PANEL;
    return a.tiles + place * W6A8_TILE_BYTES;
  }

  // Starts the copies of this warp's next step, of these rows or the next.
  __device__ __forceinline__ void copy_next() {
    if (next_part < parts) {
      unsigned char *to = slot(copied) + 16 * lane;
#pragma unroll
      for (int i = 0; i < 3; ++i) copy_16(to + 512 * i, from + 512 * i);
      if (kRun != 0 && lane < 2 * kRuns) {  // 16 scales are twice 16 bytes
        const int group = min((next_step * kRuns + lane / 2) >> a.weight_scale_shift,
                              a.weight_groups - 1);  // past the last: codes are zero
        copy_16(to + W6A8_TILE_BYTES,
                scales + static_cast<int64_t>(group) * a.down * W6A8_TILE_ROWS);
      }
      next_step += beside;
      from += beside * (W6A8_PANEL * W6A8_TILE_BYTES);
      if (next_step >= a.across) next_part += gridDim.x, go_to_next_part();
    }
    commit_copies();  // of nothing at the end: they are counted
    if (++copied == kDepth) copied = 0;
  }

  __device__ __forceinline__ void go_to_next_part() {
    next_step = across;
    if (across >= a.across) next_part = parts;  // nothing for this warp
    const int row_tile = next_part * a.tiles_of_block + tile;
    from = tile_at(row_tile, across) + 16 * lane;
    scales = static_cast<const uint16_t *>(a.weight_scales) +
             static_cast<int64_t>(row_tile) * W6A8_TILE_ROWS + lane % 2 * 8;
  }

  // Through registers, since copies of the ring are done before later ones.
  __device__ __forceinline__ void copy_inputs() const {
    constexpr int kBatch = 8;
    const int chunks = a.across * (W6A8_TILE_COLUMNS / 16);
    const int all_chunks = static_cast<int>(a.tokens) * chunks;
    const uint4 *from = reinterpret_cast<const uint4 *>(a.inputs);
#pragma unroll 1
    for (int first = threadIdx.x; first < all_chunks; first += kBatch * kFewThreads) {
      uint4 batch[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (first + i * kFewThreads < all_chunks) batch[i] = from[first + i * kFewThreads];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int chunk = first + i * kFewThreads, token = chunk / chunks;
        if (chunk < all_chunks)
          *reinterpret_cast<uint4 *>(memory + at.inputs + token * at.pitch +
                                     (chunk - token * chunks) * 16) = batch[i];
      }
    }
  }

  // Adds up this warp's steps of a part.
  __device__ __forceinline__ void add(int part, Totals &totals) {
    int32_t sums[kSets][2][4] = {};  // of each half of a step: two short chains
#pragma unroll
    for (int i = 0; i < 4 * kSets; ++i) totals[i / 4][i % 4] = 0.0f;
    float of_rows[2] = {0.0f, 0.0f};
    if constexpr (kRun == 0) {
      const int row = (part * a.tiles_of_block + tile) * W6A8_TILE_ROWS + (lane >> 2);
      const auto *own = static_cast<const uint16_t *>(a.weight_scales);
      of_rows[0] = scale_of(own[row]), of_rows[1] = scale_of(own[row + 8]);
    }
    // Which 16 bytes of a token this lane names; tokens that there are not repeat.
    const unsigned char *inputs[kSets];
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      const int token = min(set * kSetTokens + (lane & 7), static_cast<int>(a.tokens) - 1);
      inputs[set] = memory + at.inputs + token * at.pitch + (lane >> 3) * 16 +
                    across * W6A8_TILE_COLUMNS;
    }
#pragma unroll 1
    for (int step = across; step < a.across; step += beside) {
      wait_copies<kDepth - 1>();
      meet_in_warp();
      const unsigned char *kept = slot(used);
      if (++used == kDepth) used = 0;
      const uint4 *weights = reinterpret_cast<const uint4 *>(kept) + lane;
      const uint4 l0 = weights[0], l1 = weights[32], h = weights[64];
      float scale[kRuns][2] = {};
      if constexpr (kRun != 0) {
        const auto *own =
            reinterpret_cast<const uint16_t *>(kept + W6A8_TILE_BYTES) + (lane >> 2);
#pragma unroll
        for (int r = 0; r < kRuns; ++r)
          scale[r][0] = scale_of(own[16 * r]), scale[r][1] = scale_of(own[16 * r + 8]);
      }
      uint32_t b[kSets][2][4];
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        load_matrices(b[set][0], inputs[set]);
        load_matrices(b[set][1], inputs[set] + 64);
        inputs[set] += beside * W6A8_TILE_COLUMNS;
      }
      meet_in_warp();  // all have read
      copy_next();
      const uint32_t nibbles[8] = {l0.x, l0.y, l0.z, l0.w, l1.x, l1.y, l1.z, l1.w};
      const uint32_t pairs[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t w[4];
        w6a8_unpack(nibbles[2 * j], nibbles[2 * j + 1], pairs[j], w);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          int32_t(&own)[4] = sums[set][j / 2];
          if (kRun != 0 && (j % 2 == 0 || kRun == 32))
#pragma unroll
            for (int i = 0; i < 4; ++i)
              own[i] = kRun == 128 && j == 2 ? 0 : W6A8_SUM_START;
          const uint32_t(&of)[4] = b[set][j / 2];
          multiply_add(own, w, of[j % 2 * 2], of[j % 2 * 2 + 1]);
          if (kRun != 0 && j % kEach == kEach - 1)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int32_t sum =
                  kRun == 128 ? sums[set][0][i] + sums[set][1][i] : own[i];
              totals[set][i] = fmaf(as_float(sum) - W6A8_SUM_START_AS_FLOAT,
                                    scale[j / kEach][i >> 1], totals[set][i]);
            }
        }
      }
    }
    if constexpr (kRun == 0) {
#pragma unroll
      for (int i = 0; i < 4 * kSets; ++i) {
        const int32_t(&two)[2][4] = sums[i / 4];
        totals[i / 4][i % 4] =
            static_cast<float>(two[0][i % 4] + two[1][i % 4]) * of_rows[i % 4 >> 1];
      }
    }
  }

  __device__ __forceinline__ float scale_of(uint16_t bits) const {
    return a.scale_dtype == W6A8_FLOAT16 ? from_half(bits) : from_bfloat(bits);
  }

  // Adds up the warps on columns, and writes the result. Two sets of shares take turns.
  __device__ __forceinline__ void finish(int part, int turn, Totals &totals) const {
    float4 *shares = reinterpret_cast<float4 *>(memory + at.shares + turn * at.share) +
                     tile * 32 + lane;
    const int apart = a.tiles_of_block * 32;
    if (across > 0)
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        const float(&own)[4] = totals[set];
        shares[((across - 1) * kSets + set) * apart] =
            float4{own[0], own[1], own[2], own[3]};
      }
    __syncthreads();
    if (across > 0) return;
    const int row = (part * a.tiles_of_block + tile) * W6A8_TILE_ROWS;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      float(&own)[4] = totals[set];
#pragma unroll 1
      for (int other = 0; other < beside - 1; ++other) {
        const float4 share = shares[(other * kSets + set) * apart];
        own[0] += share.x, own[1] += share.y, own[2] += share.z, own[3] += share.w;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store(set * kSetTokens + w6a8_result_token(lane, i),
              row + w6a8_result_row(lane, i), own[i]);
    }
  }

  __device__ __forceinline__ void store(int token, int row, float value) const {
    if (token >= a.tokens || row >= a.rows) return;
    value *= 0.25f * a.input_scales[token];  // codes are held times four
    const int64_t place = static_cast<int64_t>(token) * a.rows + row;
    if (a.output_dtype == W6A8_FLOAT32) {
      if (a.bias != nullptr) value += static_cast<const float *>(a.bias)[row];
      static_cast<float *>(a.outputs)[place] = value;
      return;
    }
    const bool is_half = a.output_dtype == W6A8_FLOAT16;
    if (a.bias != nullptr) {
      const uint16_t bias = static_cast<const uint16_t *>(a.bias)[row];
      value += is_half ? from_half(bias) : from_bfloat(bias);
    }
    static_cast<uint16_t *>(a.outputs)[place] =
        static_cast<uint16_t>(is_half ? to_half(value) : to_bfloat(value));
  }
};

template <int kRun, int kDepth, int kSets>
__global__ void __launch_bounds__(kFewThreads, 2)
    few_kernel(const __grid_constant__ W6A8Linear a) {
  Few<kRun, kDepth, kSets>(a).run();
}
