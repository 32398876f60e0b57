// wkv7 token by token, fp32 inside. Per head, with the state S (N value rows, N key columns):
//
//     u_t = S_(t-1) a_t      S_t = S_(t-1) diag(d_t) + u_t b_tᵀ + v_t k_tᵀ      y_t = S_t r_t
//     log d_t = -e^(-1/2) sigmoid(x_t)
//
// Backward, with G_t the gradient of S_t and H_(t-1) that of S_(t-1) by all tokens from t on:
//
//     G_t = H_t + dy_t r_tᵀ     du_t = G_t b_t     H_(t-1) = G_t diag(d_t) + du_t a_tᵀ
//     dv_t = G_t k_t   dk_t = G_tᵀ v_t   db_t = G_tᵀ u_t   dr_t = S_tᵀ dy_t   da_t = S_(t-1)ᵀ du_t
//
// The backward goes through segments of WKV7_SEGMENT tokens, the last first, each in two sweeps: G backwards from the
// segment's end, then S forwards again from the state that the forward kept. Nothing is divided by a decay, unlike
// when S is computed backwards from its end: at the strongest decay fifteen such steps lose three digits.
// The decay's gradient needs S and G of the same token, which never meet; it follows from E_t = colsum(S_t ⊙ H_t):
//
//     dlog_t = E_(t-1) - a_t da_t      E_t = dlog_t - r_t dr_t + b_t db_t + k_t dk_t      (each key channel alone)
//
// from E at the segment's start, where both are at hand. As d >= 0.545, E changes slowly enough that sixteen such
// steps cost about one more digit's rounding; where decays can vanish this would not do (see common/diagonal.cuh).
#pragma once

#include "common/pieces.cuh"
#include "wkv7/sequential.h"

namespace rwkvpeft {
namespace wkv7 {

constexpr int SEGMENT = WKV7_SEGMENT;
constexpr float STRONGEST = -0.60653065971263342f;  // -e^(-1/2), the log decay of a saturated logit

__device__ __forceinline__ float decay_of(float logit) {
  const float small = expf(-fabsf(logit));
  return expf(STRONGEST * ((logit >= 0.f ? 1.f : small) / (1.f + small)));
}

// Derivative of the log decay by the logit; 1 - sigmoid would lose every digit for a large logit.
__device__ __forceinline__ float slope_of(float logit) {
  const float small = expf(-fabsf(logit));
  return STRONGEST * small / ((1.f + small) * (1.f + small));
}

// Rows of a state do not depend on each other: a block goes through ROWS of them, SPLIT lanes to a row.
template <typename T, int N, int ROWS, int SPLIT>
__global__ void __launch_bounds__(ROWS* SPLIT) forward_kernel(const Wkv7Forward call) {
  constexpr int THREADS = ROWS * SPLIT;
  __shared__ __align__(16) float r[SEGMENT * N], d[SEGMENT * N], k[SEGMENT * N], a[SEGMENT * N], b[SEGMENT * N];
  using Row = Piece<N, SPLIT>;

  const int64_t group = blockIdx.x / (N / ROWS);
  const int row = blockIdx.x % (N / ROWS) * ROWS + threadIdx.x / SPLIT;
  const int share = threadIdx.x % SPLIT;
  const int64_t stride = call.heads * N;
  const int64_t first = (group / call.heads * call.tokens * call.heads + group % call.heads) * N;
  const int64_t segments = (call.tokens + SEGMENT - 1) / SEGMENT;

  Row state;
  state.load_row(call.state == nullptr ? nullptr : call.state + (group * N + row) * N, share);
  for (int64_t start = 0; start < call.tokens; start += SEGMENT) {
    const int count = call.tokens - start < SEGMENT ? static_cast<int>(call.tokens - start) : SEGMENT;
    const int64_t here = first + start * stride;
    __syncthreads();
    load_tokens<N, THREADS>(r, static_cast<const T*>(call.r) + here, stride, count);
    load_tokens<N, THREADS>(k, static_cast<const T*>(call.k) + here, stride, count);
    load_tokens<N, THREADS>(a, static_cast<const T*>(call.a) + here, stride, count);
    load_tokens<N, THREADS>(b, static_cast<const T*>(call.b) + here, stride, count);
    const T* logits = static_cast<const T*>(call.w) + here;
    for (int i = threadIdx.x; i < count * N; i += THREADS)
      d[i] = decay_of(as_float(logits[i / N * stride + i % N]));
    __syncthreads();
    if (call.checkpoints != nullptr)
      state.store_row(call.checkpoints + ((group * segments + start / SEGMENT) * N + row) * N, share);

    const T* values = static_cast<const T*>(call.v) + here + row;
    float value = as_float(values[0]);
    for (int t = 0; t < count; ++t) {
      // the next token's, so that nothing waits for it
      const float next = t + 1 < count ? as_float(values[(t + 1) * stride]) : 0.f;
      Sum sum;
#pragma unroll
      for (int g = 0; g < Row::GROUPS; ++g) {
        const float4 removal = four_of(a + t * N, Row::place(g, share));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.of[e] += state.of[g][e] * element(removal, e);
      }
      const float removed = sum.total<SPLIT>();
      Sum read;
#pragma unroll
      for (int g = 0; g < Row::GROUPS; ++g) {
        const int place = t * N + Row::place(g, share);
        const float4 decay = four_of(d, place), write = four_of(b, place), key = four_of(k, place);
        const float4 receptance = four_of(r, place);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float now = state.of[g][e] * element(decay, e) + removed * element(write, e) + value * element(key, e);
          state.of[g][e] = now;
          read.of[e] += now * element(receptance, e);
        }
      }
      const float out = read.total<SPLIT>();
      if (share == 0) {
        static_cast<T*>(call.y)[here + t * stride + row] = from_float<T>(out);
        if (call.checkpoints != nullptr) call.removed[here + t * stride + row] = removed;
      }
      value = next;
    }
  }
  state.store_row(call.final_state + (group * N + row) * N, share);
}

// One block to a head: SPLIT lanes hold a row of G, its column of the same number, and that column of S.
template <typename T, int N, int SPLIT>
__global__ void __launch_bounds__(N* SPLIT) backward_kernel(const Wkv7Backward call) {
  constexpr int THREADS = N * SPLIT, ROOM = SEGMENT * N;
  float* const shared = dynamic_shared<float>();
  float *const r = shared, *const d = r + ROOM, *const k = d + ROOM, *const v = k + ROOM, *const a = v + ROOM;
  float *const b = a + ROOM, *const dy = b + ROOM, *const u = dy + ROOM, *const du = u + ROOM;
  float *const dk = du + ROOM, *const db = dk + ROOM;
  using Line = Piece<N, SPLIT>;

  const int64_t group = blockIdx.x;
  const int own = threadIdx.x / SPLIT, share = threadIdx.x % SPLIT;
  const int64_t stride = call.heads * N;
  const int64_t first = (group / call.heads * call.tokens * call.heads + group % call.heads) * N;
  const int64_t segments = (call.tokens + SEGMENT - 1) / SEGMENT;
  const bool state_alone = call.dr == nullptr;

  Line grad_row, grad_column;
  const float* dfinal = call.dfinal_state == nullptr ? nullptr : call.dfinal_state + group * N * N;
  grad_row.load_row(dfinal == nullptr ? nullptr : dfinal + own * N, share);
  grad_column.load_column(dfinal == nullptr ? nullptr : dfinal + own, share);

  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t start = segment * SEGMENT;
    const int count = call.tokens - start < SEGMENT ? static_cast<int>(call.tokens - start) : SEGMENT;
    const int64_t here = first + start * stride;
    __syncthreads();
    load_tokens<N, THREADS>(r, static_cast<const T*>(call.r) + here, stride, count);
    load_tokens<N, THREADS>(k, static_cast<const T*>(call.k) + here, stride, count);
    load_tokens<N, THREADS>(v, static_cast<const T*>(call.v) + here, stride, count);
    load_tokens<N, THREADS>(a, static_cast<const T*>(call.a) + here, stride, count);
    load_tokens<N, THREADS>(b, static_cast<const T*>(call.b) + here, stride, count);
    load_tokens<N, THREADS>(u, call.removed + here, stride, count);
    const T* logits = static_cast<const T*>(call.w) + here;
    for (int i = threadIdx.x; i < count * N; i += THREADS)
      d[i] = decay_of(as_float(logits[i / N * stride + i % N]));
    if (call.dy != nullptr) {
      load_tokens<N, THREADS>(dy, static_cast<const T*>(call.dy) + here, stride, count);
    } else {
      for (int i = threadIdx.x; i < count * N; i += THREADS) dy[i] = 0.f;
    }
    __syncthreads();

    for (int t = count - 1; t >= 0; --t) {
      const float own_dy = dy[t * N + own], own_r = r[t * N + own];
      Sum to_v, to_u, to_k, to_b;
#pragma unroll
      for (int g = 0; g < Line::GROUPS; ++g) {
        const int place = t * N + Line::place(g, share);
        const float4 receptance = four_of(r, place), key = four_of(k, place), write = four_of(b, place);
        const float4 out = four_of(dy, place), value = four_of(v, place), removed = four_of(u, place);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float in_row = grad_row.of[g][e] + own_dy * element(receptance, e);
          const float in_column = grad_column.of[g][e] + own_r * element(out, e);
          grad_row.of[g][e] = in_row;
          grad_column.of[g][e] = in_column;
          to_v.of[e] += in_row * element(key, e);
          to_u.of[e] += in_row * element(write, e);
          to_k.of[e] += in_column * element(value, e);
          to_b.of[e] += in_column * element(removed, e);
        }
      }
      const float own_du = to_u.total<SPLIT>();
      if (share == 0) du[t * N + own] = own_du;
      if (!state_alone) {
        const float own_dv = to_v.total<SPLIT>(), own_dk = to_k.total<SPLIT>(), own_db = to_b.total<SPLIT>();
        if (share == 0) {
          const int64_t at = here + t * stride + own;
          static_cast<T*>(call.dv)[at] = from_float<T>(own_dv);
          static_cast<T*>(call.dk)[at] = from_float<T>(own_dk);
          static_cast<T*>(call.db)[at] = from_float<T>(own_db);
          dk[t * N + own] = own_dk;
          db[t * N + own] = own_db;
        }
      }
      __syncthreads();  // every row's du
      const float own_d = d[t * N + own], own_a = a[t * N + own];
#pragma unroll
      for (int g = 0; g < Line::GROUPS; ++g) {
        const int place = t * N + Line::place(g, share);
        const float4 decay = four_of(d, place), removal = four_of(a, place), removing = four_of(du, place);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          grad_row.of[g][e] = grad_row.of[g][e] * element(decay, e) + own_du * element(removal, e);
          grad_column.of[g][e] = grad_column.of[g][e] * own_d + own_a * element(removing, e);
        }
      }
    }
    if (state_alone) continue;

    Line state;  // its column
    state.load_column(call.checkpoints + (group * segments + segment) * N * N + own, share);
    Sum meet;
#pragma unroll
    for (int g = 0; g < Line::GROUPS; ++g)
#pragma unroll
      for (int e = 0; e < 4; ++e) meet.of[e] += state.of[g][e] * grad_column.of[g][e];
    float meeting = meet.total<SPLIT>();  // E
    for (int t = 0; t < count; ++t) {
      const int mine = t * N + own;
      const float own_d = d[mine], own_b = b[mine], own_k = k[mine];
      Sum to_a, to_r;
#pragma unroll
      for (int g = 0; g < Line::GROUPS; ++g) {
        const int place = t * N + Line::place(g, share);
        const float4 removing = four_of(du, place), removed = four_of(u, place), value = four_of(v, place);
        const float4 out = four_of(dy, place);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float before = state.of[g][e];
          const float after = before * own_d + own_b * element(removed, e) + own_k * element(value, e);
          to_a.of[e] += before * element(removing, e);
          to_r.of[e] += after * element(out, e);
          state.of[g][e] = after;
        }
      }
      const float own_da = to_a.total<SPLIT>(), own_dr = to_r.total<SPLIT>();
      if (share == 0) {
        const int64_t at = here + t * stride + own;
        const float dlog = meeting - a[mine] * own_da;
        meeting = dlog - r[mine] * own_dr + own_b * db[mine] + own_k * dk[mine];
        static_cast<T*>(call.da)[at] = from_float<T>(own_da);
        static_cast<T*>(call.dr)[at] = from_float<T>(own_dr);
        static_cast<T*>(call.dw)[at] =
            from_float<T>(dlog * slope_of(as_float(static_cast<const T*>(call.w)[at])));
      }
    }
  }
  if (call.dstate != nullptr) grad_row.store_row(call.dstate + (group * N + own) * N, share);
}

template <typename T, int N>
cudaError_t forward(const Wkv7Forward& call, cudaStream_t stream) {
  constexpr int ROWS = 32, SPLIT = 4;
  const int64_t blocks = call.batch * call.heads * (N / ROWS);
  if (blocks == 0) return cudaSuccess;
  return launch(forward_kernel<T, N, ROWS, SPLIT>, dim3(static_cast<unsigned>(blocks)), dim3(ROWS * SPLIT), 0, stream,
                call);
}

template <typename T, int N>
cudaError_t backward(const Wkv7Backward& call, cudaStream_t stream) {
  constexpr int SPLIT = 2, SHARED = 11 * SEGMENT * N * static_cast<int>(sizeof(float));
  const int64_t blocks = call.batch * call.heads;
  if (blocks == 0) return cudaSuccess;
  return launch(backward_kernel<T, N, SPLIT>, dim3(static_cast<unsigned>(blocks)), dim3(N * SPLIT), SHARED, stream,
                call);
}

}  // namespace wkv7
}  // namespace rwkvpeft
