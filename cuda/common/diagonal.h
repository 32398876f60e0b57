// wkv5 and wkv6 token by token: what the kernels in diagonal.cuh are given. Letters: B batch, T tokens, H heads, N head
// size.
//
// Tensors are contiguous; tokens are (B, T, H, N) of one element type, u is (H, N) floats, states are (B, H, N, N)
// floats, rows being value channels. w is (B, T, H, N) of the element type for wkv6, (H, N) floats for wkv5; the decay
// is exp(-exp(w)). A pointer may be null where it says so.
#pragma once

#include <cstdint>

#include "common/device.cuh"

namespace rwkvpeft {

struct DiagonalForward {
  const void *r, *w, *k, *v;
  const float* u;
  const float* state;  // null: zeros
  void* y;
  float* final_state;
  float* checkpoints;  // (B, H, ceil(T / DIAGONAL_SEGMENT), N, N), the state before each segment; null: keep nothing
  int64_t batch, tokens, heads;
};

struct DiagonalBackward {
  const void *r, *w, *k, *v;
  const float *u, *checkpoints;
  const void* dy;             // null: zeros
  const float* dfinal_state;  // null: zeros
  void *dr, *dw, *dk, *dv;    // dw is (B, H, N) floats for wkv5
  float* du;                  // (B, H, N); null, as dr to dv: only the state's gradient is wanted
  float* scratch;             // (B, H, DIAGONAL_SCRATCH, N, N), null with du
  float* dstate;              // null: not wanted
  int64_t batch, tokens, heads;
};

constexpr int DIAGONAL_SEGMENT = 16;
constexpr int DIAGONAL_GROUP = 4;  // tokens whose states fit into registers
constexpr int DIAGONAL_SCRATCH = DIAGONAL_SEGMENT / DIAGONAL_GROUP - 1;

cudaError_t wkv5_forward(const DiagonalForward& call, Element element, int head_size, cudaStream_t stream);
cudaError_t wkv5_backward(const DiagonalBackward& call, Element element, int head_size, cudaStream_t stream);
cudaError_t wkv6_forward(const DiagonalForward& call, Element element, int head_size, cudaStream_t stream);
cudaError_t wkv6_backward(const DiagonalBackward& call, Element element, int head_size, cudaStream_t stream);

}  // namespace rwkvpeft
