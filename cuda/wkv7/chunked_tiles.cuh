// What the chunked wkv7 kernels share: a chunk's operands, its 32x32 matrix of token against token, and its inverse.
//
// One block walks the chunks of one head of one sequence. With L = 16 tokens to a chunk, c_t the sum of the chunk's log
// decays up to and including token t, and g = c at the chunk's middle (c_7), a chunk has the operands
//
//     P = [r e^(c_t - g); a e^(c_(t-1) - g)]      Q = [k e^(g - c_t); b e^(g - c_t)]      (2L rows, N key channels)
//     Z = [V; U]                                                                          (2L rows, N value channels)
//
// and, with the state at its start times e^g written S:
//
//     A = mask(P Q')       r rows see s <= t, a rows see s < t
//     U = M (P_a S' + A_ak V),     M = (I - A_ab)^-1
//     Y = P_r S' + A_r Z
//     state after it = (S + Z' Q) e^(c_L - g)
//
// so every factor is a factor of P or Q and lies within e^(+-0.607 * 9) = 2e-2 .. 2.3e2; the diagonal of the
// transition is applied in float. Products take bf16 operands and add in float; M is made in float by substitution
// and used as a sum of two bf16, as is what it multiplies, because repeated keys make M badly conditioned.
//
// Warp w owns the value channels 16 w .. 16 w + 15 in everything that touches the state, which it keeps in registers
// transposed as (16 values, N keys): rows of the state do not meet, so warps meet only over A, M and the operands.
//
// Source: the WY form of "RWKV-7 Goose" (arXiv 2503.14456), appendix on parallel training; the anchored factors are
// the usual remedy for e^(-c) growing without bound.
#pragma once

#include "common/mma.cuh"
#include "wkv7/chunked.h"

namespace rwkvpeft {
namespace wkv7_chunked {

constexpr int CHUNK = WKV7_CHUNK;
constexpr int SQUARE_STRIDE = 2 * CHUNK + 8;   // of the 32x32 matrix A
constexpr int INVERSE_STRIDE = CHUNK + 8;      // of M's two halves
constexpr int SOLVE_STRIDE = CHUNK + 4;        // of A_ab in float, by columns
constexpr int STAGE_STRIDE = CHUNK + 8;        // of a warp's 16x16 outgoing block
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float STRONGEST = -0.60653065971263342f;  // the log decay of a saturated logit

template <int N>
struct Sizes {
  static_assert(N % 64 == 0 && (N & (N - 1)) == 0, "the sums over columns deal out channels by 64");
  static constexpr int WARPS = N / 16;
  static constexpr int THREADS = 32 * WARPS;  // one for each half of each key channel
  static constexpr int STRIDE = N + 8;        // of tiles that products read
  static constexpr int TILE = CHUNK * STRIDE;
  static constexpr int RAW = CHUNK * N;  // elements of a chunk of an operand as it comes
};

// Where the tokens of a chunk lie in a tensor.
struct Window {
  int64_t first;  // element offset of the first token's channel 0 of this head
  int step;         // elements from a token to the next
  int tokens;       // that exist, at most CHUNK
};

// The sequence and head whose chunks a block walks.
template <int N>
struct Walk {
  int64_t first, first_saved;  // element offsets: of the first token, and of what is saved of the first chunk
  int step, length, chunks;      // elements between tokens, tokens, and chunks of the sequence

  __device__ __forceinline__ explicit Walk(const Wkv7Rows& rows) : step(static_cast<int>(rows.heads) * N) {
    const int heads = static_cast<int>(rows.heads), block = static_cast<int>(blockIdx.x);
    const int sequence = block / heads, head = block % heads;
    int64_t start, begin;  // the sequence's first row and chunk
    if (rows.first == nullptr) {
      length = static_cast<int>(rows.tokens);
      chunks = (length - 1) / CHUNK + (length > 0);
      start = static_cast<int64_t>(sequence) * length;
      begin = static_cast<int64_t>(sequence) * chunks;
    } else {
      begin = rows.first[sequence];
      chunks = rows.first[sequence + 1] - rows.first[sequence];
      start = length = 0;
      if (chunks > 0) {
        const int32_t *one = rows.chunks + 3 * begin, *last = one + 3 * (chunks - 1);
        start = one[1];
        length = last[1] + last[2] - one[1];
      }
    }
    first = start * step + head * N;
    first_saved = (begin * heads + head) * N * N;
  }

  __device__ __forceinline__ Window window(int chunk) const {
    const int left = length - chunk * CHUNK;
    return {first + static_cast<int64_t>(chunk) * CHUNK * step, step, left < CHUNK ? left : CHUNK};
  }

  // Element offset of what is saved of a chunk, in (chunks of all sequences, H, N, N).
  __device__ __forceinline__ int64_t saved(int chunk) const {
    return first_saved + static_cast<int64_t>(chunk) * N * step;
  }
};

// Starts copying a chunk to shared memory, zeros for tokens that do not exist or a tensor that is not given.
template <int N, int STRIDE>
__device__ __forceinline__ void start_copy(Bf16* shared, const void* tensor, const Window& window) {
  const int token = threadIdx.x / (N / 8), channel = threadIdx.x % (N / 8) * 8;
  Bf16* to = shared + token * STRIDE + channel;
  if (tensor != nullptr && token < window.tokens) {
    device::copy_16_bytes(
        to, static_cast<const Bf16*>(tensor) + window.first + static_cast<int64_t>(token) * window.step + channel);
  } else {
    *reinterpret_cast<uint4*>(to) = make_uint4(0u, 0u, 0u, 0u);
  }
}

__device__ __forceinline__ float gate(Bf16 logit) {
  return device::reciprocal(1.f + device::exp2_of(-LOG2_E * to_float(logit)));
}

// Makes P and Q of a chunk, and what multiplies the state on entering (e^g) and on leaving it (e^(c_L - g)). Each
// thread sums one channel's decays outwards from the middle, over one half of the tokens.
// If KEPT, `exponents` receives (c_(t-1) - g) log2(e) for t = 0 .. L, (CHUNK + 1, N), and `logits` a copy of w.
template <int N, bool KEPT>
__device__ __forceinline__ void make_operands(Bf16* p, Bf16* q, float* enter, float* leave, float* exponents,
                                              Bf16* logits, const Bf16* r, const Bf16* w, const Bf16* k,
                                              const Bf16* a, const Bf16* b, int tokens) {
  constexpr int STRIDE = Sizes<N>::STRIDE, LOWER = CHUNK * STRIDE;
  const int channel = threadIdx.x % N;
  const bool later = threadIdx.x >= N;
  Bf16 mine[5][CHUNK / 2];  // all loads first: the compiler may not move them over the stores below
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) {
    const int raw = (later ? CHUNK / 2 + i : CHUNK / 2 - 1 - i) * N + channel;
    mine[0][i] = r[raw];
    mine[1][i] = w[raw];
    mine[2][i] = k[raw];
    mine[3][i] = a[raw];
    mine[4][i] = b[raw];
  }
  float sum = 0.f, factor = 1.f;  // of the decays between the middle and here, as an exponent and as e to it
  if (KEPT && later) exponents[(CHUNK / 2) * N + channel] = 0.f;
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) {
    const int token = later ? CHUNK / 2 + i : CHUNK / 2 - 1 - i, at = token * STRIDE + channel;
    const float decay = token < tokens ? STRONGEST * LOG2_E * gate(mine[1][i]) : 0.f;
    const float next = later ? sum + decay : sum - decay;
    const float next_factor = device::exp2_of(next);
    const float after = later ? next_factor : factor, before = later ? factor : next_factor;
    const float inverse = device::exp2_of(later ? -next : -sum);
    p[at] = to_bf16(to_float(mine[0][i]) * after);
    p[LOWER + at] = to_bf16(to_float(mine[3][i]) * before);
    q[at] = to_bf16(to_float(mine[2][i]) * inverse);
    q[LOWER + at] = to_bf16(to_float(mine[4][i]) * inverse);
    if (KEPT) {
      exponents[(later ? token + 1 : token) * N + channel] = next;
      logits[token * N + channel] = mine[1][i];
    }
    sum = next;
    factor = next_factor;
  }
  if (later) {
    leave[channel] = factor;
  } else {
    enter[channel] = device::exp2_of(-sum);
  }
}

// Whether row (r or a, t) of A has something at column s of its 16x16 quadrant.
__device__ __forceinline__ bool seen(bool a_row, int t, int s) { return a_row ? s < t : s <= t; }

// The masked accumulator, rounded, to one quadrant of a 32x32 matrix.
__device__ __forceinline__ void store_quadrant(Bf16* square, int quadrant, Accumulator sum) {
  const int row = lane_id() >> 2, column = (lane_id() & 3) * 2;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int t = row + ((i >> 1) & 1) * 8, s = column + (i & 1) + (i >> 2) * 8;
    if (!seen(quadrant >= 2, t, s)) sum.of[i >> 2][i & 3] = 0.f;
  }
  store<SQUARE_STRIDE>(square + (quadrant >> 1) * CHUNK * SQUARE_STRIDE + (quadrant & 1) * CHUNK, rounded(sum));
}

// M = (I - A_ab)^-1 by forward substitution in float, one column to a lane; `solve` is CHUNK * SOLVE_STRIDE floats for
// this warp alone. The lower half-warp writes M rounded to bf16, the upper one what rounding leaves.
__device__ __forceinline__ void invert(Bf16* inverse, float* solve, const Accumulator& ab) {
  const int row = lane_id() >> 2, first = (lane_id() & 3) * 2;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int t = row + ((i >> 1) & 1) * 8, s = first + (i & 1) + (i >> 2) * 8;
    solve[s * SOLVE_STRIDE + t] = ab.of[i >> 2][i & 3];
  }
  __syncwarp();
  const int column = lane_id() & 15;
  float x[CHUNK];
#pragma unroll
  for (int t = 0; t < CHUNK; ++t) x[t] = t == column ? 1.f : 0.f;
#pragma unroll
  for (int s = 0; s < CHUNK - 1; ++s) {
    float below[CHUNK];
#pragma unroll
    for (int t = (s + 1) / 4 * 4; t < CHUNK; t += 4) {
      const float4 four = *reinterpret_cast<const float4*>(solve + s * SOLVE_STRIDE + t);
      below[t] = four.x;
      below[t + 1] = four.y;
      below[t + 2] = four.z;
      below[t + 3] = four.w;
    }
#pragma unroll
    for (int t = s + 1; t < CHUNK; ++t) x[t] = fmaf(below[t], x[s], x[t]);
  }
  const bool rest = lane_id() >= 16;
  Bf16* to = inverse + (rest ? CHUNK * INVERSE_STRIDE : 0) + column;
#pragma unroll
  for (int t = 0; t < CHUNK; ++t) {
    const Bf16 coarse = to_bf16(x[t]);
    to[t * INVERSE_STRIDE] = rest ? to_bf16(x[t] - to_float(coarse)) : coarse;
  }
}

// A and M of a chunk: quadrants rk, rb, ak and ab are dealt out to the warps, in turns, because ab is the most work.
// A's quadrant ab is left as it was.
template <int N>
__device__ __forceinline__ void make_transition(Bf16* square, Bf16* inverse, float* solve, const Bf16* p,
                                                const Bf16* q, int turn) {
  constexpr int STRIDE = Sizes<N>::STRIDE, LOWER = CHUNK * STRIDE;
  const int quadrant = (threadIdx.x / 32 + turn) & (Sizes<N>::WARPS - 1);
  if (quadrant >= 4) return;
  Accumulator sum = zeros();
#pragma unroll
  for (int j = 0; j < N; j += 16) {
    add_product(sum, left<STRIDE>(p + (quadrant >> 1) * LOWER + j),
                right_of_transposed<STRIDE>(q + (quadrant & 1) * LOWER + j));
  }
  if (quadrant == 3) {
    invert(inverse, solve, sum);
  } else {
    store_quadrant(square, quadrant, sum);
  }
}

// x M' (or x M, TRANSPOSED being false) in the precision of two bf16 each.
template <bool TRANSPOSED>
__device__ __forceinline__ Accumulator times_inverse(const Accumulator& x, const Bf16* inverse) {
  const Bf16* rest = inverse + CHUNK * INVERSE_STRIDE;
  const Block coarse = rounded(x), fine = remainder(x, coarse);
  const Block m = TRANSPOSED ? right_of_transposed<INVERSE_STRIDE>(inverse) : right<INVERSE_STRIDE>(inverse);
  const Block m_fine = TRANSPOSED ? right_of_transposed<INVERSE_STRIDE>(rest) : right<INVERSE_STRIDE>(rest);
  Accumulator sum = zeros();
  add_product(sum, coarse, m_fine);
  add_product(sum, fine, m);
  add_product(sum, coarse, m);
  return sum;
}

// Multiplies the two 8-column tiles of keys that start at channel 16 j by a factor for each key.
__device__ __forceinline__ void scale(Accumulator& state, const float* factors) {
  const int column = (lane_id() & 3) * 2;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float2 two = *reinterpret_cast<const float2*>(factors + 8 * n + column);
    state.of[n][0] *= two.x;
    state.of[n][1] *= two.y;
    state.of[n][2] *= two.x;
    state.of[n][3] *= two.y;
  }
}

// A warp's 16 rows of a (N, N) float state, read from or written to memory.
template <int N>
__device__ __forceinline__ void load_state(Accumulator (&state)[N / 16], const float* from) {
  const int row = lane_id() >> 2, column = (lane_id() & 3) * 2;
#pragma unroll
  for (int i = 0; i < N / 16 * 4; ++i) {
    const int down = (i & 1) * 8, across = (i >> 1) * 8 + column;
    float2 two = make_float2(0.f, 0.f);
    if (from != nullptr) two = *reinterpret_cast<const float2*>(from + (row + down) * N + across);
    state[i >> 2].of[(i >> 1) & 1][(i & 1) * 2] = two.x;
    state[i >> 2].of[(i >> 1) & 1][(i & 1) * 2 + 1] = two.y;
  }
}

template <int N>
__device__ __forceinline__ void store_state(float* to, const Accumulator (&state)[N / 16]) {
  const int row = lane_id() >> 2, column = (lane_id() & 3) * 2;
#pragma unroll
  for (int i = 0; i < N / 16 * 4; ++i) {
    const float* two = &state[i >> 2].of[(i >> 1) & 1][(i & 1) * 2];
    *reinterpret_cast<float2*>(to + (row + (i & 1) * 8) * N + (i >> 1) * 8 + column) = make_float2(two[0], two[1]);
  }
}

// Sends a warp's staged (16 tokens, 16 channels) to memory in whole 32-byte sectors.
template <int N, int STRIDE>
__device__ __forceinline__ void send_staged(void* tensor, const Bf16* stage, const Window& window, int channel) {
  const int token = lane_id() >> 1, half = (lane_id() & 1) * 8;
  __syncwarp();
  if (token < window.tokens) {
    *reinterpret_cast<uint4*>(static_cast<Bf16*>(tensor) + window.first +
                              static_cast<int64_t>(token) * window.step + channel + half) =
        *reinterpret_cast<const uint4*>(stage + token * STRIDE + half);
  }
  __syncwarp();  // before the stage is written again
}

}  // namespace wkv7_chunked
}  // namespace rwkvpeft
