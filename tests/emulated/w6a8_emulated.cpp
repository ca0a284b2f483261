// The kernels' own source, compiled for the CPU; called as w6a8.cu is.
#include "w6a8_few.cuh"
#include "w6a8_linear.cuh"
#include "w6a8_quantize.cuh"

template <int kTokens, int kRun, Mode kMode>
void emulate(const W6A8Linear &a, bool at_once) {
  using S = Shape<kTokens, kRun, kMode>;
  const Index grid{static_cast<unsigned>((a.tokens + kTokens - 1) / kTokens),
                   static_cast<unsigned>((a.down + S::kDown - 1) / S::kDown),
                   static_cast<unsigned>(a.splits)};
  emulated::run_grid(grid, kLinearThreads, S::kBytes, at_once,
                     [&a] { linear_kernel<kTokens, kRun, kMode>(a); });
}

template <int kTokens, int kRun>
void emulate(const W6A8Linear &a, bool at_once) {
  if (a.sums != nullptr)
    emulate<kTokens, kRun, kShowing>(a, at_once);
  else if (a.input_groups == 1)
    emulate<kTokens, kRun, kOfTokens>(a, at_once);
  else
    emulate<kTokens, kRun, kOfGroups>(a, at_once);
}

template <int kTokens>
void emulate(const W6A8Linear &a, bool at_once) {
  if (a.run == 32) emulate<kTokens, 32>(a, at_once);
  if (a.run == 64) emulate<kTokens, 64>(a, at_once);
  if (a.run == 128) emulate<kTokens, 128>(a, at_once);
}

template <class T>
void emulate(const W6A8Quantize &a) {
  constexpr int kEach = kQuantizeThreads / 32;
  const bool is_row = a.group == a.values.columns;
  const int64_t warps = a.rows * (a.values.columns / a.group);
  const int64_t blocks = is_row ? a.rows : (warps + kEach - 1) / kEach;
  emulated::run_grid({static_cast<unsigned>(blocks), 1, 1}, kQuantizeThreads, 1024, true,
                     [&a, is_row] {
                       is_row ? quantize_rows<T>(a) : quantize_groups<T>(a);
                     });
}

template <int kRun, int kDepth, int kSets>
void emulate_ring(const W6A8Linear &a, bool at_once) {
  const int parts = a.down / a.tiles_of_block;
  const Index grid{static_cast<unsigned>(min(parts, a.at_once)), 1, 1};
  emulated::run_grid(grid, kFewThreads, few_places(a, kRun).bytes, at_once,
                     [&a] { few_kernel<kRun, kDepth, kSets>(a); });
}

template <int kRun, int kSets>
void emulate_few(const W6A8Linear &a, bool at_once) {
  if (a.depth == 3) emulate_ring<kRun, 3, kSets>(a, at_once);
  if (a.depth == 6) emulate_ring<kRun, 6, kSets>(a, at_once);
  if (a.depth == 12) emulate_ring<kRun, 12, kSets>(a, at_once);
}

template <int kRun>
void emulate_few(const W6A8Linear &a, bool at_once) {
  few_sets(a) == 1 ? emulate_few<kRun, 1>(a, at_once) : emulate_few<kRun, 2>(a, at_once);
}

extern "C" {
void emulate_few(const W6A8Linear *a, int at_once) {
  if (a->weight_groups == 1) return emulate_few<0>(*a, at_once);
  if (a->run == 32) emulate_few<32>(*a, at_once);
  if (a->run == 64) emulate_few<64>(*a, at_once);
  if (a->run == 128) emulate_few<128>(*a, at_once);
}
void emulate_linear(const W6A8Linear *a, int at_once) {
  if (a->token_tile == 8) emulate<8>(*a, at_once);
  if (a->token_tile == 16) emulate<16>(*a, at_once);
  if (a->token_tile == 32) emulate<32>(*a, at_once);
  if (a->token_tile == 64) emulate<64>(*a, at_once);
}
void emulate_quantize(const W6A8Quantize *a) {
  if (a->values.dtype == W6A8_FLOAT32) emulate<Float32>(*a);
  if (a->values.dtype == W6A8_FLOAT16) emulate<Float16>(*a);
  if (a->values.dtype == W6A8_BFLOAT16) emulate<BFloat16>(*a);
}
int sizes(int which) {
  return which ? sizeof(W6A8Linear) : sizeof(W6A8Quantize);
}
int bytes_of_few(const W6A8Linear *a) {
  return few_places(*a, a->weight_groups == 1 ? 0 : a->run).bytes;
}
int bytes_of_block(int token_tile) {
  return token_tile == 64 ? Shape<64, 32, kOfGroups>::kBytes
                          : Shape<32, 32, kOfGroups>::kBytes;
}
}
