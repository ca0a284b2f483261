// Codes and scales of inputs, by the rule of core/inputs.py, bit for bit.
//
// The largest magnitude is found among the bits of the absolute values: there a NaN is
// larger than infinity and that is larger than any number, so nothing is lost.
#pragma once

#include "w6a8_values.cuh"

constexpr int kQuantizeThreads = 512;  // with 8 values each: 4096 columns at once

template <class T, int kEach>
__device__ __forceinline__ float squares(const Row<T> &row, int count, int thread,
                                         int threads) {
  const bool aligned = row.template is_aligned<kEach>();
  const int whole = count / kEach * kEach;
  float sum = 0.0f;
  for (int i = kEach * thread; i < whole; i += kEach * threads)
    sum += row.template squares<kEach>(i, aligned);
  for (int i = whole + thread; i < count; i += threads)
    sum += row.template squares<1>(i, true);
  return sum;
}

template <class T, int kEach>
__device__ __forceinline__ uint32_t largest_bits(const Row<T> &row, int start, int count,
                                                 int thread, int threads) {
  uint32_t most = 0;
  const bool aligned = row.template is_aligned<kEach>();
  const int whole = count / kEach * kEach;
#pragma unroll 2
  for (int i = kEach * thread; i < whole; i += kEach * threads) {
    float v[kEach];
    row.template values<kEach>(start + i, aligned, v);
    most = max(most, largest_of(v));
  }
  for (int i = whole + thread; i < count; i += threads) {
    float v[1];
    row.template values<1>(start + i, true, v);
    most = max(most, largest_of(v));
  }
  return most;
}

template <class T, int kEach>
__device__ __forceinline__ void write_codes(const Row<T> &row, int start, int count,
                                            float inverse, int8_t *codes, int padded,
                                            int thread, int threads) {
  const bool aligned = row.template is_aligned<kEach>();
  const int whole = count / kEach * kEach;
#pragma unroll 2
  for (int i = kEach * thread; i < whole; i += kEach * threads) {
    float v[kEach];
    row.template values<kEach>(start + i, aligned, v);
    struct alignas(kEach) {
      uint32_t at[kEach / 4];
    } words;
#pragma unroll
    for (int j = 0; j < kEach; j += 4) words.at[j / 4] = codes_of(v + j, inverse);
    *reinterpret_cast<decltype(words) *>(codes + i) = words;
  }
  for (int i = whole + thread; i < padded; i += threads) {
    float v[1] = {0.0f};
    if (i < count) row.template values<1>(start + i, true, v);
    codes[i] = static_cast<int8_t>(code_of(v[0], inverse));
  }
}

__device__ __forceinline__ void clear_tickets(const W6A8Quantize &a) {
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < a.ticket_count; i += kQuantizeThreads) a.tickets[i] = 0;
}

// One block a row.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_rows(const W6A8Quantize a) {
  let_next_begin();
  wait_for_kernel_before();
  constexpr int kWarps = kQuantizeThreads / 32;
  const int thread = threadIdx.x, warp = thread >> 5, columns = a.values.columns;
  clear_tickets(a);
  uint32_t *of_warps = reinterpret_cast<uint32_t *>(shared_memory());
  Row<T> row(a.values, blockIdx.x);
  if (is_norm(row.kind)) {
    float *sums = reinterpret_cast<float *>(of_warps + kWarps);
    const float own =
        sum_of_warp(squares<T, 8>(row, columns, thread, kQuantizeThreads));
    if ((thread & 31) == 0) sums[warp] = own;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < kWarps; ++i) sum += sums[i];
    row.factor = norm_factor(sum, a.values);
  }
  uint32_t most =
      largest_of_warp(largest_bits<T, 8>(row, 0, columns, thread, kQuantizeThreads));
  if ((thread & 31) == 0) of_warps[warp] = most;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) most = max(most, of_warps[i]);
  const Rule rule = rule_of(most);
  const int64_t place = blockIdx.x;
  if (thread == 0) a.scales[place] = rule.scale;
  write_codes<T, 8>(row, 0, columns, rule.inverse, a.codes + place * a.padded, a.padded,
                    thread, kQuantizeThreads);
}

// One warp a group; groups are multiples of 32 columns.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    quantize_groups(const W6A8Quantize a) {
  let_next_begin();
  wait_for_kernel_before();
  const int thread = threadIdx.x, lane = thread & 31;
  clear_tickets(a);
  const int groups = a.values.columns / a.group;
  const int64_t place =
      static_cast<int64_t>(blockIdx.x) * (kQuantizeThreads / 32) + (thread >> 5);
  if (place >= a.rows * groups) return;  // a whole warp
  const int64_t at = place / groups;
  const int group = static_cast<int>(place % groups), start = group * a.group;
  Row<T> row(a.values, at);
  if (is_norm(row.kind))  // each warp for itself
    row.factor = norm_factor(
        sum_of_warp(squares<T, 4>(row, a.values.columns, lane, 32)), a.values);
  const Rule rule =
      rule_of(largest_of_warp(largest_bits<T, 4>(row, start, a.group, lane, 32)));
  if (lane == 0) a.scales[place] = rule.scale;
  const int padded = group == groups - 1 ? a.padded - start : a.group;
  write_codes<T, 4>(row, start, a.group, rule.inverse, a.codes + at * a.padded + start,
                    padded, lane, 32);
}
