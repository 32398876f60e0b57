// A row or column of an N x N matrix held by SPLIT neighbouring lanes of a warp, and products with vectors.
//
// Lane `share` of the SPLIT holds the groups of four elements share, share + SPLIT, ..: lanes that read a vector in
// shared memory then read neighbouring groups, which lie in different banks.
#pragma once

#include "common/device.cuh"

namespace rwkvpeft {

template <int N, int SPLIT>
struct Piece {
  static constexpr int GROUPS = N / SPLIT / 4;
  float of[GROUPS][4];

  static __device__ __forceinline__ int place(int group, int share) { return (group * SPLIT + share) * 4; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
#pragma unroll
      for (int e = 0; e < 4; ++e) of[g][e] = 0.f;
  }

  // From N consecutive floats, aligned to 16 bytes; no `from` means zeros.
  __device__ __forceinline__ void load_row(const float* from, int share) {
    if (from == nullptr) return clear();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const float4 four = *reinterpret_cast<const float4*>(from + place(g, share));
      of[g][0] = four.x, of[g][1] = four.y, of[g][2] = four.z, of[g][3] = four.w;
    }
  }

  __device__ __forceinline__ void store_row(float* to, int share) const {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
      *reinterpret_cast<float4*>(to + place(g, share)) = make_float4(of[g][0], of[g][1], of[g][2], of[g][3]);
  }

  // From a column of an N x N matrix, `from` its first element; none means zeros.
  __device__ __forceinline__ void load_column(const float* from, int share) {
    if (from == nullptr) return clear();
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
#pragma unroll
      for (int e = 0; e < 4; ++e) of[g][e] = from[(place(g, share) + e) * N];
  }

  // Each thread of the block its own values, so that neighbours write neighbouring floats.
  __device__ __forceinline__ void store_own(float* to, int thread, int threads) const {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
#pragma unroll
      for (int e = 0; e < 4; ++e) to[(g * 4 + e) * threads + thread] = of[g][e];
  }

  __device__ __forceinline__ void load_own(const float* from, int thread, int threads) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
#pragma unroll
      for (int e = 0; e < 4; ++e) of[g][e] = from[(g * 4 + e) * threads + thread];
  }
};

// The sum over the SPLIT lanes of a row or column; all of them get it. SPLIT is a power of two.
template <int SPLIT>
__device__ __forceinline__ float over_shares(float x) {
#pragma unroll
  for (int mask = SPLIT / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

// Four running sums, so that additions need not wait for each other.
struct Sum {
  float of[4] = {0.f, 0.f, 0.f, 0.f};

  template <int SPLIT>
  __device__ __forceinline__ float total() const {
    return over_shares<SPLIT>((of[0] + of[1]) + (of[2] + of[3]));
  }
};

__device__ __forceinline__ float element(const float4& four, int e) {
  return e == 0 ? four.x : e == 1 ? four.y : e == 2 ? four.z : four.w;
}

// Elements of a vector in shared memory that belong to a lane's group.
__device__ __forceinline__ float4 four_of(const float* vector, int place) {
  return *reinterpret_cast<const float4*>(vector + place);
}

// Copies `count` tokens of one head of a contiguous (tokens, H, N) tensor into shared memory as floats.
template <int N, int THREADS, typename T>
__device__ __forceinline__ void load_tokens(float* shared, const T* first, int64_t stride, int count) {
  for (int i = threadIdx.x; i < count * N; i += THREADS) shared[i] = as_float(first[i / N * stride + i % N]);
}

}  // namespace rwkvpeft
