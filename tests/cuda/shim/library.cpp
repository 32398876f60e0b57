// The kernels of cuda/, for the CPU, behind functions that Python's ctypes can call.
#include "wkv5/wkv5_sequential.cu"
#include "wkv6/wkv6_sequential.cu"
#include "wkv7/wkv7_sequential.cu"

#define EXPORT(NAME, RUN, CALL)                                                         \
  extern "C" int NAME(const rwkvpeft::CALL* call, int element, int head_size) {         \
    return rwkvpeft::RUN(*call, static_cast<rwkvpeft::Element>(element), head_size, nullptr); \
  }

EXPORT(wkv5_forward, wkv5_forward, DiagonalForward)
EXPORT(wkv5_backward, wkv5_backward, DiagonalBackward)
EXPORT(wkv6_forward, wkv6_forward, DiagonalForward)
EXPORT(wkv6_backward, wkv6_backward, DiagonalBackward)
EXPORT(wkv7_forward, wkv7_sequential_forward, Wkv7Forward)
EXPORT(wkv7_backward, wkv7_sequential_backward, Wkv7Backward)
