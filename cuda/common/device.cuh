// What every kernel includes: the CUDA runtime, the element types, and how a kernel is launched.
//
// Under the tests' stand-in for cuda_runtime.h (CUDA_SHIM) the same kernels run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace rwkvpeft {

enum class Element : int { fp32 = 0, bf16 = 1, fp16 = 2 };

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half(x); }

// Calls `run` with a null pointer of the element type and the head size as a constant.
template <typename Run>
cudaError_t dispatch(Element element, int head_size, const Run& run) {
  const auto with_size = [&](auto* type) {
    if (head_size == 64) return run(type, std::integral_constant<int, 64>());
    if (head_size == 128) return run(type, std::integral_constant<int, 128>());
    return cudaErrorInvalidValue;
  };
  if (element == Element::fp32) return with_size(static_cast<float*>(nullptr));
  if (element == Element::bf16) return with_size(static_cast<__nv_bfloat16*>(nullptr));
  if (element == Element::fp16) return with_size(static_cast<__half*>(nullptr));
  return cudaErrorInvalidValue;
}

#ifdef CUDA_SHIM

template <typename T>
T* dynamic_shared() { return static_cast<T*>(shim::dynamic_shared()); }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  shim::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
  return cudaSuccess;
}

#elif defined(__CUDACC__)

// The block's dynamic shared memory, from its first byte, which is aligned to 16.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// Starts `kernel` on `stream`; a block may have as much shared memory as the GPU allows.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared_bytes > (48 << 10)) {
    const cudaError_t refused =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (refused != cudaSuccess) return refused;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

#endif

}  // namespace rwkvpeft
