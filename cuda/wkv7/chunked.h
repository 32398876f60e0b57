// wkv7 over chunks on tensor cores: what the kernels in chunked_forward.cuh and chunked_backward.cuh are given.
//
// Tensors are contiguous and aligned to 16 bytes; those of tokens are (rows, H, 64) of bf16, states (sequences, H, 64,
// 64) floats, rows of a state being value channels. A pointer may be null where it says so.
#pragma once

#include <cstdint>

#include "common/device.cuh"

namespace rwkvpeft {

constexpr int WKV7_CHUNK = 16;
constexpr int WKV7_CHUNKED_HEAD = 64;

// How sequences lie in the rows of tokens: each has T rows, or they are packed one behind another, T being all rows.
struct Wkv7Rows {
  const int32_t* chunks;  // packed: (chunks of all sequences, 3): sequence, first row, tokens; null: not packed
  const int32_t* first;   // packed: (sequences + 1), the first chunk of each
  int64_t sequences, tokens, heads;
};

struct Wkv7ChunkedForward {
  const void *r, *w, *k, *v, *a, *b;  // w is the raw decay logit
  const float* state;                 // null: zeros
  void* y;
  float* final_state;
  void* saved;  // (chunks of all sequences, H, 64, 64) bf16 for the backward; null: keep nothing
  Wkv7Rows rows;
};

struct Wkv7ChunkedBackward {
  const void *r, *w, *k, *v, *a, *b;
  const void* saved;
  const void* dy;                     // null: zeros
  const float* dfinal_state;          // null: zeros
  void *dr, *dw, *dk, *dv, *da, *db;  // all null: only the state's gradient is wanted
  float* dstate;                      // null: not wanted
  Wkv7Rows rows;
};

cudaError_t wkv7_chunked_forward(const Wkv7ChunkedForward& call, cudaStream_t stream);
cudaError_t wkv7_chunked_backward(const Wkv7ChunkedBackward& call, cudaStream_t stream);

}  // namespace rwkvpeft
