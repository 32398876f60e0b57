// wkv7 over chunks for the Python module: tensors come allocated and are checked here only as far as memory depends on
// it. Packed sequences come as the two tables of where their chunks lie, otherwise both are None.
#include "wkv7/chunked_binding.h"

#include <cstdint>

#include "common/binding.h"
#include "wkv7/chunked.h"

namespace rwkvpeft {
namespace {

const void* aligned(const void* address) {
  TORCH_CHECK(reinterpret_cast<std::uintptr_t>(address) % 16 == 0, "rwkvpeft: a tensor is not aligned to 16 bytes");
  return address;
}

void* operand(const at::Tensor& tensor, const at::Tensor& v) {
  TORCH_CHECK(tensor.numel() == v.numel(), "rwkvpeft: operands of different sizes");
  void* found = address(tensor, v, at::kBFloat16);
  aligned(found);
  return found;
}

Wkv7Rows rows_of(const at::Tensor& v, const Maybe& chunks, const Maybe& first) {
  TORCH_CHECK(v.dim() == 4 && v.size(3) == WKV7_CHUNKED_HEAD, "rwkvpeft: chunked wkv7 takes heads of ",
              WKV7_CHUNKED_HEAD);
  TORCH_CHECK(chunks.has_value() == first.has_value(), "rwkvpeft: one table of chunks without the other");
  const auto table = [&](const Maybe& tensor) { return static_cast<const int32_t*>(address(tensor, v, at::kInt)); };
  const int64_t sequences = first.has_value() ? first->numel() - 1 : v.size(0);
  return {table(chunks), table(first), sequences, v.size(1), v.size(2)};
}

void forward(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
             const at::Tensor& b, const Maybe& state, const at::Tensor& y, const at::Tensor& final_state,
             const Maybe& saved, const Maybe& chunks, const Maybe& first) {
  const c10::cuda::CUDAGuard guard(v.device());
  const auto of = [&](const at::Tensor& tensor) { return operand(tensor, v); };
  const Wkv7ChunkedForward call{of(r), of(w), of(k), of(v), of(a), of(b), floats(state, v), of(y),
                                floats(final_state, v), address(saved, v, at::kBFloat16), rows_of(v, chunks, first)};
  check(wkv7_chunked_forward(call, c10::cuda::getCurrentCUDAStream()), "chunked wkv7 forward");
}

void backward(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
              const at::Tensor& b, const at::Tensor& saved, const Maybe& dy, const Maybe& dfinal,
              const std::vector<at::Tensor>& grads, const Maybe& dstate, const Maybe& chunks, const Maybe& first) {
  const c10::cuda::CUDAGuard guard(v.device());
  const auto of = [&](const at::Tensor& tensor) { return operand(tensor, v); };
  const auto grad = [&](std::size_t i) { return grads.empty() ? nullptr : of(grads.at(i)); };
  const Wkv7ChunkedBackward call{of(r), of(w), of(k), of(v), of(a), of(b),
                                 aligned(address(saved, v, at::kBFloat16)), dy.has_value() ? of(*dy) : nullptr,
                                 floats(dfinal, v), grad(0), grad(1), grad(2), grad(3), grad(4), grad(5),
                                 floats(dstate, v), rows_of(v, chunks, first)};
  check(wkv7_chunked_backward(call, c10::cuda::getCurrentCUDAStream()), "chunked wkv7 backward");
}

}  // namespace

void bind_chunked_wkv7(pybind11::module_& module) {
  module.def("wkv7_chunked_forward", &forward);
  module.def("wkv7_chunked_backward", &backward);
}

}  // namespace rwkvpeft
