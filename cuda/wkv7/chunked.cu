#include "wkv7/chunked_backward.cuh"
#include "wkv7/chunked_forward.cuh"

namespace rwkvpeft {
namespace {

// One block for each head of each sequence.
template <typename Memory, typename Call>
cudaError_t launch_walk(void (*kernel)(Call), const Call& call, cudaStream_t stream) {
  const int64_t blocks = call.rows.sequences * call.rows.heads;
  if (blocks > INT32_MAX || call.rows.tokens > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks)), block(wkv7_chunked::Sizes<WKV7_CHUNKED_HEAD>::THREADS);
  return launch(kernel, grid, block, static_cast<int>(sizeof(Memory)), stream, call);
}

}  // namespace

cudaError_t wkv7_chunked_forward(const Wkv7ChunkedForward& call, cudaStream_t stream) {
  using Memory = wkv7_chunked::ForwardMemory<WKV7_CHUNKED_HEAD>;
  return launch_walk<Memory>(wkv7_chunked::forward_kernel<WKV7_CHUNKED_HEAD>, call, stream);
}

cudaError_t wkv7_chunked_backward(const Wkv7ChunkedBackward& call, cudaStream_t stream) {
  using Memory = wkv7_chunked::BackwardMemory<WKV7_CHUNKED_HEAD>;
  return launch_walk<Memory>(wkv7_chunked::backward_kernel<WKV7_CHUNKED_HEAD>, call, stream);
}

}  // namespace rwkvpeft
