// Test-only stand-in for CUDA's header: kernels compiled by a host compiler run on a CPU, one block after another,
// each thread of a block on a stack of its own (a fiber). Threads switch at barriers and shuffles only, in an order
// that the test chooses: a missing barrier shows as a result that depends on the order, and a barrier that some threads
// never reach as an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define CUDA_SHIM 1
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static  // one block runs at a time
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int warp_size = 32;
constexpr std::size_t stack_bytes = 256 << 10;

struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

// In what order threads go on. By warps: each as far as it comes before the next one gets its turn.
enum Order { forwards = 0, backwards = 1, by_warps = 2, shuffled = 3 };

struct Schedule {
  int order = forwards;
  bool late_copies = false;  // whether asynchronous copies are made when they are waited for, or at once
  std::mt19937 random;
};

inline Schedule schedule;

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;  // enters the fiber once; afterwards jumps do, which cost no system call
  jmp_buf place;
  bool entered = false;
  std::unique_ptr<char[]> stack;
  dim3 index;
  bool finished = false;
  std::vector<Copy> copies;  // those not made yet
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[warp_size][64];  // what lanes show each other
};

struct Block {
  jmp_buf scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<unsigned char> shared;
  std::function<void()> body;
  int current = 0;
  bool progress = false;
};

inline Block* block = nullptr;

inline int thread_number() { return block->current; }
inline int lane() { return thread_number() % warp_size; }
inline Warp& warp() { return block->warps[thread_number() / warp_size]; }

inline void yield() {
  if (_setjmp(block->fibers[block->current].place) == 0) _longjmp(block->scheduler, 1);
}

// Until the fiber yields or ends.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.place, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}

inline void wait(Barrier& barrier) {
  const long mine = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    block->progress = true;
    return;
  }
  while (barrier.generation == mine) yield();
}

inline void enter() {
  Fiber& fiber = block->fibers[block->current];
  block->body();
  fiber.finished = true;
  block->progress = true;
  _longjmp(block->scheduler, 1);
}

// Dynamic shared memory of the running block; filled with NaN patterns, as a GPU promises nothing either.
inline void* dynamic_shared() { return block->shared.data() + (16 - reinterpret_cast<std::uintptr_t>(block->shared.data()) % 16) % 16; }

// Starts copying 16 bytes.
inline void copy(void* to, const void* from) {
  if (schedule.late_copies) {
    block->fibers[block->current].copies.push_back({to, from});
  } else {
    std::memcpy(to, from, 16);
  }
}

// Makes the copies that this thread started.
inline void finish_copies() {
  std::vector<Copy>& copies = block->fibers[block->current].copies;
  for (const Copy& one : copies) std::memcpy(one.to, one.from, 16);
  copies.clear();
}

// `count` numbers from `first` on, in the order of the schedule.
inline std::vector<int> turns(int first, int count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), first);
  if (schedule.order == backwards) std::reverse(order.begin(), order.end());
  if (schedule.order == shuffled) std::shuffle(order.begin(), order.end(), schedule.random);
  return order;
}

// Lets `count` threads from `first` on go on once each. Returns whether any came further.
inline bool go_on(Block& now, int first, int count) {
  now.progress = false;
  for (int i : turns(first, count)) {
    Fiber& fiber = now.fibers[i];
    if (fiber.finished) continue;
    now.current = i;
    threadIdx = fiber.index;
    resume(fiber);
  }
  return now.progress;
}

inline void run_block(Block& now, dim3 index) {
  block = &now;
  blockIdx = index;
  std::fill(now.shared.begin(), now.shared.end(), 0xff);
  const int threads = static_cast<int>(now.fibers.size());
  now.barrier = Barrier{threads};
  for (std::size_t i = 0; i < now.warps.size(); ++i) {
    now.warps[i].barrier = Barrier{std::min(warp_size, threads - static_cast<int>(i) * warp_size)};
  }
  for (Fiber& fiber : now.fibers) {
    fiber.finished = fiber.entered = false;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  const auto unfinished = [&] {
    return std::any_of(now.fibers.begin(), now.fibers.end(), [](const Fiber& fiber) { return !fiber.finished; });
  };
  const bool by_warp = schedule.order == by_warps || schedule.order == shuffled;
  for (bool progress = true; unfinished();) {
    if (!progress) {
      std::fprintf(stderr, "shim: threads wait at a barrier that others do not reach\n");
      std::abort();
    }
    progress = false;
    if (!by_warp) {
      progress = go_on(now, 0, threads);
      continue;
    }
    for (int number : turns(0, static_cast<int>(now.warps.size()))) {
      const int first = number * warp_size;
      while (go_on(now, first, std::min(warp_size, threads - first))) progress = true;
    }
  }
  block = nullptr;
}

// For ctypes: the schedule of every launch from now on.
extern "C" __attribute__((used)) inline void set_schedule(int order, int late_copies, unsigned seed) {
  schedule = Schedule{order, late_copies != 0, std::mt19937(seed)};
}

// Runs `body` once for each thread of each block.
inline void launch(dim3 grid, dim3 threads, std::size_t shared_bytes, std::function<void()> body) {
  Block now;
  const int count = static_cast<int>(threads.x * threads.y * threads.z);
  now.fibers.resize(count);
  now.warps.resize((count + warp_size - 1) / warp_size);
  now.shared.resize(shared_bytes + 16);
  now.body = std::move(body);
  for (int i = 0; i < count; ++i) {
    now.fibers[i].stack.reset(new char[stack_bytes]);
    now.fibers[i].index = dim3(i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y));
  }
  gridDim = grid;
  blockDim = threads;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run_block(now, dim3(x, y, z));
}

// Every lane of the warp shows `mine`; afterwards see(lane) is what that lane showed, until the lanes part.
template <typename T>
struct Exchange {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]), "a lane shows at most one slot");
  Warp& own;
  explicit Exchange(const T& mine) : own(warp()) {
    std::memcpy(own.slots[lane()], &mine, sizeof(T));
    wait(own.barrier);
  }
  T see(int lane_number) const {
    T value;
    std::memcpy(&value, own.slots[lane_number], sizeof(T));
    return value;
  }
  ~Exchange() { wait(own.barrier); }  // nobody may show anything new before all have looked
};

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::block->barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { shim::wait(shim::warp().barrier); }

template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = shim::warp_size) {
  const int first = shim::lane() / width * width;
  return shim::Exchange<T>(value).see(first + (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = shim::warp_size) {
  const int other = shim::lane() ^ mask;
  const bool inside = other / width == shim::lane() / width;
  return shim::Exchange<T>(value).see(inside ? other : shim::lane());
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = shim::warp_size) {
  const int other = shim::lane() + static_cast<int>(delta);
  const bool inside = other / width == shim::lane() / width;
  return shim::Exchange<T>(value).see(inside ? other : shim::lane());
}

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int width = shim::warp_size) {
  const int other = shim::lane() - static_cast<int>(delta);
  const bool inside = other >= shim::lane() / width * width;
  return shim::Exchange<T>(value).see(inside ? other : shim::lane());
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
template <typename T>
T __ldg(const T* address) { return *address; }

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
