// The launcher of the kernel for few tokens.
#include "w6a8_few.cuh"

namespace {

template <int kRun, int kDepth, int kSets>
cudaError_t launch(const W6A8Linear &a, cudaStream_t stream) {
  const auto kernel = few_kernel<kRun, kDepth, kSets>;
  const int bytes = few_places(a, kRun).bytes, parts = a.down / a.tiles_of_block;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(parts < a.at_once ? parts : a.at_once);
  config.blockDim = dim3(kFewThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = a.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, a);
}

template <int kRun>
cudaError_t launch(const W6A8Linear &a, cudaStream_t stream) {
  const bool one = few_sets(a) == 1;
  switch (a.depth) {
    case 3: return one ? cudaErrorInvalidValue : launch<kRun, 3, 2>(a, stream);
    case 6: return one ? launch<kRun, 6, 1>(a, stream) : launch<kRun, 6, 2>(a, stream);
    case 12: return one ? launch<kRun, 12, 1>(a, stream) : launch<kRun, 12, 2>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" int w6a8_linear_few(const W6A8Linear *arguments, void *stream) {
  const W6A8Linear &a = *arguments;
  const int tiles = a.tiles_of_block;
  if (a.tokens < 1 || a.tokens > kFewTokens || a.input_groups > 1 || a.splits > 1 ||
      a.sums != nullptr || (tiles != 1 && tiles != 2 && tiles != 4))
    return cudaErrorInvalidValue;
  const cudaError_t error = cudaSetDevice(a.device);
  if (error != cudaSuccess) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  if (a.weight_groups == 1) return launch<0>(a, on);
  switch (a.run) {
    case 32: return launch<32>(a, on);
    case 64: return launch<64>(a, on);
    case 128: return launch<128>(a, on);
    default: return cudaErrorInvalidValue;
  }
}
