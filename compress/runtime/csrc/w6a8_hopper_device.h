// What the Hopper kernels need of the machine: barriers, bulk copies, warpgroup products.
//
// Everything that only sm_90a has and that is written in PTX is here.
#pragma once

#include <cuda.h>  // CUtensorMap; nothing of the driver is linked
#include <w6a8_device.h>

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes barriers visible to the copy engine.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the barrier wait for this many bytes of copies, too.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap *map, int column,
                                          int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Moves registers between warpgroups: this one has kCount for each thread from now on.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// The value of the first lane: the compiler knows that branches on it do not diverge.
__device__ __forceinline__ int same_in_warp(int value) {
  return __shfl_sync(0xFFFFFFFFu, value, 0);
}

// A barrier of `threads` threads, apart from the one of the block, which is 0.
template <int kBarrier>
__device__ __forceinline__ void meet(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from reading sums before the wait above.
template <int kCount>
__device__ __forceinline__ void stay_behind(int32_t (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}

// Says what the tensor cores find at a shared address: rows of 128 bytes, eight of them
// 1024 apart, swizzled as the copy engine does.
__device__ __forceinline__ uint64_t described(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFFu) >> 4) | 1ull << 16 | 64ull << 32 |
         1ull << 62;
}

__device__ __forceinline__ void store_16(uint32_t to, uint32_t a, uint32_t b, uint32_t c,
                                         uint32_t d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_4(uint32_t to, uint32_t a) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(a) : "memory");
}
__device__ __forceinline__ uint16_t load_2(uint32_t from) {
  uint16_t a;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(a) : "r"(from) : "memory");
  return a;
}
__device__ __forceinline__ uint32_t load_4(uint32_t from) {
  uint32_t a;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(a) : "r"(from) : "memory");
  return a;
}
__device__ __forceinline__ void load_16(uint32_t from, uint32_t &a, uint32_t &b, uint32_t &c,
                                        uint32_t &d) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(from)
               : "memory");
}

// Four 8 x 8 matrices of 16 bits, transposed; lane l gives the row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_transposed(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// c[64, n] (+)= a[64, 32] b[n, 32]^T of int8, over four warps: a from registers, as for
// mma.m16n8k32, b from shared memory. c is added to if `keep`.
template <int kTokens>
__device__ __forceinline__ void multiply(int32_t (&c)[kTokens / 2], const uint32_t (&a)[4],
                                         uint64_t b, int keep);

// clang-format off
#define W6A8_N8 "%0, %1, %2, %3"
#define W6A8_N16 W6A8_N8  \
  ", %4, %5, %6, %7"
#define W6A8_N32 W6A8_N16  \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define W6A8_N64 W6A8_N32  \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define W6A8_N128 W6A8_N64  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define W6A8_N256 W6A8_N128  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define W6A8_C4(i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define W6A8_C8(i) W6A8_C4(i), W6A8_C4(i + 4)
#define W6A8_C16(i) W6A8_C8(i), W6A8_C8(i + 8)
#define W6A8_C32(i) W6A8_C16(i), W6A8_C16(i + 16)
#define W6A8_C64(i) W6A8_C32(i), W6A8_C32(i + 32)
#define W6A8_C128(i) W6A8_C64(i), W6A8_C64(i + 64)

#define W6A8_MULTIPLY(n, count, a0, a1, a2, a3, where, kept)                              \
  template <>                                                                             \
  __device__ __forceinline__ void multiply<n>(int32_t (&c)[count], const uint32_t (&a)[4],\
                                              uint64_t b, int keep) {                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #kept ", 0;\n"                      \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k32.s32.s8.s8 {" W6A8_N##n       \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #where ", p;\n}"        \
                 : W6A8_C##count(0)                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));        \
  }
W6A8_MULTIPLY(8, 4, 4, 5, 6, 7, 8, 9)
W6A8_MULTIPLY(16, 8, 8, 9, 10, 11, 12, 13)
W6A8_MULTIPLY(32, 16, 16, 17, 18, 19, 20, 21)
W6A8_MULTIPLY(64, 32, 32, 33, 34, 35, 36, 37)
W6A8_MULTIPLY(128, 64, 64, 65, 66, 67, 68, 69)
W6A8_MULTIPLY(256, 128, 128, 129, 130, 131, 132, 133)
// clang-format on
