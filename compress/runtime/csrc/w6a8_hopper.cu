// Launchers of the Hopper kernels, behind the C interface of w6a8.h.
#include "w6a8_hopper.cuh"

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found through the runtime so that nothing is linked to it.
cudaError_t find_encode(Encode &encode) {
  static void *found = nullptr;
  if (found == nullptr) {
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found,
                                                      cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  }
  encode = reinterpret_cast<Encode>(found);
  return cudaSuccess;
}

cudaError_t map_inputs(const W6A8Linear &a, int box_tokens, CUtensorMap &map) {
  Encode encode;
  const cudaError_t error = find_encode(encode);
  if (error != cudaSuccess) return error;
  const cuuint64_t width = static_cast<cuuint64_t>(a.across) * W6A8_TILE_COLUMNS;
  const cuuint64_t sizes[2] = {width, static_cast<cuuint64_t>(a.tokens)};
  const cuuint64_t strides[1] = {width};
  const cuuint32_t box[2] = {W6A8_TILE_COLUMNS, static_cast<cuuint32_t>(box_tokens)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t *>(a.inputs), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class S>
cudaError_t launch(const W6A8Linear &a, cudaStream_t stream) {
  const auto kernel = hopper_kernel<S>;
  cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  CUtensorMap map;
  if (error == cudaSuccess) error = map_inputs(a, S::kTokens, map);
  if (error != cudaSuccess) return error;
  const int64_t blocks = ((a.down + S::kTiles - 1) / S::kTiles) *
                         ((a.tokens + S::kTokens - 1) / S::kTokens) * a.splits;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < a.at_once ? blocks : a.at_once));
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, a, map);
}

constexpr Inputs kOfTokens = Inputs::kOfTokens, kOfGroups = Inputs::kOfGroups;

// Few and short runs, and inputs with a scale for each group, are rare: two sizes of
// blocks do for them.
template <int kTokens>
cudaError_t launch_any(const W6A8Linear &a, cudaStream_t stream) {
  if (a.input_groups > 1 || a.sums != nullptr) {
    if (a.run == 128) return launch<HopperShape<kTokens, 1, 128, kOfGroups>>(a, stream);
    return launch<HopperShape<kTokens, 1, 32, kOfGroups>>(a, stream);
  }
  if (a.weight_groups == 1) return launch<HopperShape<kTokens, 1, 0, kOfTokens>>(a, stream);
  if (a.run == 128) return launch<HopperShape<kTokens, 1, 128, kOfTokens>>(a, stream);
  return launch<HopperShape<kTokens, 1, 32, kOfTokens>>(a, stream);
}

template <int kTokens, int kDown>
cudaError_t launch_usual(const W6A8Linear &a, cudaStream_t stream) {
  if (a.input_groups > 1 || a.sums != nullptr) return cudaErrorInvalidValue;
  if (a.weight_groups == 1)
    return launch<HopperShape<kTokens, kDown, 0, kOfTokens>>(a, stream);
  if (a.run != 128) return cudaErrorInvalidValue;
  return launch<HopperShape<kTokens, kDown, 128, kOfTokens>>(a, stream);
}

}  // namespace

extern "C" int w6a8_linear_hopper(const W6A8Linear *arguments, void *stream) {
  const W6A8Linear &a = *arguments;
  if (a.run != 128 && a.run != 32) return cudaErrorInvalidValue;
  const cudaError_t error = cudaSetDevice(a.device);
  if (error != cudaSuccess) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a.token_tile * 4 + a.panels) {
    case 16 * 4 + 1: return launch_any<16>(a, on);
    case 32 * 4 + 1: return launch_usual<32, 1>(a, on);
    case 64 * 4 + 1: return launch_any<64>(a, on);
    case 128 * 4 + 2: return launch_usual<128, 2>(a, on);
    case 128 * 4 + 3:
      if (a.weight_groups == 1 || a.input_groups > 1 || a.sums || a.run != 128)
        return cudaErrorInvalidValue;
      return launch<HopperShape<128, 3, 128, kOfTokens>>(a, on);
    case 256 * 4 + 2:
      if (a.weight_groups > 1 || a.input_groups > 1 || a.sums) return cudaErrorInvalidValue;
      return launch<HopperShape<256, 2, 0, kOfTokens>>(a, on);
    default: return cudaErrorInvalidValue;
  }
}
