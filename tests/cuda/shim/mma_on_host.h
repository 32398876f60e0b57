// Test-only stand-in for the tensor core, matrix load and asynchronous copy instructions of cuda/common/mma.cuh: the
// fragments lie in the lanes as the PTX manual lays them out, products of bf16 are exact and sums are floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>

namespace rwkvpeft {
namespace device {

inline float float_of_bits(std::uint32_t bits) { return __uint_as_float(bits); }

inline float half_of(std::uint32_t word, int which) {
  return float_of_bits(which ? word & 0xffff0000u : word << 16);
}

inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  struct Fragments {
    std::uint32_t a[4], b[2];
  };
  const shim::Exchange<Fragments> lanes(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (int i = 0; i < 4; ++i) {
    const int row = shim::lane() / 4 + (i / 2) * 8, column = shim::lane() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Fragments left = lanes.see(row % 8 * 4 + k % 8 / 2), right = lanes.see(column * 4 + k % 8 / 2);
      d[i] += half_of(left.a[row / 8 + k / 8 * 2], k % 2) * half_of(right.b[k / 8], k % 2);
    }
  }
}

template <bool TRANSPOSED>
void load_matrices(std::uint32_t (&words)[4], const unsigned short* row) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) throw std::runtime_error("a matrix row is not aligned to 16 bytes");
  const shim::Exchange<const unsigned short*> lanes(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const int major = shim::lane() / 4, minor = shim::lane() % 4 * 2;
    unsigned short halves[2];
    for (int i = 0; i < 2; ++i) {
      halves[i] = TRANSPOSED ? lanes.see(8 * matrix + minor + i)[major] : lanes.see(8 * matrix + major)[minor + i];
    }
    words[matrix] = halves[0] | static_cast<std::uint32_t>(halves[1]) << 16;
  }
}

inline void copy_16_bytes(void* shared, const void* global) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 || reinterpret_cast<std::uintptr_t>(global) % 16) {
    throw std::runtime_error("a copy is not aligned to 16 bytes");
  }
  shim::copy(shared, global);
}

inline void wait_for_copies() { shim::finish_copies(); }

inline std::uint32_t pack(float low, float high) {
  return __float2bfloat16(low).bits | static_cast<std::uint32_t>(__float2bfloat16(high).bits) << 16;
}

inline float exp2_of(float x) { return std::exp2(x); }

inline float reciprocal(float x) { return 1.0f / x; }

}  // namespace device
}  // namespace rwkvpeft
