// What bindings share: from tensors to what kernels are given.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "common/device.cuh"

namespace rwkvpeft {

using Maybe = std::optional<at::Tensor>;

inline Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Element::fp32;
    case at::kBFloat16: return Element::bf16;
    case at::kHalf: return Element::fp16;
    default: TORCH_CHECK(false, "rwkvpeft: no CUDA kernel for ", tensor.scalar_type());
  }
}

// The address of a contiguous tensor of `like`'s device, of `type`.
inline void* address(const at::Tensor& tensor, const at::Tensor& like, at::ScalarType type) {
  TORCH_CHECK(tensor.is_cuda() && tensor.device() == like.device(), "rwkvpeft: tensors on different devices");
  TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == type, "rwkvpeft: expected a contiguous tensor of ",
              type);
  return tensor.data_ptr();
}

inline void* address(const Maybe& tensor, const at::Tensor& like, at::ScalarType type) {
  return tensor.has_value() ? address(*tensor, like, type) : nullptr;
}

inline float* floats(const Maybe& tensor, const at::Tensor& like) {
  return static_cast<float*>(address(tensor, like, at::kFloat));
}

inline void check(cudaError_t result, const char* kernel) {
  TORCH_CHECK(result == cudaSuccess, "rwkvpeft: ", kernel, ": ", cudaGetErrorString(result));
}

}  // namespace rwkvpeft
