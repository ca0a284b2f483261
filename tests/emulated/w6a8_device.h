// A CPU in place of csrc/w6a8_device.h: the threads of a block are fibres.
//
// Fibres run one after the other, each until it meets a barrier or something that a warp
// does together. Asynchronous copies are done either at once or when they are waited
// for: the first finds stages that are overwritten too early, the second those that are
// read too early. Shared memory starts as bytes that are neither small nor zero.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x, y, z;
};
struct float4 {
  float x, y, z, w;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulated {

struct Copy {
  void *to;
  const void *from;
  int bytes;
  bool valid;
};

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  bool done = false;
};

struct Meeting {  // of all fibres of a block, or of a warp
  int arrived = 0;
  unsigned long round = 0;
};

inline std::vector<std::unique_ptr<Fibre>> fibres;
inline ucontext_t scheduler;
inline int current;
inline Meeting of_block;
inline std::vector<Meeting> of_warps;
inline std::vector<unsigned char> memory;
inline bool at_once;
inline std::function<void()> body;
struct Lane {
  const void *row;
  uint32_t words[6];
};
inline Lane lanes[1024];

inline void yield() { swapcontext(&fibres[current]->context, &scheduler); }

inline void meet(Meeting &meeting, int count) {
  const unsigned long round = meeting.round;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.round;
  }
  while (meeting.round == round) yield();
}

inline void meet_warp() { meet(of_warps[threadIdx.x / 32], 32); }

inline void perform(const Copy &copy) {
  if (copy.valid)
    memcpy(copy.to, copy.from, copy.bytes);
  else
    memset(copy.to, 0, copy.bytes);
}

inline void copy(void *to, const void *from, int bytes, bool valid) {
  const Copy one{to, from, bytes, valid};
  if (at_once)
    perform(one);
  else
    fibres[current]->open.push_back(one);
}

inline void entry() {
  body();
  fibres[current]->done = true;
  swapcontext(&fibres[current]->context, &scheduler);
}

inline void run_block(int threads) {
  fibres.clear();
  of_block = {};
  of_warps.assign(threads / 32, {});
  std::fill(memory.begin(), memory.end(), 0xA7);
  for (int i = 0; i < threads; ++i) {
    fibres.push_back(std::make_unique<Fibre>());
    Fibre &fibre = *fibres.back();
    fibre.stack.resize(1 << 16);
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, entry, 0);
  }
  for (int left = threads; left > 0;) {
    left = 0;
    for (int k = 0; k < threads; ++k) {
      const int i = at_once ? threads - 1 - k : k;  // two orders, of many
      if (fibres[i]->done) continue;
      current = i;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      swapcontext(&scheduler, &fibres[i]->context);
      left += !fibres[i]->done;
    }
  }
}

inline void run_grid(Index grid, int threads, size_t bytes, bool copy_at_once,
                     std::function<void()> kernel) {
  gridDim = grid;
  at_once = copy_at_once;
  body = std::move(kernel);
  memory.resize(bytes + 128);
  for (unsigned z = grid.z; z-- > 0;)  // any order will do: the last one adds up
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(threads);
      }
}

}  // namespace emulated

inline unsigned char *shared_memory() {
  const auto start = reinterpret_cast<uintptr_t>(emulated::memory.data());
  return reinterpret_cast<unsigned char *>((start + 127) / 128 * 128);
}

inline void __syncthreads() {
  emulated::meet(emulated::of_block, static_cast<int>(emulated::fibres.size()));
}
inline void meet_in_warp() { emulated::meet_warp(); }
inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t *at, uint32_t value) {
  const uint32_t before = *at;
  *at += value;
  return before;
}
inline float __ldcg(const float *at) { return *at; }

inline void let_next_begin() {}
inline void wait_for_kernel_before() {}

inline void copy_16(void *to, const void *from) {
  emulated::copy(to, from, 16, true);
}
inline void copy_16_or_zero(void *to, const void *from, bool valid) {
  emulated::copy(to, from, 16, valid);
}
inline void copy_4_or_zero(void *to, const void *from, bool valid) {
  emulated::copy(to, from, 4, valid);
}
inline void commit_copies() {
  auto &fibre = *emulated::fibres[emulated::current];
  fibre.groups.push_back(std::move(fibre.open));
  fibre.open.clear();
}
template <int kPending>
inline void wait_copies() {
  auto &groups = emulated::fibres[emulated::current]->groups;
  while (groups.size() > kPending) {
    for (const auto &copy : groups.front()) emulated::perform(copy);
    groups.erase(groups.begin());
  }
}

template <int kCount>
inline void load_matrices(uint32_t (&r)[kCount], const void *row) {
  const int thread = threadIdx.x, lane = thread % 32;
  emulated::Lane *lanes = emulated::lanes + (thread - lane);
  lanes[lane].row = row;
  emulated::meet_warp();
  for (int i = 0; i < kCount; ++i)
    memcpy(&r[i],
           static_cast<const char *>(lanes[8 * i + lane / 4].row) + 4 * (lane % 4), 4);
  emulated::meet_warp();
}

inline int8_t byte_of(uint32_t word, int i) {
  return static_cast<int8_t>(word >> (8 * i));
}

// PTX ISA, "Matrix Fragments for mma.m16n8k32": rows and columns of every register.
inline void multiply_add(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                         uint32_t b1) {
  const int thread = threadIdx.x, lane = thread % 32;
  emulated::Lane *lanes = emulated::lanes + (thread - lane);
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  memcpy(lanes[lane].words, words, sizeof words);
  emulated::meet_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
    for (int k = 0; k < 32; ++k) {
      const int group = k % 16 / 4;  // the lane of four that holds this k
      const uint32_t *left = lanes[row % 8 * 4 + group].words;
      const uint32_t *right = lanes[column * 4 + group].words + 4;
      const uint32_t of_row = left[(row >= 8) + (k >= 16 ? 2 : 0)];
      c[i] += byte_of(of_row, k % 4) * byte_of(right[k >= 16], k % 4);
    }
  }
  emulated::meet_warp();
}

inline uint32_t largest_of_warp(uint32_t value) {
  const int thread = threadIdx.x, lane = thread % 32;
  emulated::Lane *lanes = emulated::lanes + (thread - lane);
  lanes[lane].words[0] = value;
  emulated::meet_warp();
  uint32_t most = 0;
  for (int i = 0; i < 32; ++i) most = max(most, lanes[i].words[0]);
  emulated::meet_warp();
  return most;
}

inline float sum_of_warp(float value) {
  const int thread = threadIdx.x, lane = thread % 32;
  emulated::Lane *lanes = emulated::lanes + (thread - lane);
  for (int i = 16; i > 0; i >>= 1) {
    memcpy(lanes[lane].words, &value, 4);
    emulated::meet_warp();
    float other;
    memcpy(&other, lanes[lane ^ i].words, 4);
    emulated::meet_warp();
    value += other;
  }
  return value;
}

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float divided(float a, float b) { return a / b; }
inline float inverse_root(float a) { return 1.0f / std::sqrt(a); }
inline float exponential(float a) { return std::exp(a); }
inline int rounded(float a) { return static_cast<int>(std::nearbyint(a)); }

inline float from_half(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline uint16_t to_half(float value) {
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline float from_bfloat(uint16_t bits) {
  return as_float(static_cast<uint32_t>(bits) << 16);
}
inline uint16_t to_bfloat(float value) {
  uint32_t bits = as_bits(value);
  if (value != value) return 0x7FC0;
  bits += 0x7FFF + (bits >> 16 & 1);  // ties to even
  return static_cast<uint16_t>(bits >> 16);
}
