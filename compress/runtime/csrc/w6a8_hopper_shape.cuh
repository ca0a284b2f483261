// Hopper's blocks: how large, where things lie in shared memory, which parts are whose.
#pragma once


#include <w6a8_hopper_device.h>

#include "w6a8.h"

// Inputs have a scale for each token, or one for each group too. With the latter, sums
// can be written out for tests.
enum class Inputs { kOfTokens, kOfGroups };

template <int kTokensOfBlock, int kDownOfBlock, int kColumnsOfRun, Inputs kInputScales>
struct HopperShape {
  static constexpr int kTokens = kTokensOfBlock, kDown = kDownOfBlock, kRun = kColumnsOfRun;
  static constexpr Inputs kScalesOfInputs = kInputScales;
  // Warpgroups side by side on rows, 64 each, and on columns, each with every kAcross-th
  // step.
  static constexpr int kAcross = kTokens <= 32 ? 4 : kTokens == 64 ? 2 : 1;
  static constexpr int kStages = kTokens <= 16    ? 24
                                 : kTokens == 32  ? 18
                                 : kTokens == 64  ? 13
                                 : kTokens == 256 ? 4
                                 : kDown == 3     ? 5
                                                  : 6;
  // Whether a run's sums become floats while the next run is multiplied: that takes twice
  // the registers for sums.
  static constexpr bool kIsAhead = kDown < 3;
  static constexpr int kRows = 64 * kDown;
  static constexpr int kConsumers = 128 * kDown * kAcross;
  static constexpr int kThreads = kConsumers + 128;  // registers go by warpgroups
  // Of a consumer's thread. The copying warpgroup keeps kLeft; a block has no more than
  // it starts with.
  static constexpr int kLeft = kTokens <= 32 || kDown == 3 ? 32 : 40;
  static constexpr int kAtStart = 65536 / kThreads / 8 * 8;
  static constexpr int kRegistersMost =
      (kAtStart * kThreads - 128 * kLeft) / kConsumers / 8 * 8;
  static constexpr int kRegisters = kRegistersMost < 240 ? kRegistersMost : 240;
  static constexpr int kTiles = 4 * kDown;  // of weights in a step
  static constexpr int kPanelBytes = W6A8_PANEL * W6A8_TILE_BYTES;
  static constexpr int kWeightBytes = kDown * kPanelBytes;
  static constexpr int kInputBytes = kTokens * W6A8_TILE_COLUMNS;
  static constexpr int kRuns = kRun == 0 ? 1 : W6A8_TILE_COLUMNS / kRun;
  static constexpr int kPanelScales = W6A8_PANEL * W6A8_TILE_ROWS * 2;  // bytes
  static constexpr int kScaleBytes = kRun == 0 ? 0 : kRuns * kDown * kPanelScales;
  static constexpr int kStageBytes = kWeightBytes + kInputBytes + kScaleBytes;
  // Results of a warp on their way out: 16 rows, up to 128 tokens, 16 bits.
  static constexpr int kOutTokens = kTokens < 128 ? kTokens : 128;
  static constexpr int kOutBytes = kOutTokens * 32;
  static constexpr int kInputs = kStages * kWeightBytes;  // where they start
  static constexpr int kScales = kInputs + kStages * kInputBytes;
  static constexpr int kOut = (kStages * kStageBytes + 127) / 128 * 128;
  static constexpr int kShares = kOut + kTiles * kOutBytes;  // of warpgroups on columns
  static constexpr int kShareBytes = kRows * kTokens * 4;
  static constexpr int kBarriers = kShares + (kAcross - 1) * kShareBytes;
  static constexpr int kFlag = kBarriers + 16 * kStages;
  static constexpr int kBytes = kFlag + 16 + 1024;  // the start is aligned to 1024
  static constexpr int kPanel = 8;  // blocks on rows that go together over all tokens
  static_assert(kWeightBytes % 1024 == 0 && kInputBytes % 1024 == 0, "swizzled tiles");
  static_assert(kBytes <= 232448, "of a block on Hopper");
};

// Which part of the result, and of the columns, is next.
struct Part {
  int row_block, token_block, first, steps, split;
};

template <class S>
__device__ __forceinline__ int64_t blocks_along(const W6A8Linear &a) {
  return (a.tokens + S::kTokens - 1) / S::kTokens;
}

template <class S>
__device__ __forceinline__ int blocks_down(const W6A8Linear &a) {
  return (a.down + S::kTiles - 1) / S::kTiles;
}

template <class S>
__device__ __forceinline__ Part part_of(const W6A8Linear &a, int index) {
  const int down = blocks_down<S>(a);
  const int along = static_cast<int>(blocks_along<S>(a));
  const int block = index / a.splits;
  const int panel = block / (S::kPanel * along), within = block % (S::kPanel * along);
  const int height = min(S::kPanel, down - panel * S::kPanel);
  const int64_t across = a.across;
  Part part;
  part.split = index % a.splits;
  part.row_block = panel * S::kPanel + within % height;
  part.token_block = within / height;
  part.first = static_cast<int>(across * part.split / a.splits);
  part.steps = static_cast<int>(across * (part.split + 1) / a.splits) - part.first;
  return part;
}

// Calls `work` with each part that is this block's.
template <class S, class Work>
__device__ __forceinline__ void for_parts(const W6A8Linear &a, const Work &work) {
  const int parts = blocks_down<S>(a) *
                    static_cast<int>(blocks_along<S>(a)) * a.splits;
#pragma unroll 1
  for (int i = blockIdx.x; i < parts; i += gridDim.x)
    work(part_of<S>(a, i));
}

// A stage, of which steps take one after the other, over all parts.
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;  // of how often all stages have been used
  __device__ __forceinline__ void advance(int steps) {  // by fewer than there are stages
    stage += steps;
    if (stage >= kStages) stage -= kStages, parity ^= 1;
  }
  __device__ __forceinline__ void leap(int steps) {
    parity ^= (stage + steps) / kStages & 1;
    stage = (stage + steps) % kStages;
  }
};

template <class S>
struct Ring {
  uint32_t base;  // shared address, aligned to 1024
  __device__ __forceinline__ uint32_t weights(int stage) const {
    return base + stage * S::kWeightBytes;
  }
  __device__ __forceinline__ uint32_t inputs(int stage) const {
    return base + S::kInputs + stage * S::kInputBytes;
  }
  __device__ __forceinline__ uint32_t scales(int stage, int run, int panel) const {
    return base + S::kScales + stage * S::kScaleBytes +
           (run * S::kDown + panel) * S::kPanelScales;
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return base + S::kBarriers + 16 * stage;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8; }
};
