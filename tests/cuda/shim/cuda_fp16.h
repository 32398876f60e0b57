// Test-only stand-in: fp16 as its bits, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half { unsigned short bits; };
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half value) {
  const unsigned exponent = value.bits >> 10 & 0x1fu, fraction = value.bits & 0x3ffu;
  float size;
  if (exponent == 31) {
    size = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    size = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    size = std::ldexp(static_cast<float>(fraction | 0x400u), static_cast<int>(exponent) - 25);
  }
  return value.bits & 0x8000u ? -size : size;
}

inline __half __float2half(float x) {
  const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  // in steps of the last place; a carry into the exponent comes out right by itself
  const unsigned steps = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  const unsigned bits = size < 0x1p-14f ? steps : (static_cast<unsigned>(exponent + 15) << 10) + steps - 0x400u;
  return {static_cast<unsigned short>(sign | bits)};
}

inline __half __float2half_rn(float x) { return __float2half(x); }
