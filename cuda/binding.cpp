// The Python module: tensors come allocated and are checked here only as far as memory depends on it.
#include "common/binding.h"

#include "common/diagonal.h"
#include "wkv7/chunked_binding.h"
#include "wkv7/sequential.h"

namespace rwkvpeft {
namespace {

void wkv7_forward(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& a, const at::Tensor& b, const Maybe& state, const at::Tensor& y,
                  const at::Tensor& final_state, const Maybe& checkpoints, const Maybe& removed) {
  const c10::cuda::CUDAGuard guard(v.device());
  const auto of = [&](const at::Tensor& tensor) {
    TORCH_CHECK(tensor.numel() == v.numel(), "rwkvpeft: operands of different sizes");
    return address(tensor, v, v.scalar_type());
  };
  const Wkv7Forward call{of(r), of(w), of(k), of(v), of(a), of(b), floats(state, v), of(y), floats(final_state, v),
                         floats(checkpoints, v), floats(removed, v), v.size(0), v.size(1), v.size(2)};
  check(wkv7_sequential_forward(call, element_of(v), static_cast<int>(v.size(3)), c10::cuda::getCurrentCUDAStream()),
        "wkv7 forward");
}

void wkv7_backward(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& a, const at::Tensor& b, const at::Tensor& checkpoints, const at::Tensor& removed,
                   const Maybe& dy, const Maybe& dfinal, const std::vector<at::Tensor>& grads, const Maybe& dstate) {
  const c10::cuda::CUDAGuard guard(v.device());
  const auto of = [&](const at::Tensor& tensor) {
    TORCH_CHECK(tensor.numel() == v.numel(), "rwkvpeft: operands of different sizes");
    return address(tensor, v, v.scalar_type());
  };
  const auto grad = [&](std::size_t i) { return grads.empty() ? nullptr : of(grads.at(i)); };
  const Wkv7Backward call{of(r), of(w), of(k), of(v), of(a), of(b), floats(checkpoints, v), floats(removed, v),
                          dy.has_value() ? of(*dy) : nullptr, floats(dfinal, v), grad(0), grad(1), grad(2), grad(3),
                          grad(4), grad(5), floats(dstate, v), v.size(0), v.size(1), v.size(2)};
  check(wkv7_sequential_backward(call, element_of(v), static_cast<int>(v.size(3)), c10::cuda::getCurrentCUDAStream()),
        "wkv7 backward");
}

// wkv5 (CONSTANT) and wkv6 differ in the size and type of w.
template <bool CONSTANT>
void diagonal_forward(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k, const at::Tensor& v,
                      const at::Tensor& u, const Maybe& state, const at::Tensor& y, const at::Tensor& final_state,
                      const Maybe& checkpoints) {
  const c10::cuda::CUDAGuard guard(v.device());
  const auto of = [&](const at::Tensor& tensor) {
    TORCH_CHECK(tensor.numel() == v.numel(), "rwkvpeft: operands of different sizes");
    return address(tensor, v, v.scalar_type());
  };
  const DiagonalForward call{of(r), CONSTANT ? floats(w, v) : of(w), of(k), of(v), floats(u, v), floats(state, v),
                             of(y), floats(final_state, v), floats(checkpoints, v), v.size(0), v.size(1), v.size(2)};
  const auto run = CONSTANT ? wkv5_forward : wkv6_forward;
  check(run(call, element_of(v), static_cast<int>(v.size(3)), c10::cuda::getCurrentCUDAStream()), "wkv forward");
}

template <bool CONSTANT>
void diagonal_backward(const at::Tensor& r, const at::Tensor& w, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& u, const at::Tensor& checkpoints, const Maybe& dy, const Maybe& dfinal,
                       const std::vector<at::Tensor>& grads, const Maybe& scratch, const Maybe& dstate) {
  const c10::cuda::CUDAGuard guard(v.device());
  const auto of = [&](const at::Tensor& tensor) {
    TORCH_CHECK(tensor.numel() == v.numel(), "rwkvpeft: operands of different sizes");
    return address(tensor, v, v.scalar_type());
  };
  const auto grad = [&](std::size_t i) { return grads.empty() ? nullptr : of(grads.at(i)); };
  void* dw = grads.empty() ? nullptr : CONSTANT ? floats(grads.at(1), v) : of(grads.at(1));
  const DiagonalBackward call{of(r), CONSTANT ? floats(w, v) : of(w), of(k), of(v), floats(u, v),
                              floats(checkpoints, v), dy.has_value() ? of(*dy) : nullptr, floats(dfinal, v),
                              grad(0), dw, grad(2), grad(3), grads.empty() ? nullptr : floats(grads.at(4), v),
                              floats(scratch, v), floats(dstate, v), v.size(0), v.size(1), v.size(2)};
  const auto run = CONSTANT ? wkv5_backward : wkv6_backward;
  check(run(call, element_of(v), static_cast<int>(v.size(3)), c10::cuda::getCurrentCUDAStream()), "wkv backward");
}

}  // namespace
}  // namespace rwkvpeft

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace rwkvpeft;
  module.def("wkv7_forward", &wkv7_forward);
  module.def("wkv7_backward", &wkv7_backward);
  module.def("wkv6_forward", &diagonal_forward<false>);
  module.def("wkv6_backward", &diagonal_backward<false>);
  module.def("wkv5_forward", &diagonal_forward<true>);
  module.def("wkv5_backward", &diagonal_backward<true>);
  bind_chunked_wkv7(module);
}
