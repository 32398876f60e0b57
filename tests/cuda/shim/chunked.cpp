// The chunked wkv7 kernels for ctypes: a call's struct by address, as the kernels take it.
#include "wkv7/chunked.cu"

extern "C" int wkv7_chunked_forward(const rwkvpeft::Wkv7ChunkedForward* call) {
  return rwkvpeft::wkv7_chunked_forward(*call, nullptr);
}

extern "C" int wkv7_chunked_backward(const rwkvpeft::Wkv7ChunkedBackward* call) {
  return rwkvpeft::wkv7_chunked_backward(*call, nullptr);
}
