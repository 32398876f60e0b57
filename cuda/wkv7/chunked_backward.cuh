// wkv7 backward over chunks of 16 tokens on tensor cores; the forward's formulas are in chunked_tiles.cuh.
//
// With G the gradient of the state after the chunk times e^(c_L - g), S the saved state and O = [dY; dX]:
//
//     dU = Q_b G' + A_rb' dY          dX = M' dU            dV = Q_k G' + A_k' O
//     dA = mask(O Z')
//     dP = dA Q + O S                 dQ = dA' P + Z G
//     gradient of the state before it = (G + O' P) e^g
//     d log decay_t = colsum(S * G) + sum_s (Q * Z G)_s + sum_(s >= t) (P * dP - Q * dQ)_s - (P_a * dP_a)_t
//
// where the sums over s add the two halves of P and Q. The last line takes the rounded P and Q that the products took,
// so that what cancels on paper cancels here. A, M and U are made again from the inputs and S.
//
// Products with the state's gradient belong to warps by value channel, as in the forward; dP and dQ, which sum over
// value channels, by key channel.
//
// Counted, not measured, for N = 64 and one chunk of one head: 128 threads; 496 products of 16x8x16 (2.0 MFLOP), of
// which each warp does 124; 22 KB read, 12 KB written; 5 barriers of the block.
#pragma once

#include "wkv7/chunked_tiles.cuh"

namespace rwkvpeft {
namespace wkv7_chunked {

// 49 KB for N = 64, so that two blocks fit on a multiprocessor with 100 KB.
template <int N>
struct BackwardMemory {
  union {
    alignas(16) Bf16 raw[4][Sizes<N>::RAW];             // r, k, a, b as they come, until P and Q are made
    alignas(16) Bf16 dstate[N * Sizes<N>::STRIDE];      // then G
  };
  alignas(16) Bf16 z[2 * Sizes<N>::TILE];  // V; below it the logits of the decay as they come, then U
  alignas(16) Bf16 o[2 * Sizes<N>::TILE];  // dY and, below it, dX
  alignas(16) Bf16 p[2 * Sizes<N>::TILE];
  alignas(16) Bf16 q[2 * Sizes<N>::TILE];
  alignas(16) Bf16 state[N * Sizes<N>::STRIDE];
  alignas(16) Bf16 logits[Sizes<N>::RAW];
  alignas(16) Bf16 square[2 * CHUNK * SQUARE_STRIDE];  // A, then dA
  union {
    struct {
      alignas(16) Bf16 inverse[2 * CHUNK * INVERSE_STRIDE];
      alignas(16) float solve[CHUNK * SOLVE_STRIDE];
    };
    alignas(16) Bf16 stage[Sizes<N>::WARPS][CHUNK * CHUNK];  // once M is used up
  };
  alignas(16) float exponents[(CHUNK + 1) * N];
  alignas(16) float enter[N];
  alignas(16) float leave[N];
  alignas(16) float both[Sizes<N>::WARPS][N];  // each warp's share of colsum(S * G)
};
static_assert(sizeof(BackwardMemory<64>) <= 49 * 1024, "two blocks fit beside each other");

// Starts copying a chunk to where nothing of the chunk after it is needed any more once its dA is made.
template <int N>
__device__ __forceinline__ void start_chunk(BackwardMemory<N>& memory, const Wkv7ChunkedBackward& call,
                                            const Walk<N>& walk, int chunk) {
  constexpr int STRIDE = Sizes<N>::STRIDE;
  const Window window = walk.window(chunk);
  start_copy<N, N>(memory.raw[0], call.r, window);
  start_copy<N, N>(memory.raw[1], call.k, window);
  start_copy<N, N>(memory.raw[2], call.a, window);
  start_copy<N, N>(memory.raw[3], call.b, window);
  start_copy<N, N>(memory.z + CHUNK * STRIDE, call.w, window);
  start_copy<N, STRIDE>(memory.z, call.v, window);
  start_copy<N, STRIDE>(memory.o, call.dy, window);
  const Bf16* saved = static_cast<const Bf16*>(call.saved) + walk.saved(chunk);
#pragma unroll
  for (int piece = threadIdx.x; piece < N * N / 8; piece += Sizes<N>::THREADS) {  // a row of an 8x8 block
    const int tile = piece / 8, row = tile / (N / 8) * 8 + piece % 8, column = tile % (N / 8) * 8;
    device::copy_16_bytes(memory.state + row * STRIDE + column, saved + piece * 8);
  }
}

// Adds the half of 2 KEEP values that lane ^ mask keeps to that lane's, and its own half to this lane's.
template <int KEEP, int COUNT>
__device__ __forceinline__ void fold(float (&values)[COUNT], int mask) {
  const bool upper = (lane_id() & mask) != 0;
#pragma unroll
  for (int i = 0; i < KEEP; ++i) {
    const float sent = upper ? values[i] : values[i + KEEP];
    const float kept = upper ? values[i + KEEP] : values[i];
    values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, mask);
  }
}

// Sums `values`, one for each of the columns 8 n + 2 q + e that this lane holds at [2 n + e], over the eight lanes that
// hold the same columns, and writes the sums to `to` by column.
template <int N>
__device__ __forceinline__ void sum_columns(float* to, float (&values)[N / 4]) {
  fold<N / 8>(values, 16);
  fold<N / 16>(values, 8);
  fold<N / 32>(values, 4);
  const int lane = lane_id(), group = ((lane >> 4) & 1) * 4 + ((lane >> 3) & 1) * 2 + ((lane >> 2) & 1);
#pragma unroll
  for (int i = 0; i < N / 32; ++i) {
    to[(group * (N / 64) + i / 2) * 8 + (lane & 3) * 2 + (i & 1)] = values[i];
  }
}

// S * G of one 16x16 piece, summed over the rows this lane holds.
__device__ __forceinline__ void multiply_columns(float* sums, const Block& state, const Accumulator& dstate) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint32_t upper = state.words[2 * n], lower = state.words[2 * n + 1];
    sums[2 * n] = low_half(upper) * dstate.of[n][0] + low_half(lower) * dstate.of[n][2];
    sums[2 * n + 1] = high_half(upper) * dstate.of[n][1] + high_half(lower) * dstate.of[n][3];
  }
}

// Element by element, an operand as the products took it times its gradient.
template <int STRIDE>
__device__ __forceinline__ Accumulator times_operand(const Bf16* operand, const Accumulator& gradient) {
  const int row = lane_id() >> 2, column = (lane_id() & 3) * 2;
  Accumulator product;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int down = (i & 1) * 8, n = i >> 1;
    const uint32_t word = *reinterpret_cast<const uint32_t*>(operand + (row + down) * STRIDE + n * 8 + column);
    product.of[n][(i & 1) * 2] = low_half(word) * gradient.of[n][(i & 1) * 2];
    product.of[n][(i & 1) * 2 + 1] = high_half(word) * gradient.of[n][(i & 1) * 2 + 1];
  }
  return product;
}

__device__ __forceinline__ void add(Accumulator& sum, const Accumulator& other, float sign) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.of[i >> 2][i & 3] = fmaf(sign, other.of[i >> 2][i & 3], sum.of[i >> 2][i & 3]);
}

// Sums over the rows at and after each row; a row is a token.
__device__ __forceinline__ void sum_from_end(Accumulator& rows) {
  const int group = lane_id() >> 2;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& value = rows.of[n][e];
#pragma unroll
      for (int step = 1; step < 8; step *= 2) {
        const float other = __shfl_down_sync(0xffffffffu, value, 4 * step);
        if (group + step < 8) value += other;
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {  // rows 8 .. 15 come after rows 0 .. 7
      rows.of[n][e] += __shfl_sync(0xffffffffu, rows.of[n][e + 2], lane_id() & 3);
    }
  }
}

// Sums over all rows, at every row.
__device__ __forceinline__ void sum_rows(Accumulator& rows) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = rows.of[n][e] + rows.of[n][e + 2];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) total += __shfl_xor_sync(0xffffffffu, total, mask);
      rows.of[n][e] = rows.of[n][e + 2] = total;
    }
  }
}

// Writes a warp's (tokens, keys) block of a gradient, times e^(sign * exponents) unless sign is 0.
template <int N>
__device__ __forceinline__ void send_gradient(void* tensor, Accumulator gradient, const float* exponents, float sign,
                                              Bf16* stage, const Window& window, int channel) {
  const int row = lane_id() >> 2, column = (lane_id() & 3) * 2;
  if (sign != 0.f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int down = (i & 1) * 8, n = i >> 1;
      const float2 two = *reinterpret_cast<const float2*>(exponents + (row + down) * N + channel + n * 8 + column);
      gradient.of[n][(i & 1) * 2] *= device::exp2_of(sign * two.x);
      gradient.of[n][(i & 1) * 2 + 1] *= device::exp2_of(sign * two.y);
    }
  }
  store<CHUNK>(stage, rounded(gradient));
  send_staged<N, CHUNK>(tensor, stage, window, channel);
}

// Turns a (tokens, keys) block of the gradient of the log decay into that of its logit.
template <int N>
__device__ __forceinline__ void to_logit(Accumulator& gradient, const Bf16* logits) {
  const int row = lane_id() >> 2, column = (lane_id() & 3) * 2;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const Bf16 logit = logits[(row + ((i >> 1) & 1) * 8) * N + (i >> 2) * 8 + column + (i & 1)];
    const float opening = gate(logit), closing = device::reciprocal(1.f + device::exp2_of(LOG2_E * to_float(logit)));
    gradient.of[i >> 2][i & 3] *= STRONGEST * opening * closing;
  }
}

template <int N>
__global__ void __launch_bounds__(Sizes<N>::THREADS, N > 64 ? 1 : 3) backward_kernel(const Wkv7ChunkedBackward call) {
#if RWKVPEFT_HAS_BF16_PRODUCTS
  constexpr int STRIDE = Sizes<N>::STRIDE, LOWER = CHUNK * STRIDE, TILES = N / 16;
  constexpr int A_ROWS = CHUNK * SQUARE_STRIDE;
  BackwardMemory<N>& memory = *dynamic_shared<BackwardMemory<N>>();
  const int warp = threadIdx.x / 32, mine = warp * 16;  // the warp's first channel, of values and of keys
  const Walk<N> walk(call.rows);
  const int64_t own_state = (static_cast<int64_t>(blockIdx.x) * N + mine) * N;

  if (walk.chunks > 0) start_chunk<N>(memory, call, walk, walk.chunks - 1);
  Accumulator dstate[TILES];
  load_state<N>(dstate, call.dfinal_state == nullptr ? nullptr : call.dfinal_state + own_state);

  for (int chunk = walk.chunks - 1; chunk >= 0; --chunk) {
    const Window window = walk.window(chunk);
    device::wait_for_copies();
    __syncthreads();  // the chunk is here; no warp reads the last one any more
    make_operands<N, true>(memory.p, memory.q, memory.enter, memory.leave, memory.exponents, memory.logits,
                           memory.raw[0], memory.z + LOWER, memory.raw[1], memory.raw[2], memory.raw[3],
                           window.tokens);
    __syncthreads();  // P and Q are made, and the raw operands used up

    make_transition<N>(memory.square, memory.inverse, memory.solve, memory.p, memory.q, chunk);
    Accumulator x = zeros(), dv = zeros(), du = zeros();  // (values, tokens)
    float both[N / 4];
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      scale(dstate[j], memory.leave + 16 * j);
      const Block keys = left<STRIDE>(memory.state + mine * STRIDE + 16 * j), dkeys = rounded(dstate[j]);
      store<STRIDE>(memory.dstate + mine * STRIDE + 16 * j, dkeys);
      multiply_columns(both + 4 * j, keys, dstate[j]);
      add_product(x, keys, right_of_transposed<STRIDE>(memory.p + LOWER + 16 * j));
      add_product(dv, dkeys, right_of_transposed<STRIDE>(memory.q + 16 * j));
      add_product(du, dkeys, right_of_transposed<STRIDE>(memory.q + LOWER + 16 * j));
    }
    sum_columns<N>(memory.both[warp], both);
    __syncthreads();  // A and M are made

    Block dv_rounded;
    {
      const Block v = left_of_transposed<STRIDE>(memory.z + mine), dy = left_of_transposed<STRIDE>(memory.o + mine);
      add_product(x, v, right_of_transposed<SQUARE_STRIDE>(memory.square + A_ROWS));
      store_transposed<STRIDE>(memory.z + LOWER + mine, rounded(times_inverse<true>(x, memory.inverse)));
      add_product(du, dy, right<SQUARE_STRIDE>(memory.square + CHUNK));
      const Block dx = rounded(times_inverse<false>(du, memory.inverse));
      store_transposed<STRIDE>(memory.o + LOWER + mine, dx);
      add_product(dv, dy, right<SQUARE_STRIDE>(memory.square));
      add_product(dv, dx, right<SQUARE_STRIDE>(memory.square + A_ROWS));
      dv_rounded = rounded(dv);
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        add_product(dstate[j], dy, right<STRIDE>(memory.p + 16 * j));
        add_product(dstate[j], dx, right<STRIDE>(memory.p + LOWER + 16 * j));
        scale(dstate[j], memory.enter + 16 * j);
      }
    }
    __syncthreads();  // Z, O and G are made, and A is used up
    if (call.dr == nullptr) {  // only the state's gradient is wanted
      if (chunk > 0) start_chunk<N>(memory, call, walk, chunk - 1);
      continue;
    }

    for (int quadrant = warp; quadrant < 4; quadrant += Sizes<N>::WARPS) {
      Accumulator sum = zeros();
#pragma unroll
      for (int i = 0; i < N; i += 16) {
        add_product(sum, left<STRIDE>(memory.o + (quadrant >> 1) * LOWER + i),
                    right_of_transposed<STRIDE>(memory.z + (quadrant & 1) * LOWER + i));
      }
      store_quadrant(memory.square, quadrant, sum);
    }
    Accumulator dr = zeros(), da = zeros(), dk = zeros(), db = zeros();  // (tokens, keys)
#pragma unroll
    for (int i = 0; i < N; i += 16) {
      const Block keys = right<STRIDE>(memory.state + i * STRIDE + mine);
      add_product(dr, left<STRIDE>(memory.o + i), keys);
      add_product(da, left<STRIDE>(memory.o + LOWER + i), keys);
      const Block dkeys = right<STRIDE>(memory.dstate + i * STRIDE + mine);
      add_product(dk, left<STRIDE>(memory.z + i), dkeys);
      add_product(db, left<STRIDE>(memory.z + LOWER + i), dkeys);
    }
    __syncthreads();  // dA is made; Z, O, S and G are used up
    if (chunk > 0) start_chunk<N>(memory, call, walk, chunk - 1);

    Accumulator all = times_operand<STRIDE>(memory.q + mine, dk);
    add(all, times_operand<STRIDE>(memory.q + LOWER + mine, db), 1.f);
    sum_rows(all);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // what the tokens' k, then b, have to do with it
      const Block q = right<STRIDE>(memory.q + half * LOWER + mine);
      add_product(dr, left<SQUARE_STRIDE>(memory.square + half * CHUNK), q);
      add_product(da, left<SQUARE_STRIDE>(memory.square + A_ROWS + half * CHUNK), q);
      const Block p = right<STRIDE>(memory.p + half * LOWER + mine);
      add_product(dk, left_of_transposed<SQUARE_STRIDE>(memory.square + half * A_ROWS), p);
      add_product(db, left_of_transposed<SQUARE_STRIDE>(memory.square + half * A_ROWS + CHUNK), p);
    }
    const Accumulator of_a = times_operand<STRIDE>(memory.p + LOWER + mine, da);
    Accumulator decay = of_a;
    add(decay, times_operand<STRIDE>(memory.p + mine, dr), 1.f);
    add(decay, times_operand<STRIDE>(memory.q + mine, dk), -1.f);
    add(decay, times_operand<STRIDE>(memory.q + LOWER + mine, db), -1.f);
    sum_from_end(decay);
    add(decay, of_a, -1.f);
    add(decay, all, 1.f);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = mine + (i >> 1) * 8 + (lane_id() & 3) * 2 + (i & 1);
      float total = 0.f;
#pragma unroll
      for (int other = 0; other < Sizes<N>::WARPS; ++other) total += memory.both[other][channel];
      decay.of[i >> 1][i & 1] += total;
      decay.of[i >> 1][(i & 1) + 2] += total;
    }
    to_logit<N>(decay, memory.logits + mine);
    Bf16* stage = memory.stage[warp];
    store_transposed<CHUNK>(stage, dv_rounded);
    send_staged<N, CHUNK>(call.dv, stage, window, mine);
    send_gradient<N>(call.dw, decay, nullptr, 0.f, stage, window, mine);
    send_gradient<N>(call.dr, dr, memory.exponents + N, 1.f, stage, window, mine);
    send_gradient<N>(call.da, da, memory.exponents, 1.f, stage, window, mine);
    send_gradient<N>(call.dk, dk, memory.exponents + N, -1.f, stage, window, mine);
    send_gradient<N>(call.db, db, memory.exponents + N, -1.f, stage, window, mine);
  }
  if (call.dstate != nullptr) store_state<N>(call.dstate + own_state, dstate);
#endif
}

}  // namespace wkv7_chunked
}  // namespace rwkvpeft
