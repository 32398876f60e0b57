#include "common/diagonal.cuh"

namespace rwkvpeft {

cudaError_t wkv6_forward(const DiagonalForward& call, Element element, int head_size, cudaStream_t stream) {
  return dispatch(element, head_size, [&](auto* type, auto size) {
    return diagonal::forward<std::remove_pointer_t<decltype(type)>, size, false>(call, stream);
  });
}

cudaError_t wkv6_backward(const DiagonalBackward& call, Element element, int head_size, cudaStream_t stream) {
  return dispatch(element, head_size, [&](auto* type, auto size) {
    return diagonal::backward<std::remove_pointer_t<decltype(type)>, size, false>(call, stream);
  });
}

}  // namespace rwkvpeft
