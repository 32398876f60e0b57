// wkv7 token by token: what the kernels in sequential.cuh are given. Letters: B batch, T tokens, H heads, N head size.
//
// Tensors are contiguous; tokens are (B, T, H, N) of one element type, states (B, H, N, N) floats, rows being value
// channels. A pointer may be null where it says so.
#pragma once

#include <cstdint>

#include "common/device.cuh"

namespace rwkvpeft {

struct Wkv7Forward {
  const void *r, *w, *k, *v, *a, *b;  // w is the raw decay logit
  const float* state;                 // null: zeros
  void* y;
  float* final_state;
  float* checkpoints;  // (B, H, ceil(T / WKV7_SEGMENT), N, N), the state before each segment; null: keep nothing
  float* removed;      // (B, T, H, N), what each token's `a` read; null with `checkpoints`
  int64_t batch, tokens, heads;
};

struct Wkv7Backward {
  const void *r, *w, *k, *v, *a, *b;
  const float *checkpoints, *removed;
  const void* dy;             // null: zeros
  const float* dfinal_state;  // null: zeros
  void *dr, *dw, *dk, *dv, *da, *db;  // all null: only the state's gradient is wanted
  float* dstate;                      // null: not wanted
  int64_t batch, tokens, heads;
};

constexpr int WKV7_SEGMENT = 16;

cudaError_t wkv7_sequential_forward(const Wkv7Forward& call, Element element, int head_size, cudaStream_t stream);
cudaError_t wkv7_sequential_backward(const Wkv7Backward& call, Element element, int head_size, cudaStream_t stream);

}  // namespace rwkvpeft
