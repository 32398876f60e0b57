#include "wkv7/sequential.cuh"

namespace rwkvpeft {

cudaError_t wkv7_sequential_forward(const Wkv7Forward& call, Element element, int head_size, cudaStream_t stream) {
  return dispatch(element, head_size, [&](auto* type, auto size) {
    return wkv7::forward<std::remove_pointer_t<decltype(type)>, size>(call, stream);
  });
}

cudaError_t wkv7_sequential_backward(const Wkv7Backward& call, Element element, int head_size, cudaStream_t stream) {
  return dispatch(element, head_size, [&](auto* type, auto size) {
    return wkv7::backward<std::remove_pointer_t<decltype(type)>, size>(call, stream);
  });
}

}  // namespace rwkvpeft
