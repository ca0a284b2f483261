// y = x W^T for few tokens: 6-bit weights from tiles, int8 inputs, int8 tensor cores.
//
// A block of eight warps computes 16 kDown rows for kTokens tokens; kDown warps stand
// side by side on rows, kAcross on columns, of which each step takes 128 kAcross. Rows
// of the weight are the rows of the tensor cores' 16 x 8 results, tokens their columns,
// so that a single token wastes idle tensor cores only. Copies run kStages - 1 steps
// ahead of the arithmetic.
//
// Sums are integers for `run` columns; they start at 1.5 * 2^23 so that the same bits,
// read as a float, are that plus the sum (4 times too large, and below 2^22). Then they
// are multiplied by the scales and added in float32, in ascending order of columns in a
// warp, of warps in a block, and of blocks: never by floating-point atomics, so that a
// call gives the same bits every time.
#pragma once

#include <w6a8_device.h>

#include "w6a8.h"

constexpr int kLinearThreads = 256;
constexpr int kWarps = kLinearThreads / 32;

// Inputs have a scale for each token, or one for each group too; or the former, and the
// integer sums are written out, for tests.
enum Mode { kOfTokens, kOfGroups, kShowing };

template <int kTokens, int kRun, Mode kMode>
struct Shape {
  static constexpr int kDown = kTokens <= 16 ? 2 : 4;
  static constexpr int kAcross = kWarps / kDown;
  static constexpr int kStages = kTokens == 64 ? 3 : 4;
  static constexpr int kRuns = W6A8_TILE_COLUMNS / kRun;
  static constexpr int kRows = W6A8_TILE_ROWS * kDown;
  static constexpr int kPitch = kRows + 4;  // of partial results: no bank conflicts
  // Parts of a stage, in bytes.
  static constexpr int kWeightBytes = kWarps * W6A8_TILE_BYTES;
  static constexpr int kInputBytes = kAcross * kTokens * W6A8_TILE_COLUMNS;
  static constexpr int kScaleBytes = kWarps * kRuns * W6A8_TILE_ROWS * 2;
  static constexpr int kInputScaleBytes =
      kMode == kOfGroups ? kAcross * kTokens * kRuns * 4 : 0;
  static constexpr int kStageBytes =
      kWeightBytes + kInputBytes + kScaleBytes + kInputScaleBytes;
  static constexpr int kResultBytes = kAcross * kTokens * kPitch * 4;
  static constexpr int kLast = kStages * kStageBytes;  // where a flag lies
  static constexpr int kBytes = kLast + 16;
  static_assert(kResultBytes <= kLast, "results reuse the stages");
  static_assert(kStageBytes % 16 == 0, "stages are aligned");
};

template <int kTokens, int kRun, Mode kMode>
struct Block {
  using S = Shape<kTokens, kRun, kMode>;
  static constexpr int kParts = kTokens / 8;  // results of a warp side by side

  const W6A8Linear &a;
  unsigned char *memory;
  const int thread, lane, across, row_tile;
  const int64_t first_token;
  const uint8_t *first_tile;  // of this lane, in column 0

  __device__ __forceinline__ explicit Block(const W6A8Linear &arguments)
      : a(arguments),
        memory(shared_memory()),
        thread(threadIdx.x),
        lane(threadIdx.x & 31),
        across((threadIdx.x >> 5) / S::kDown),
        row_tile(blockIdx.y * S::kDown + (threadIdx.x >> 5) % S::kDown),
        first_token(static_cast<int64_t>(blockIdx.x) * kTokens),
        first_tile(a.tiles + 16 * lane +
                   (static_cast<int64_t>(row_tile / W6A8_PANEL) * a.across * W6A8_PANEL +
                    row_tile % W6A8_PANEL) *
                       W6A8_TILE_BYTES) {}

  __device__ __forceinline__ unsigned char *weights(int stage) const {
    return memory + stage * S::kStageBytes + (thread >> 5) * W6A8_TILE_BYTES;
  }
  __device__ __forceinline__ unsigned char *inputs(int stage) const {
    return memory + stage * S::kStageBytes + S::kWeightBytes;
  }
  __device__ __forceinline__ uint16_t *scales(int stage) const {
    return reinterpret_cast<uint16_t *>(inputs(stage) + S::kInputBytes) +
           (thread >> 5) * S::kRuns * W6A8_TILE_ROWS;
  }
  __device__ __forceinline__ float *input_scales(int stage) const {
    return reinterpret_cast<float *>(inputs(stage) + S::kInputBytes + S::kScaleBytes);
  }
  __device__ __forceinline__ bool has_tile(int step) const {
    return row_tile < a.down && step * S::kAcross + across < a.across;
  }

  // Starts the copies of a step.
  __device__ __forceinline__ void fetch(int step, int stage) const {
    const int column = step * S::kAcross + across;
    if (has_tile(step)) {
      const uint8_t *tile =
          first_tile + static_cast<int64_t>(column) * W6A8_PANEL * W6A8_TILE_BYTES;
      unsigned char *to = weights(stage) + 16 * lane;
#pragma unroll
      for (int i = 0; i < 3; ++i) copy_16(to + 512 * i, tile + 512 * i);
      if (lane < 2 * S::kRuns) {  // 16 scales are twice 16 bytes
        const int group =
            min((column * S::kRuns + lane / 2) >> a.weight_scale_shift,
                a.weight_groups - 1);  // past the last: codes are zero
        const int64_t at = static_cast<int64_t>(group) * a.down * W6A8_TILE_ROWS +
                           row_tile * W6A8_TILE_ROWS + lane % 2 * 8;
        copy_16(scales(stage) + lane * 8,
                static_cast<const uint16_t *>(a.weight_scales) + at);
      }
    }
    // Eight threads a token, 32 tokens at a time, over the parts one after the other.
    const int place = thread / 8, chunk = thread % 8;
    const int64_t width = static_cast<int64_t>(a.across) * W6A8_TILE_COLUMNS;
    unsigned char *to = inputs(stage) + w6a8_swizzled(place, chunk);
#pragma unroll 2
    for (int i = 0; i < S::kAcross * kTokens / 32; ++i) {
      const int64_t token = first_token + (place + 32 * i) % kTokens;
      const int part = step * S::kAcross + (place + 32 * i) / kTokens;
      const bool valid = part < a.across && token < a.tokens;
      const int8_t *from =
          a.inputs + token * width + part * W6A8_TILE_COLUMNS + 16 * chunk;
      copy_16_or_zero(to + 32 * W6A8_TILE_COLUMNS * i, valid ? from : a.inputs, valid);
    }
    if constexpr (kMode == kOfGroups) fetch_input_scales(step, stage);
  }

  __device__ __forceinline__ void fetch_input_scales(int step, int stage) const {
#pragma unroll 1
    for (int i = thread; i < S::kAcross * kTokens * S::kRuns; i += kLinearThreads) {
      const int64_t token = first_token + i % kTokens;
      const int part = step * S::kAcross + i / (kTokens * S::kRuns);
      const bool valid = part < a.across && token < a.tokens;
      const int run = part * S::kRuns + i / kTokens % S::kRuns;
      const int group = min(run >> a.input_scale_shift, a.input_groups - 1);
      const float *from = a.input_scales + token * a.input_groups + group;
      copy_4_or_zero(input_scales(stage) + i, valid ? from : a.input_scales, valid);
    }
  }

  __device__ __forceinline__ float scale_of(uint16_t bits) const {
    return a.scale_dtype == W6A8_FLOAT16 ? from_half(bits) : from_bfloat(bits);
  }

  // Adds what a warp's tile of a step contributes.
  __device__ __forceinline__ void add(int step, int stage,
                                      float (&total)[kParts][4]) const {
    constexpr int kSteps = kRun / 32;
    const uint4 *tile = reinterpret_cast<const uint4 *>(weights(stage));
    const uint4 l0 = tile[lane], l1 = tile[32 + lane], h = tile[64 + lane];
    const uint32_t nibbles[8] = {l0.x, l0.y, l0.z, l0.w, l1.x, l1.y, l1.z, l1.w};
    const uint32_t pairs[4] = {h.x, h.y, h.z, h.w};
    const unsigned char *x = inputs(stage) + across * kTokens * W6A8_TILE_COLUMNS;
    int32_t sums[kParts][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j % kSteps == 0) {
#pragma unroll
        for (int t = 0; t < kParts; ++t)
          for (int i = 0; i < 4; ++i) sums[t][i] = W6A8_SUM_START;
      }
      uint32_t w[4];
      w6a8_unpack(nibbles[2 * j], nibbles[2 * j + 1], pairs[j], w);
      // Chunks 2 j and 2 j + 1 of the tokens: their places differ in the bits of j.
      if constexpr (kParts == 1) {
        uint32_t b[2];
        load_matrices(b, x + (w6a8_swizzled(lane & 7, lane >> 3 & 1) ^ j << 5));
        multiply_add(sums[0], w, b[0], b[1]);
      } else {
#pragma unroll
        for (int t = 0; t < kParts; t += 2) {
          uint32_t b[4];
          const int token = 8 * (t + (lane >> 4)) + (lane & 7);
          load_matrices(b, x + (w6a8_swizzled(token, lane >> 3 & 1) ^ j << 5));
          multiply_add(sums[t], w, b[0], b[1]);
          multiply_add(sums[t + 1], w, b[2], b[3]);
        }
      }
      if (j % kSteps == kSteps - 1) flush(step, stage, j / kSteps, sums, total);
    }
  }

  // Ends a run: integers become floats and meet their scales.
  __device__ __forceinline__ void flush(int step, int stage, int run,
                                        const int32_t (&sums)[kParts][4],
                                        float (&total)[kParts][4]) const {
    const uint16_t *s = scales(stage) + run * W6A8_TILE_ROWS;
    const float scale[2] = {scale_of(s[lane >> 2]), scale_of(s[(lane >> 2) + 8])};
    const float *sx = input_scales(stage) + (across * S::kRuns + run) * kTokens;
#pragma unroll
    for (int t = 0; t < kParts; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = as_float(sums[t][i]) - W6A8_SUM_START_AS_FLOAT;
        float factor = scale[i >> 1];
        if constexpr (kMode == kOfGroups) factor *= sx[8 * t + w6a8_result_token(lane, i)];
        total[t][i] = fmaf(sum, factor, total[t][i]);
      }
    }
    if constexpr (kMode == kShowing) store_sums(step, run, sums);
  }

  __device__ __forceinline__ void store_sums(int step, int run,
                                          const int32_t (&sums)[kParts][4]) const {
    const int runs = a.across * S::kRuns;
    const int place = (step * S::kAcross + across) * S::kRuns + run;
#pragma unroll
    for (int t = 0; t < kParts; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t token = first_token + 8 * t + w6a8_result_token(lane, i);
        const int row = row_tile * W6A8_TILE_ROWS + w6a8_result_row(lane, i);
        if (token < a.tokens && row < a.rows)
          a.sums[(token * runs + place) * a.rows + row] =
              (sums[t][i] - W6A8_SUM_START) >> 2;
      }
    }
  }

  __device__ __forceinline__ void store(int64_t token, int row, float value) const {
    value *= 0.25f;  // codes are held times four
    if constexpr (kMode != kOfGroups) value *= a.input_scales[token];
    const int64_t at = token * a.rows + row;
    if (a.output_dtype == W6A8_FLOAT32) {
      if (a.bias != nullptr) value += static_cast<const float *>(a.bias)[row];
      static_cast<float *>(a.outputs)[at] = value;
      return;
    }
    const bool is_half = a.output_dtype == W6A8_FLOAT16;
    if (a.bias != nullptr) {
      const uint16_t bias = static_cast<const uint16_t *>(a.bias)[row];
      value += is_half ? from_half(bias) : from_bfloat(bias);
    }
    static_cast<uint16_t *>(a.outputs)[at] = is_half ? to_half(value) : to_bfloat(value);
  }

  // Adds up warps, then blocks, and writes the result.
  __device__ __forceinline__ void finish(const float (&total)[kParts][4]) const {
    float *results = reinterpret_cast<float *>(memory);
    const int rows_before = (thread >> 5) % S::kDown * W6A8_TILE_ROWS;
    for (int t = 0; t < kParts; ++t)
      for (int i = 0; i < 4; ++i)
        results[(across * kTokens + 8 * t + w6a8_result_token(lane, i)) * S::kPitch +
                rows_before + w6a8_result_row(lane, i)] = total[t][i];
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < kTokens * S::kRows; i += kLinearThreads) {
      const int64_t token = first_token + i / S::kRows;
      const int row = blockIdx.y * S::kRows + i % S::kRows;
      if (token >= a.tokens || row >= a.rows) continue;
      float value = 0.0f;
      for (int part = 0; part < S::kAcross; ++part)
        value += results[(part * kTokens + i / S::kRows) * S::kPitch + i % S::kRows];
      if (a.splits == 1)
        store(token, row, value);
      else
        a.partial[(blockIdx.z * a.tokens + token) * a.rows + row] = value;
    }
    if (a.splits == 1 || !is_last()) return;
#pragma unroll 1
    for (int i = thread; i < kTokens * S::kRows; i += kLinearThreads) {
      const int64_t token = first_token + i / S::kRows;
      const int row = blockIdx.y * S::kRows + i % S::kRows;
      if (token >= a.tokens || row >= a.rows) continue;
      float value = 0.0f;
      for (int split = 0; split < a.splits; ++split)
        value += __ldcg(&a.partial[(split * a.tokens + token) * a.rows + row]);
      store(token, row, value);
    }
  }

  // Whether all other blocks of this part of the result have written their share.
  __device__ __forceinline__ bool is_last() const {
    uint32_t *flag = reinterpret_cast<uint32_t *>(memory + S::kLast);
    __threadfence();
    __syncthreads();
    if (thread == 0) {
      uint32_t *ticket = a.tickets + blockIdx.y * gridDim.x + blockIdx.x;
      *flag = atomicAdd(ticket, 1u) == static_cast<uint32_t>(a.splits) - 1;
    }
    __syncthreads();
    __threadfence();
    return *flag != 0;
  }
};

template <int kTokens, int kRun, Mode kMode>
__global__ void __launch_bounds__(kLinearThreads, 2)
    linear_kernel(const __grid_constant__ W6A8Linear a) {
  using S = Shape<kTokens, kRun, kMode>;
  const Block<kTokens, kRun, kMode> block(a);
  const int64_t steps = (a.across + S::kAcross - 1) / S::kAcross;
  const int first = static_cast<int>(steps * blockIdx.z / a.splits);
  const int last = static_cast<int>(steps * (blockIdx.z + 1) / a.splits);
  float total[kTokens / 8][4] = {};
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (first + i < last) block.fetch(first + i, i);
    commit_copies();  // also of nothing: groups are counted
  }
  int stage = 0;
  for (int step = first; step < last; ++step) {
    wait_copies<S::kStages - 2>();
    __syncthreads();  // all copies are here, and nobody reads the stage before any more
    const int ahead = step + S::kStages - 1;
    const int free = stage == 0 ? S::kStages - 1 : stage - 1;
    if (ahead < last) block.fetch(ahead, free);
    commit_copies();
    if (block.has_tile(step)) block.add(step, stage, total);
    stage = stage == S::kStages - 1 ? 0 : stage + 1;
  }
  wait_copies<0>();
  __syncthreads();
  block.finish(total);
}
