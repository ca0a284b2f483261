// The C interface of the W6A8 kernels, and the arithmetic that they share.
//
// Nothing here knows torch or Python. Functions return a cudaError_t as an int; all
// pointers but `stream` are of the device that is named.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define W6A8_BOTH __host__ __device__ __forceinline__
#else
#define W6A8_BOTH static inline
#endif

// Counted up when anything below changes; the Python side refuses another number.
#define W6A8_ABI 3

enum { W6A8_FLOAT32 = 0, W6A8_FLOAT16 = 1, W6A8_BFLOAT16 = 2 };
enum { W6A8_TILE_ROWS = 16, W6A8_TILE_COLUMNS = 128, W6A8_TILE_BYTES = 1536 };
enum { W6A8_PANEL = 4 };  // tiles below each other that lie together

// Sums start here: as a float it is 1.5 * 2^23, so that its last bit counts ones.
#define W6A8_SUM_START 0x4B400000
#define W6A8_SUM_START_AS_FLOAT 12582912.0f

// Which values are rounded; each step's result has the type of the inputs.
enum {
  W6A8_PLAIN = 0,          // x
  W6A8_NORM = 1,           // norm * (x / sqrt(mean(x^2) + epsilon))
  W6A8_NORM_PLUS_ONE = 2,  // x / sqrt(mean(x^2) + epsilon) * (1 + norm), rounded once
  W6A8_GATED = 3           // silu(x) * u, where a row holds all x and then all u
};

struct W6A8Values {
  const void *inputs;  // [rows, columns], gated: [rows, 2 columns], of type `dtype`
  const void *norm;    // [columns] of type `dtype`
  float epsilon;
  int32_t kind, columns, dtype;
};

struct W6A8Quantize {
  struct W6A8Values values;
  int8_t *codes;      // [rows, padded]; columns up to `padded` become zeros
  float *scales;      // [rows, columns / group]
  uint32_t *tickets;  // set to zero for the linear layer that follows, or null
  int64_t rows;
  int32_t padded, group, ticket_count, device;
  int32_t overlaps;   // begin beside the kernel before; Hopper and later
};

struct W6A8Linear {
  const int8_t *inputs;       // [tokens, 128 * across]
  const float *input_scales;  // [tokens, input_groups]
  const uint8_t *tiles;       // [down / 4, across, 4, 1536]
  const void *weight_scales;  // [weight_groups, 16 * down] of type `scale_dtype`
  const void *bias;           // [rows] of type `output_dtype`, or null
  void *outputs;              // [tokens, rows] of type `output_dtype`
  float *partial;             // what splits leave for each other; null with one split
  uint32_t *tickets;          // zeros, one for each block of the result; likewise
  int32_t *sums;              // [tokens, across * 128 / run, rows] or null; one input
                              // group only
  int64_t tokens;
  int32_t rows, down, across;
  int32_t run;                // columns after which a scale may change: 32, 64, 128
  int32_t weight_groups, weight_scale_shift;  // 2^shift runs share a scale; 31: all
  int32_t input_groups, input_scale_shift;    // one group: a scale for each token
  int32_t scale_dtype, output_dtype;
  int32_t token_tile;         // 8, 16, 32 or 64; on Hopper 16 to 256
  int32_t splits;             // of the columns, for more blocks than rows give
  int32_t panels, at_once;    // of 64 rows in a block; blocks at once; on Hopper only
  int32_t tiles_of_block;     // of rows: 1, 2 or 4; few only
  int32_t depth;              // steps that a warp copies ahead: 3, 6 or 12; few only
  int32_t overlaps;           // begin beside the kernel before; few only
  int32_t device;
};

// Registers of a lane for one step of 32 columns; see runtime/w6a8/tiles.py.
W6A8_BOTH void w6a8_unpack(uint32_t first, uint32_t second, uint32_t pairs,
                           uint32_t (&a)[4]) {
  const uint32_t high = 0xF0F0F0F0u, low = 0x0C0C0C0Cu;
  a[0] = (first & high) | ((pairs << 2) & low);
  a[1] = ((first << 4) & high) | (pairs & low);
  a[2] = (second & high) | ((pairs >> 2) & low);
  a[3] = ((second << 4) & high) | ((pairs >> 4) & low);
}

// Where 16 bytes of a token lie in a [tokens][128] tile, so that eight tokens' are in
// eight different groups of banks.
W6A8_BOTH int w6a8_swizzled(int token, int chunk) {
  return token * W6A8_TILE_COLUMNS + ((chunk ^ (token & 7)) << 4);
}

// Which block of the result a warp's accumulator `i` of a lane belongs to.
W6A8_BOTH int w6a8_result_row(int lane, int i) { return (lane >> 2) + ((i >> 1) << 3); }
W6A8_BOTH int w6a8_result_token(int lane, int i) { return ((lane & 3) << 1) + (i & 1); }

#ifdef __cplusplus
extern "C" {
#endif
int w6a8_abi(void);
const char *w6a8_error(int code);
int w6a8_probe(int device);  // whether driver and device take these kernels
int w6a8_rows_of_block(int token_tile);
int w6a8_quantize(const struct W6A8Quantize *arguments, void *stream);
int w6a8_linear(const struct W6A8Linear *arguments, void *stream);
int w6a8_linear_hopper(const struct W6A8Linear *arguments, void *stream);
int w6a8_linear_few(const struct W6A8Linear *arguments, void *stream);
#ifdef __cplusplus
}
#endif
