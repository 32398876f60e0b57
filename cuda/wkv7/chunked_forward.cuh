// wkv7 forward over chunks of 16 tokens on tensor cores; the formulas are in chunked_tiles.cuh.
//
// Counted, not measured, for N = 64 and one chunk of one head: 128 threads; 208 products of 16x8x16 (0.85 MFLOP), of
// which each warp does 52; 12 KB read, 2 KB written and when training 8 KB more; 3 barriers of the block.
#pragma once

#include "wkv7/chunked_tiles.cuh"

namespace rwkvpeft {
namespace wkv7_chunked {

template <int N>
struct ForwardMemory {
  alignas(16) Bf16 raw[5][Sizes<N>::RAW];  // r, w, k, a, b as they come
  alignas(16) Bf16 v[2][Sizes<N>::TILE];
  alignas(16) Bf16 p[2 * Sizes<N>::TILE];
  alignas(16) Bf16 q[2 * Sizes<N>::TILE];
  alignas(16) Bf16 square[2 * CHUNK * SQUARE_STRIDE];
  alignas(16) Bf16 inverse[2 * CHUNK * INVERSE_STRIDE];
  alignas(16) Bf16 stage[Sizes<N>::WARPS][CHUNK * STAGE_STRIDE];
  alignas(16) float solve[CHUNK * SOLVE_STRIDE];
  alignas(16) float enter[N];
  alignas(16) float leave[N];
};

// Starts copying chunk `chunk`; its values go to the half of `v` that the chunk before does not use.
template <int N>
__device__ __forceinline__ void start_chunk(ForwardMemory<N>& memory, const Wkv7ChunkedForward& call,
                                            const Walk<N>& walk, int chunk) {
  const Window window = walk.window(chunk);
  start_copy<N, N>(memory.raw[0], call.r, window);
  start_copy<N, N>(memory.raw[1], call.w, window);
  start_copy<N, N>(memory.raw[2], call.k, window);
  start_copy<N, N>(memory.raw[3], call.a, window);
  start_copy<N, N>(memory.raw[4], call.b, window);
  start_copy<N, Sizes<N>::STRIDE>(memory.v[chunk & 1], call.v, window);
}

// Keeps a warp's 16x16 piece of a state, rows `row` and on, keys `column` and on, in 8x8 blocks of 128 bytes.
template <int N>
__device__ __forceinline__ void save_block(Bf16* saved, const Block& block, int row, int column) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int tile = (row / 8 + (i & 1)) * (N / 8) + column / 8 + (i >> 1);
    *reinterpret_cast<uint32_t*>(saved + tile * 64 + lane_id() * 2) = block.words[i];
  }
}

template <int N>
__global__ void __launch_bounds__(Sizes<N>::THREADS, N > 64 ? 1 : 4) forward_kernel(const Wkv7ChunkedForward call) {
#if RWKVPEFT_HAS_BF16_PRODUCTS
  constexpr int STRIDE = Sizes<N>::STRIDE, LOWER = CHUNK * STRIDE, TILES = N / 16;
  ForwardMemory<N>& memory = *dynamic_shared<ForwardMemory<N>>();
  const int warp = threadIdx.x / 32, mine = warp * 16;  // the warp's first value channel
  const Walk<N> walk(call.rows);
  Bf16* const saved = static_cast<Bf16*>(call.saved);
  const int64_t own_state = (static_cast<int64_t>(blockIdx.x) * N + mine) * N;

  if (walk.chunks > 0) start_chunk<N>(memory, call, walk, 0);
  Accumulator state[TILES];
  load_state<N>(state, call.state == nullptr ? nullptr : call.state + own_state);

  for (int chunk = 0; chunk < walk.chunks; ++chunk) {
    const Window window = walk.window(chunk);
    device::wait_for_copies();
    __syncthreads();  // the chunk is here; no warp reads the last one's P, Q, A or M any more
    make_operands<N, false>(memory.p, memory.q, memory.enter, memory.leave, nullptr, nullptr, memory.raw[0],
                            memory.raw[1], memory.raw[2], memory.raw[3], memory.raw[4], window.tokens);
    __syncthreads();  // P and Q are made, and the raw operands used up
    if (chunk + 1 < walk.chunks) start_chunk<N>(memory, call, walk, chunk + 1);

    make_transition<N>(memory.square, memory.inverse, memory.solve, memory.p, memory.q, chunk);
    Accumulator y = zeros(), x = zeros();  // (values, tokens): what r and a read of the state
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      scale(state[j], memory.enter + 16 * j);
      const Block keys = rounded(state[j]);
      if (saved != nullptr) save_block<N>(saved + walk.saved(chunk), keys, mine, 16 * j);
      add_product(y, keys, right_of_transposed<STRIDE>(memory.p + 16 * j));
      add_product(x, keys, right_of_transposed<STRIDE>(memory.p + LOWER + 16 * j));
    }
    __syncthreads();  // A and M are made

    const Block v = left_of_transposed<STRIDE>(memory.v[chunk & 1] + mine);
    add_product(x, v, right_of_transposed<SQUARE_STRIDE>(memory.square + CHUNK * SQUARE_STRIDE));
    const Block u = rounded(times_inverse<true>(x, memory.inverse));
    add_product(y, v, right_of_transposed<SQUARE_STRIDE>(memory.square));
    add_product(y, u, right_of_transposed<SQUARE_STRIDE>(memory.square + CHUNK));
    store_transposed<STAGE_STRIDE>(memory.stage[warp], rounded(y));
    send_staged<N, STAGE_STRIDE>(call.y, memory.stage[warp], window, mine);
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      add_product(state[j], v, right<STRIDE>(memory.q + 16 * j));
      add_product(state[j], u, right<STRIDE>(memory.q + LOWER + 16 * j));
      scale(state[j], memory.leave + 16 * j);
    }
  }
  store_state<N>(call.final_state + own_state, state);
#endif
}

}  // namespace wkv7_chunked
}  // namespace rwkvpeft
