// Launchers of the kernels, behind the C interface of w6a8.h.
#include "w6a8_linear.cuh"
#include "w6a8_quantize.cuh"

namespace {

template <int kTokens, int kRun, Mode kMode>
cudaError_t launch(const W6A8Linear &a, cudaStream_t stream) {
  using S = Shape<kTokens, kRun, kMode>;
  const auto kernel = linear_kernel<kTokens, kRun, kMode>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((a.tokens + kTokens - 1) / kTokens),
                  (a.down + S::kDown - 1) / S::kDown, a.splits);
  kernel<<<grid, kLinearThreads, S::kBytes, stream>>>(a);
  return cudaGetLastError();
}

template <int kTokens, int kRun>
cudaError_t launch(const W6A8Linear &a, cudaStream_t stream) {
  if (a.sums != nullptr) return launch<kTokens, kRun, kShowing>(a, stream);
  if (a.input_groups == 1) return launch<kTokens, kRun, kOfTokens>(a, stream);
  return launch<kTokens, kRun, kOfGroups>(a, stream);
}

template <int kTokens>
cudaError_t launch(const W6A8Linear &a, cudaStream_t stream) {
  switch (a.run) {
    case 32: return launch<kTokens, 32>(a, stream);
    case 64: return launch<kTokens, 64>(a, stream);
    case 128: return launch<kTokens, 128>(a, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t launch(const W6A8Quantize &a, cudaStream_t stream) {
  constexpr int kWarps = kQuantizeThreads / 32;
  const bool of_rows = a.group == a.values.columns;
  const int64_t groups = a.rows * (a.values.columns / a.group);
  const int64_t blocks = of_rows ? a.rows : (groups + kWarps - 1) / kWarps;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kQuantizeThreads);
  config.dynamicSmemBytes = of_rows ? 2 * kWarps * sizeof(uint32_t) : 0;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = a.overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, of_rows ? quantize_rows<T> : quantize_groups<T>, a);
}

}  // namespace

extern "C" {

int w6a8_abi(void) { return W6A8_ABI; }

const char *w6a8_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

int w6a8_probe(int device) {
  cudaError_t error = cudaSetDevice(device);
  cudaFuncAttributes found;
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&found, linear_kernel<8, 128, kOfTokens>);
  return error;
}

int w6a8_rows_of_block(int token_tile) {
  return token_tile <= 16 ? Shape<16, 128, kOfTokens>::kRows : Shape<64, 128, kOfTokens>::kRows;
}

int w6a8_quantize(const W6A8Quantize *arguments, void *stream) {
  const W6A8Quantize &a = *arguments;
  cudaError_t error = cudaSetDevice(a.device);
  if (error != cudaSuccess) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a.values.dtype) {
    case W6A8_FLOAT32: return launch<Float32>(a, on);
    case W6A8_FLOAT16: return launch<Float16>(a, on);
    case W6A8_BFLOAT16: return launch<BFloat16>(a, on);
    default: return cudaErrorInvalidValue;
  }
}

int w6a8_linear(const W6A8Linear *arguments, void *stream) {
  const W6A8Linear &a = *arguments;
  cudaError_t error = cudaSetDevice(a.device);
  if (error != cudaSuccess) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (a.token_tile) {
    case 8: return launch<8>(a, on);
    case 16: return launch<16>(a, on);
    case 32: return launch<32>(a, on);
    case 64: return launch<64>(a, on);
    default: return cudaErrorInvalidValue;
  }
}

}  // extern "C"
