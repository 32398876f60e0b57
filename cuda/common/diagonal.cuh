// wkv5 and wkv6 token by token, fp32 inside. Per head, with the state S (N value rows, N key columns):
//
//     y_t = (S_(t-1) + v_t (u ⊙ k_t)ᵀ) r_t      S_t = S_(t-1) diag(d_t) + v_t k_tᵀ      log d_t = -exp(w_t)
//
// Backward, with G_t the gradient of S_t, q_t = v_t·dy_t and p_t = Σ_j r_t u k_t:
//
//     G_(t-1) = G_t diag(d_t) + dy_t r_tᵀ
//     dr_t = S_(t-1)ᵀ dy_t + q_t u ⊙ k_t      dk_t = G_tᵀ v_t + q_t u ⊙ r_t      dv_t = G_t k_t + p_t dy_t
//     dlog_t = d_t ⊙ colsum(S_(t-1) ⊙ G_t)    dw_t = dlog_t ⊙ log d_t            du = Σ_t q_t r_t ⊙ k_t
//
// A decay may be as small as e^-148, so that states cannot be computed backwards, and dlog must be this very product:
// differences of larger sums would leave nothing of it. S and G must meet at every token. Columns do not depend on each
// other; for each the backward goes through segments, the last first: S forwards from the state that the forward kept,
// putting one in DIAGONAL_GROUP states aside, then group by group, the last first, forwards once more with every state
// in registers, and G backwards over them. Rows do not depend on each other either: dv and the state's gradient take a
// sweep of their own.
#pragma once

#include "common/diagonal.h"
#include "common/pieces.cuh"

namespace rwkvpeft {
namespace diagonal {

constexpr int SEGMENT = DIAGONAL_SEGMENT, GROUP = DIAGONAL_GROUP;

__device__ __forceinline__ float decay_of(float w) { return expf(-expf(w)); }

// Where a block's head lies, and its decays.
template <typename T, int N, bool CONSTANT>
struct Head {
  int64_t group, number, stride, first, segments;

  __device__ __forceinline__ Head(int64_t group_, int64_t tokens, int64_t heads)
      : group(group_),
        number(group_ % heads),
        stride(heads * N),
        first((group_ / heads * tokens * heads + group_ % heads) * N),
        segments((tokens + SEGMENT - 1) / SEGMENT) {}

  // w of a token's channel, `at` its place in a tensor of tokens.
  __device__ __forceinline__ float logit(const void* w, int64_t at, int channel) const {
    if (CONSTANT) return static_cast<const float*>(w)[number * N + channel];
    return as_float(static_cast<const T*>(w)[at]);
  }

  // The decays of `count` tokens from `here` on.
  template <int THREADS>
  __device__ __forceinline__ void load_decays(float* shared, const void* w, int64_t here, int count) const {
    for (int i = threadIdx.x; i < count * N; i += THREADS)
      shared[i] = decay_of(logit(w, here + i / N * stride + i % N, i % N));
  }
};

// For each of `count` tokens the sum over channels of x ⊙ y, and ⊙ z where there is one. Ends with a barrier's need.
template <int N, int THREADS>
__device__ __forceinline__ void products(float* sums, const float* x, const float* y, const float* z, int count) {
  for (int t = threadIdx.x / 32; t < count; t += THREADS / 32) {
    float sum = 0.f;
    for (int j = threadIdx.x % 32; j < N; j += 32) sum += x[t * N + j] * y[t * N + j] * (z == nullptr ? 1.f : z[j]);
    sum = over_shares<32>(sum);
    if (threadIdx.x % 32 == 0) sums[t] = sum;
  }
}

template <typename T, int N, int ROWS, int SPLIT, bool CONSTANT>
__global__ void __launch_bounds__(ROWS* SPLIT) forward_kernel(const DiagonalForward call) {
  constexpr int THREADS = ROWS * SPLIT;
  __shared__ __align__(16) float r[SEGMENT * N], d[SEGMENT * N], k[SEGMENT * N], u[N], bonus[SEGMENT];
  using Row = Piece<N, SPLIT>;
  const Head<T, N, CONSTANT> head(blockIdx.x / (N / ROWS), call.tokens, call.heads);
  const int row = blockIdx.x % (N / ROWS) * ROWS + threadIdx.x / SPLIT, share = threadIdx.x % SPLIT;

  for (int i = threadIdx.x; i < N; i += THREADS) u[i] = call.u[head.number * N + i];
  Row state;
  state.load_row(call.state == nullptr ? nullptr : call.state + (head.group * N + row) * N, share);
  for (int64_t segment = 0; segment < head.segments; ++segment) {
    const int64_t start = segment * SEGMENT, here = head.first + start * head.stride;
    const int count = call.tokens - start < SEGMENT ? static_cast<int>(call.tokens - start) : SEGMENT;
    __syncthreads();
    load_tokens<N, THREADS>(r, static_cast<const T*>(call.r) + here, head.stride, count);
    load_tokens<N, THREADS>(k, static_cast<const T*>(call.k) + here, head.stride, count);
    head.template load_decays<THREADS>(d, call.w, here, count);
    __syncthreads();
    products<N, THREADS>(bonus, r, k, u, count);
    if (call.checkpoints != nullptr)
      state.store_row(call.checkpoints + ((head.group * head.segments + segment) * N + row) * N, share);
    __syncthreads();

    const T* values = static_cast<const T*>(call.v) + here + row;
    float value = as_float(values[0]);
    for (int t = 0; t < count; ++t) {
      // the next token's, so that nothing waits for it
      const float next = t + 1 < count ? as_float(values[(t + 1) * head.stride]) : 0.f;
      Sum read;
#pragma unroll
      for (int g = 0; g < Row::GROUPS; ++g) {
        const int place = t * N + Row::place(g, share);
        const float4 receptance = four_of(r, place), decay = four_of(d, place), key = four_of(k, place);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          read.of[e] += state.of[g][e] * element(receptance, e);
          state.of[g][e] = state.of[g][e] * element(decay, e) + value * element(key, e);
        }
      }
      const float out = read.total<SPLIT>() + bonus[t] * value;
      if (share == 0) static_cast<T*>(call.y)[here + t * head.stride + row] = from_float<T>(out);
      value = next;
    }
  }
  state.store_row(call.final_state + (head.group * N + row) * N, share);
}

// Gradients of v and of the state: rows of G, ROWS to a block.
template <typename T, int N, int ROWS, int SPLIT, bool CONSTANT>
__global__ void __launch_bounds__(ROWS* SPLIT) rows_backward_kernel(const DiagonalBackward call) {
  constexpr int THREADS = ROWS * SPLIT;
  __shared__ __align__(16) float r[SEGMENT * N], d[SEGMENT * N], k[SEGMENT * N], u[N], bonus[SEGMENT];
  using Row = Piece<N, SPLIT>;
  const Head<T, N, CONSTANT> head(blockIdx.x / (N / ROWS), call.tokens, call.heads);
  const int row = blockIdx.x % (N / ROWS) * ROWS + threadIdx.x / SPLIT, share = threadIdx.x % SPLIT;

  for (int i = threadIdx.x; i < N; i += THREADS) u[i] = call.u[head.number * N + i];
  Row grad;
  grad.load_row(call.dfinal_state == nullptr ? nullptr : call.dfinal_state + (head.group * N + row) * N, share);
  for (int64_t segment = head.segments - 1; segment >= 0; --segment) {
    const int64_t start = segment * SEGMENT, here = head.first + start * head.stride;
    const int count = call.tokens - start < SEGMENT ? static_cast<int>(call.tokens - start) : SEGMENT;
    __syncthreads();
    load_tokens<N, THREADS>(r, static_cast<const T*>(call.r) + here, head.stride, count);
    load_tokens<N, THREADS>(k, static_cast<const T*>(call.k) + here, head.stride, count);
    head.template load_decays<THREADS>(d, call.w, here, count);
    __syncthreads();
    products<N, THREADS>(bonus, r, k, u, count);
    __syncthreads();

    for (int t = count - 1; t >= 0; --t) {
      const int64_t at = here + t * head.stride + row;
      const float out = call.dy == nullptr ? 0.f : as_float(static_cast<const T*>(call.dy)[at]);
      Sum to_v;
#pragma unroll
      for (int g = 0; g < Row::GROUPS; ++g) {
        const int place = t * N + Row::place(g, share);
        const float4 receptance = four_of(r, place), decay = four_of(d, place), key = four_of(k, place);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          to_v.of[e] += grad.of[g][e] * element(key, e);
          grad.of[g][e] = grad.of[g][e] * element(decay, e) + out * element(receptance, e);
        }
      }
      const float own_dv = to_v.total<SPLIT>() + bonus[t] * out;
      if (share == 0 && call.dv != nullptr) static_cast<T*>(call.dv)[at] = from_float<T>(own_dv);
    }
  }
  if (call.dstate != nullptr) grad.store_row(call.dstate + (head.group * N + row) * N, share);
}

// Gradients of r, w, k and u: columns of S and G, COLUMNS to a block.
template <typename T, int N, int COLUMNS, int SPLIT, bool CONSTANT>
__global__ void __launch_bounds__(COLUMNS* SPLIT) columns_backward_kernel(const DiagonalBackward call) {
  constexpr int THREADS = COLUMNS * SPLIT, OWN = SEGMENT * COLUMNS;
  __shared__ __align__(16) float v[SEGMENT * N], dy[SEGMENT * N], r[OWN], d[OWN], k[OWN], met[SEGMENT];
  using Column = Piece<N, SPLIT>;
  const Head<T, N, CONSTANT> head(blockIdx.x / (N / COLUMNS), call.tokens, call.heads);
  const int from = blockIdx.x % (N / COLUMNS) * COLUMNS;
  const int column = threadIdx.x / SPLIT, channel = from + column, share = threadIdx.x % SPLIT;
  float* const aside = call.scratch + static_cast<int64_t>(blockIdx.x) * DIAGONAL_SCRATCH * COLUMNS * N;
  const float bonus = call.u[head.number * N + channel];

  float own_du = 0.f, constant_dlog = 0.f;
  Column grad;
  grad.load_column(call.dfinal_state == nullptr ? nullptr : call.dfinal_state + head.group * N * N + channel, share);
  for (int64_t segment = head.segments - 1; segment >= 0; --segment) {
    const int64_t start = segment * SEGMENT, here = head.first + start * head.stride;
    const int count = call.tokens - start < SEGMENT ? static_cast<int>(call.tokens - start) : SEGMENT;
    __syncthreads();
    load_tokens<N, THREADS>(v, static_cast<const T*>(call.v) + here, head.stride, count);
    if (call.dy != nullptr) {
      load_tokens<N, THREADS>(dy, static_cast<const T*>(call.dy) + here, head.stride, count);
    } else {
      for (int i = threadIdx.x; i < count * N; i += THREADS) dy[i] = 0.f;
    }
    for (int i = threadIdx.x; i < count * COLUMNS; i += THREADS) {
      const int64_t at = here + i / COLUMNS * head.stride + from + i % COLUMNS;
      r[i] = as_float(static_cast<const T*>(call.r)[at]);
      k[i] = as_float(static_cast<const T*>(call.k)[at]);
      d[i] = decay_of(head.logit(call.w, at, from + i % COLUMNS));
    }
    __syncthreads();
    products<N, THREADS>(met, v, dy, nullptr, count);
    __syncthreads();

    const float* checkpoint = call.checkpoints + (head.group * head.segments + segment) * N * N + channel;
    const auto forward_step = [&](Column& state, int t) {
      const float own_d = d[t * COLUMNS + column], own_k = k[t * COLUMNS + column];
#pragma unroll
      for (int g = 0; g < Column::GROUPS; ++g) {
        const float4 value = four_of(v, t * N + Column::place(g, share));
#pragma unroll
        for (int e = 0; e < 4; ++e) state.of[g][e] = state.of[g][e] * own_d + own_k * element(value, e);
      }
    };
    const int last = (count - 1) / GROUP;
    if (last > 0) {
      Column state;
      state.load_column(checkpoint, share);
      for (int t = 0; t < last * GROUP; ++t) {
        forward_step(state, t);
        // read again by the same thread
        if ((t + 1) % GROUP == 0) state.store_own(aside + t / GROUP * COLUMNS * N, threadIdx.x, THREADS);
      }
    }
    for (int group = last; group >= 0; --group) {
      Column before[GROUP];  // the state before each of the group's tokens
      if (group == 0) {
        before[0].load_column(checkpoint, share);
      } else {
        before[0].load_own(aside + (group - 1) * COLUMNS * N, threadIdx.x, THREADS);
      }
#pragma unroll
      for (int i = 1; i < GROUP; ++i) {
        before[i] = before[i - 1];
        if (group * GROUP + i < count) forward_step(before[i], group * GROUP + i - 1);
      }
#pragma unroll
      for (int i = GROUP - 1; i >= 0; --i) {
        const int t = group * GROUP + i, mine = t * COLUMNS + column;
        if (t >= count) continue;
        const float own_r = r[mine], own_d = d[mine], own_k = k[mine];
        Sum to_r, to_k, meet;
#pragma unroll
        for (int g = 0; g < Column::GROUPS; ++g) {
          const int place = t * N + Column::place(g, share);
          const float4 out = four_of(dy, place), value = four_of(v, place);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            to_r.of[e] += before[i].of[g][e] * element(out, e);
            meet.of[e] += before[i].of[g][e] * grad.of[g][e];
            to_k.of[e] += grad.of[g][e] * element(value, e);
            grad.of[g][e] = grad.of[g][e] * own_d + own_r * element(out, e);
          }
        }
        const float own_dr = to_r.total<SPLIT>() + met[t] * bonus * own_k;
        const float own_dk = to_k.total<SPLIT>() + met[t] * bonus * own_r;
        const float dlog = own_d * meet.total<SPLIT>();
        own_du += met[t] * own_r * own_k;
        constant_dlog += dlog;
        if (share == 0) {
          const int64_t at = here + t * head.stride + channel;
          static_cast<T*>(call.dr)[at] = from_float<T>(own_dr);
          static_cast<T*>(call.dk)[at] = from_float<T>(own_dk);
          if (!CONSTANT)
            static_cast<T*>(call.dw)[at] = from_float<T>(dlog * -expf(head.logit(call.w, at, channel)));
        }
      }
    }
  }
  if (share == 0) {
    call.du[head.group * N + channel] = own_du;
    if (CONSTANT)
      static_cast<float*>(call.dw)[head.group * N + channel] =
          constant_dlog * -expf(head.logit(call.w, 0, channel));
  }
}

template <typename T, int N, bool CONSTANT>
cudaError_t forward(const DiagonalForward& call, cudaStream_t stream) {
  constexpr int ROWS = 32, SPLIT = 4;
  const int64_t blocks = call.batch * call.heads * (N / ROWS);
  if (blocks == 0) return cudaSuccess;
  return launch(forward_kernel<T, N, ROWS, SPLIT, CONSTANT>, dim3(static_cast<unsigned>(blocks)), dim3(ROWS * SPLIT),
                0, stream, call);
}

template <typename T, int N, bool CONSTANT>
cudaError_t backward(const DiagonalBackward& call, cudaStream_t stream) {
  constexpr int ROWS = 32, SPLIT = 4, COLUMNS = 32, COLUMN_SPLIT = N / 16;
  const int64_t blocks = call.batch * call.heads * (N / ROWS);
  if (blocks == 0) return cudaSuccess;
  if (call.du != nullptr) {  // without tokens only dr is null
    const cudaError_t refused = launch(columns_backward_kernel<T, N, COLUMNS, COLUMN_SPLIT, CONSTANT>,
                                       dim3(static_cast<unsigned>(call.batch * call.heads * (N / COLUMNS))),
                                       dim3(COLUMNS * COLUMN_SPLIT), 0, stream, call);
    if (refused != cudaSuccess) return refused;
  }
  return launch(rows_backward_kernel<T, N, ROWS, SPLIT, CONSTANT>, dim3(static_cast<unsigned>(blocks)),
                dim3(ROWS * SPLIT), 0, stream, call);
}

}  // namespace diagonal
}  // namespace rwkvpeft
