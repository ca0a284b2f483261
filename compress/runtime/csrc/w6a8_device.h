// What the kernels need of the machine: copies, tensor cores, number types.
//
// Everything written in PTX is here and only here; the tests put another file of this
// name in its place and run the kernels on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

__device__ __forceinline__ unsigned char *shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void copy_16(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(from)
               : "memory");
}

__device__ __forceinline__ void copy_16_or_zero(void *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_4_or_zero(void *to, const void *from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the last `kPending` groups of this thread's copies have arrived.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Lane l gives the row l % 8 of matrix l / 8 (16 bytes) and gets, of each matrix, bytes
// 4 (l % 4) to + 3 of row l / 4. With two matrices the upper lanes' rows do not count.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// c[16, 8] += a[16, 32] b[32, 8] of int8.
__device__ __forceinline__ void multiply_add(int32_t (&c)[4], const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Waits until the kernel before has ended, when this one began beside it.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin with what does not depend on this one.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ uint32_t largest_of_warp(uint32_t value) {
  return __reduce_max_sync(0xFFFFFFFFu, value);
}

__device__ __forceinline__ void meet_in_warp() { __syncwarp(); }

// The same bits in every lane.
__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) value += __shfl_xor_sync(0xFFFFFFFFu, value, i);
  return value;
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float divided(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float inverse_root(float a) { return rsqrtf(a); }
__device__ __forceinline__ float exponential(float a) { return expf(a); }
__device__ __forceinline__ int rounded(float a) { return __float2int_rn(a); }

__device__ __forceinline__ float from_half(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ float from_bfloat(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ uint16_t to_bfloat(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
