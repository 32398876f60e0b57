// Tensor core building blocks: 16x16 bf16 blocks of shared memory, and their products with float accumulators.
//
// A Block is one operand of a 16x16x16 product as the 32 lanes of a warp hold it, four words of two bf16 each. An
// Accumulator is a 16x16 float result: lane = 4 g + q holds, of column block n = 0, 1, the elements
//     (g, 8n + 2q), (g, 8n + 2q + 1), (g + 8, 8n + 2q), (g + 8, 8n + 2q + 1).
// An accumulator rounded to bf16 is a left operand as it stands: no lane needs what another holds.
//
// Tiles in shared memory are row-major; a row stride of 8 more than a multiple of 16 elements keeps every access here
// free of bank conflicts. GPUs before sm_80 have no such products: kernels are empty there, and not to be called.
#pragma once

#include "device.cuh"

namespace rwkvpeft {

using Bf16 = unsigned short;  // its bits

struct Block {
  uint32_t words[4];
};

struct Accumulator {
  float of[2][4];
};

}  // namespace rwkvpeft

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define RWKVPEFT_HAS_BF16_PRODUCTS 0
#else
#define RWKVPEFT_HAS_BF16_PRODUCTS 1
#endif

#ifndef CUDA_SHIM

namespace rwkvpeft {
namespace device {

// d += a b for a 16x16 (row, column), b 16x8.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices; lane 8 m + i brings the address of row i of matrix m. TRANSPOSED hands out each one transposed.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const Bf16* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// Starts copying 16 bytes to shared memory. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(global) : "memory");
}

// Waits for the copies this thread started.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;\n" ::: "memory"); }

// Rounds to nearest even.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace device
}  // namespace rwkvpeft

#else
#include "mma_on_host.h"  // the tests' stand-in for the instructions above
#endif

namespace rwkvpeft {

__device__ __forceinline__ float low_half(uint32_t word) { return device::float_of_bits(word << 16); }

__device__ __forceinline__ float high_half(uint32_t word) { return device::float_of_bits(word & 0xffff0000u); }

__device__ __forceinline__ float to_float(Bf16 bits) {
  return device::float_of_bits(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ Bf16 to_bf16(float x) { return static_cast<Bf16>(device::pack(x, 0.f) & 0xffffu); }

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }

// Left operand A[m][k] = tile[m][k].
template <int STRIDE>
__device__ __forceinline__ Block left(const Bf16* tile) {
  Block block;
  device::load_matrices<false>(block.words, tile + (lane_id() & 15) * STRIDE + (lane_id() >> 4) * 8);
  return block;
}

// Left operand A[m][k] = tile[k][m].
template <int STRIDE>
__device__ __forceinline__ Block left_of_transposed(const Bf16* tile) {
  Block block;
  const int row = (lane_id() & 7) + (lane_id() >> 4) * 8;
  device::load_matrices<true>(block.words, tile + row * STRIDE + ((lane_id() >> 3) & 1) * 8);
  return block;
}

// Right operand B[k][n] = tile[k][n].
template <int STRIDE>
__device__ __forceinline__ Block right(const Bf16* tile) {
  Block block;
  device::load_matrices<true>(block.words, tile + (lane_id() & 15) * STRIDE + (lane_id() >> 4) * 8);
  return block;
}

// Right operand B[k][n] = tile[n][k].
template <int STRIDE>
__device__ __forceinline__ Block right_of_transposed(const Bf16* tile) {
  Block block;
  const int row = (lane_id() & 7) + (lane_id() >> 4) * 8;
  device::load_matrices<false>(block.words, tile + row * STRIDE + ((lane_id() >> 3) & 1) * 8);
  return block;
}

__device__ __forceinline__ Accumulator zeros() {
  Accumulator sum;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.of[i >> 2][i & 3] = 0.f;
  return sum;
}

// sum += a b.
__device__ __forceinline__ void add_product(Accumulator& sum, const Block& a, const Block& b) {
  device::mma_16x8x16(sum.of[0], a.words, b.words[0], b.words[1]);
  device::mma_16x8x16(sum.of[1], a.words, b.words[2], b.words[3]);
}

// The accumulator as a left operand.
__device__ __forceinline__ Block rounded(const Accumulator& sum) {
  Block block;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    block.words[2 * n] = device::pack(sum.of[n][0], sum.of[n][1]);
    block.words[2 * n + 1] = device::pack(sum.of[n][2], sum.of[n][3]);
  }
  return block;
}

// What `block`, the rounded `sum`, leaves of it, rounded: together they hold 16 bits of it.
__device__ __forceinline__ Block remainder(const Accumulator& sum, const Block& block) {
  Accumulator rest;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    rest.of[n][0] = sum.of[n][0] - low_half(block.words[2 * n]);
    rest.of[n][1] = sum.of[n][1] - high_half(block.words[2 * n]);
    rest.of[n][2] = sum.of[n][2] - low_half(block.words[2 * n + 1]);
    rest.of[n][3] = sum.of[n][3] - high_half(block.words[2 * n + 1]);
  }
  return rounded(rest);
}

// Writes a left operand to tile[m][k].
template <int STRIDE>
__device__ __forceinline__ void store(Bf16* tile, const Block& block) {
  const int row = lane_id() >> 2, column = (lane_id() & 3) * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<uint32_t*>(tile + (row + (i & 1) * 8) * STRIDE + column + (i >> 1) * 8) = block.words[i];
  }
}

// Writes a left operand to tile[k][m].
template <int STRIDE>
__device__ __forceinline__ void store_transposed(Bf16* tile, const Block& block) {
  const int row = lane_id() >> 2, column = (lane_id() & 3) * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Bf16* at = tile + (column + (i >> 1) * 8) * STRIDE + row + (i & 1) * 8;
    at[0] = static_cast<Bf16>(block.words[i] & 0xffffu);
    at[STRIDE] = static_cast<Bf16>(block.words[i] >> 16);
  }
}

}  // namespace rwkvpeft
