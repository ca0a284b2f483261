// y = x W^T on Hopper: 6-bit weights from tiles, int8 inputs, warpgroup products.
//
// A block computes 64 kDown rows for kTokens tokens: kDown warpgroups, each with 64 rows,
// unpack weights from shared memory into the registers that the tensor cores take them
// from; the inputs are taken from shared memory. One more thread starts all copies, kStages
// steps of 128 columns ahead, also into the next part of the result: blocks stay and go
// on with another part. Rows of the weight are the rows of the products, tokens their
// columns.
//
// Sums are integers for `kRun` columns (0: all of them), then they become floats, are
// multiplied by the scales and added in ascending order. Parts of the columns are added
// by the block that is last to arrive, in ascending order too.
#pragma once

#include "w6a8_hopper_results.cuh"

// The thread that copies. Weights do not depend on the kernel before, inputs do.
template <class S>
__device__ __forceinline__ void produce(const W6A8Linear &a, const CUtensorMap *map,
                                        const Ring<S> &ring) {
  Turn<S::kStages> turn;
  bool has_waited = false;
  for_parts<S>(a, [&](const Part &part) {
    const int panels = a.down / W6A8_PANEL, panel = part.row_block * S::kDown;
    const auto copy_weights = [&](int stage, int step) {
      const uint32_t full = ring.full(stage);
      barrier_expect(full, S::kStageBytes);
#pragma unroll
      for (int i = 0; i < S::kDown; ++i) {
        const int64_t at = min(panel + i, panels - 1);
        copy_bulk(ring.weights(stage) + i * S::kPanelBytes,
                  a.tiles + (at * a.across + part.first + step) * S::kPanelBytes,
                  S::kPanelBytes, full);
        if constexpr (S::kRun != 0) {
#pragma unroll
          for (int r = 0; r < S::kRuns; ++r) {
            const int run = (part.first + step) * S::kRuns + r;
            const int64_t group = min(run >> a.weight_scale_shift, a.weight_groups - 1);
            copy_bulk(ring.scales(stage, r, i),
                      static_cast<const uint8_t *>(a.weight_scales) +
                          (group * panels + at) * S::kPanelScales,
                      S::kPanelScales, full);
          }
        }
      }
    };
    const int ahead = has_waited ? 0 : min(S::kStages, part.steps);
#pragma unroll 1
    for (int step = 0; step < ahead; ++step) copy_weights(step, step);
    if (!has_waited) wait_for_kernel_before();
    has_waited = true;
#pragma unroll 1
    for (int step = 0; step < part.steps; ++step) {
      if (step >= ahead) {
        barrier_wait(ring.empty(turn.stage), turn.parity ^ 1);
        copy_weights(turn.stage, step);
      }
      copy_tile(ring.inputs(turn.stage), map, (part.first + step) * W6A8_TILE_COLUMNS,
                part.token_block * S::kTokens, ring.full(turn.stage));
      turn.advance(1);
    }
  });
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class S>
struct Consumer : Finisher<S> {
  using Base = Finisher<S>;
  using Base::a, Base::across, Base::kTokens, Base::lane, Base::part, Base::ring, Base::row,
      Base::row_of, Base::thread, Base::token_of, Base::warp;
  using typename Base::Totals;
  using Sums = int32_t[kTokens / 2];
  struct Weights {  // of one step, for this lane
    uint32_t at[4][4];
  };
  struct Scales {
    uint16_t at[S::kRuns][2];
  };

  Turn<S::kStages> turn, next_part;  // of the next to load; of the next part
  int loaded = 0, before = 0;        // stages of the last two steps

  using Base::Base;

  __device__ __forceinline__ void run(const Part &given) {
    this->go_to(given);
    turn = next_part;
    turn.advance(across);
    next_part.leap(part.steps);
    const int steps = (part.steps - across + S::kAcross - 1) / S::kAcross;
    Totals totals;
    if constexpr (S::kRun == 0)
      add_all(steps, totals);
    else if constexpr (S::kIsAhead)
      add_runs(steps, totals);
    else
      add_runs_one_by_one(steps, totals);
    this->finish(totals);
  }

  // Without a change of scales: the integers of all steps are added up, and weights are
  // unpacked while those before are multiplied.
  __device__ __forceinline__ void add_all(int steps, Totals &totals) {
    Sums sums;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums[i] = 0;
    Weights one, other;
    Scales none;
    if (steps > 0) load(one, none);
    const auto advance = [&](const Weights &now, Weights &next, int step) {
      multiply_run<4>(now, 0, sums, true);
      products_wait<1>();  // the step before is done, and its weights can be replaced
      if (step > 0) release(before);
      before = loaded;
      if (step + 1 < steps) load(next, none);
    };
#pragma unroll 1
    for (int step = 0; step < steps; step += 2) {
      advance(one, other, step);
      if (step + 1 < steps) advance(other, one, step + 1);
    }
    products_wait<0>();
    if (steps > 0) release(before);
    const float scale[2] = {scale_at(row), scale_at(row + 8)};
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i)
      totals[i] = static_cast<float>(sums[i]) * scale[i >> 1 & 1];
  }

  // With a change of scales after each run, whose sums become floats before the next
  // run begins.
  __device__ __forceinline__ void add_runs_one_by_one(int steps, Totals &totals) {
    constexpr int kEach = S::kRun / 32;
    Sums sums;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) totals[i] = 0.0f, sums[i] = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      Weights weights;
      Scales scales;
      load(weights, scales);
#pragma unroll
      for (int r = 0; r < S::kRuns; ++r) {
        multiply_run<kEach>(weights, r * kEach, sums, false);
        products_wait<0>();
        stay_behind(sums);
        if (r == S::kRuns - 1) release(loaded);
        flush(scales, across + step * S::kAcross, r, sums, totals);
      }
    }
  }

  // The same, but while one run is multiplied, the sums of the
  // run before become floats.
  __device__ __forceinline__ void add_runs(int steps, Totals &totals) {
    constexpr int kEach = S::kRun / 32;
    Sums sums[2];
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) totals[i] = 0.0f, sums[0][i] = sums[1][i] = 0;
    if (steps <= 0) return;
    Weights weights;
    Scales one, other;
    load(weights, one);
    multiply_run<kEach>(weights, 0, sums[0], false);
    // Products are under way at the start of each step, and at its end unless it is the
    // last: the compiler must see that, or it waits after each product.
    const auto advance = [&](const Scales &now, Scales &next, int step, auto start,
                             auto last) {
#pragma unroll
      for (int r = 0; r < S::kRuns; ++r) {
        Sums &done = sums[(r + start.value) & 1], &free = sums[(r + start.value + 1) & 1];
        products_wait<0>();
        stay_behind(done);
        if (r + 1 < S::kRuns) {
          multiply_run<kEach>(weights, (r + 1) * kEach, free, false);
        } else {
          release(loaded);
          if constexpr (!last.value) {
            load(weights, next);
            multiply_run<kEach>(weights, 0, free, false);
          }
        }
        flush(now, across + step * S::kAcross, r, done, totals);
      }
    };
    constexpr Constant<0> kEven, kNotLast;
    constexpr Constant<S::kRuns % 2> kOdd;
    constexpr Constant<1> kLast;
    int step = 0;
#pragma unroll 1
    for (; step + 2 < steps; step += 2) {
      advance(one, other, step, kEven, kNotLast);
      advance(other, one, step + 1, kOdd, kNotLast);
    }
    if (step + 2 == steps) {
      advance(one, other, step, kEven, kNotLast);
      advance(other, one, step + 1, kOdd, kLast);
    } else {
      advance(one, other, step, kEven, kLast);
    }
  }

  // Says that a stage can be filled again.
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty(stage));
  }

  // The scale of a row that has only one.
  __device__ __forceinline__ float scale_at(int at) const {
    return scale_of(static_cast<const uint16_t *>(
        a.weight_scales)[min(at, a.down * W6A8_TILE_ROWS - 1)]);
  }

  __device__ __forceinline__ float scale_of(uint16_t bits) const {
    return a.scale_dtype == W6A8_FLOAT16 ? from_half(bits) : from_bfloat(bits);
  }

  // Waits for the next step's weights and inputs, and unpacks the weights.
  __device__ __forceinline__ void load(Weights &weights, Scales &scales) {
    loaded = turn.stage;
    barrier_wait(ring.full(loaded), turn.parity);
    uint32_t l[8], h[4];
    const uint32_t from = ring.weights(loaded) + warp * W6A8_TILE_BYTES + 16 * lane;
    load_16(from, l[0], l[1], l[2], l[3]);
    load_16(from + 512, l[4], l[5], l[6], l[7]);
    load_16(from + 1024, h[0], h[1], h[2], h[3]);
    if constexpr (S::kRun != 0) {
#pragma unroll
      for (int r = 0; r < S::kRuns; ++r) {
        const uint32_t at =
            ring.scales(loaded, r, warp / 4) + warp % 4 * 32 + (lane >> 2) * 2;
        scales.at[r][0] = load_2(at);
        scales.at[r][1] = load_2(at + 16);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) w6a8_unpack(l[2 * j], l[2 * j + 1], h[j], weights.at[j]);
    turn.advance(S::kAcross);
  }

  // Starts the products of kEach times 32 columns of the step that was loaded last.
  template <int kEach>
  __device__ __forceinline__ void multiply_run(const Weights &weights, int first,
                                               Sums &sums, bool keep) const {
    const uint64_t inputs = described(ring.inputs(loaded));
    products_begin();
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      multiply<kTokens>(sums, weights.at[first + j], inputs + 2 * (first + j),
                        keep || j > 0);
    products_commit();
  }

  // Ends a run: integers become floats and meet their scales.
  __device__ __forceinline__ void flush(const Scales &scales, int step, int r,
                                        const Sums &sums, Totals &totals) const {
    const float scale[2] = {scale_of(scales.at[r][0]), scale_of(scales.at[r][1])};
    const int run = (part.first + step) * S::kRuns + r;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      float factor = scale[i >> 1 & 1];
      if constexpr (S::kScalesOfInputs == Inputs::kOfGroups) {
        const int64_t token = min(token_of(i), a.tokens - 1);
        const int group = min(run >> a.input_scale_shift, a.input_groups - 1);
        factor *= a.sums != nullptr ? 1.0f : a.input_scales[token * a.input_groups + group];
        if (a.sums != nullptr && token_of(i) < a.tokens && row_of(i) < a.rows)
          a.sums[(token * a.across * S::kRuns + run) * a.rows + row_of(i)] =
              sums[i] >> 2;
      }
      totals[i] = fmaf(static_cast<float>(sums[i]), factor, totals[i]);
    }
  }
};

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    hopper_kernel(const __grid_constant__ W6A8Linear a,
                  const __grid_constant__ CUtensorMap map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const Ring<S> ring{(shared_address(shared_memory()) + 1023) & ~1023u};
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(ring.full(i), 1);
      barrier_init(ring.empty(i), S::kTiles);
    }
    publish_barriers();
  }
  let_next_begin();
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    leave_registers<S::kLeft>();
    if (threadIdx.x == S::kConsumers) produce<S>(a, &map, ring);
  } else {
    take_registers<S::kRegisters>();
    wait_for_kernel_before();
    Consumer<S> consumer(a, ring);
    for_parts<S>(a, [&](const Part &part) { consumer.run(part); });
  }
#endif
}
