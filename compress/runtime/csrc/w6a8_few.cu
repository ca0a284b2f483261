// The launcher of the kernel for few tokens.
#include "w6a8_few.cuh"

namespace {

template <int kRun, int kEights, int kDepth>
cudaError_t launch(const W6A8Few &a, cudaStream_t stream) {
  const auto kernel = few_kernel<kRun, kEights, kDepth>;
  const int bytes = few_places(a.linear, a.tiles, kDepth, kRun).bytes;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int parts = a.linear.down / a.tiles;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(parts < a.linear.at_once ? parts : a.linear.at_once);
  config.blockDim = dim3(kFewThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = a.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, a);
}

template <int kRun, int kEights>
cudaError_t launch(const W6A8Few &a, cudaStream_t stream) {
  switch (a.depth) {
    case 6: return launch<kRun, kEights, 6>(a, stream);
    case 12: return launch<kRun, kEights, 12>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <int kEights>
cudaError_t launch(const W6A8Few &a, cudaStream_t stream) {
  if (a.linear.weight_groups == 1) return launch<0, kEights>(a, stream);
  switch (a.linear.run) {
    case 32: return launch<32, kEights>(a, stream);
    case 64: return launch<64, kEights>(a, stream);
    case 128: return launch<128, kEights>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

bool is_possible(const W6A8Few &a) {
  const W6A8Linear &l = a.linear;
  if (l.tokens < 1 || l.tokens > kFewTokens || l.input_groups > 1 || l.splits > 1 ||
      l.sums != nullptr)
    return false;
  if (a.tiles != 1 && a.tiles != 2 && a.tiles != 4) return false;
  if (l.inputs != nullptr) return true;
  const int slots = (l.across * W6A8_TILE_COLUMNS + 255) / 256;  // of 32 times 8
  return l.tokens * slots <= kSlots && a.values.columns % 8 == 0 &&
         a.values.dtype != W6A8_FLOAT32;
}

}  // namespace

extern "C" int w6a8_linear_few(const W6A8Few *arguments, void *stream) {
  const W6A8Few &a = *arguments;
  if (!is_possible(a)) return cudaErrorInvalidValue;
  const cudaError_t error = cudaSetDevice(a.linear.device);
  if (error != cudaSuccess) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  return a.linear.tokens <= 8 ? launch<1>(a, on) : launch<2>(a, on);
}
