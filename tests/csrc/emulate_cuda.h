// Runs the kernels of csrc/cuda on a CPU, so that their results can be tested where there is no GPU: every thread is a
// coroutine, blocks come one after another. Threads run in an order that changes from barrier to barrier, so that a
// barrier that is missing shows; one that not all threads reach, and a lane that misses its warp's exchange, is an
// error. Slow, and for tests only: emulate_cuda.py puts `launch` in the place of <<<>>> and reads this file first.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#define __global__ [[maybe_unused]] static
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using __nv_bfloat16 = c10::BFloat16;
using __half = c10::Half;
using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 0;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulated {

constexpr unsigned kLanes = 32, kMostThreads = 1024, kMostRows = 65535;
constexpr size_t kStack = size_t{1} << 17, kMostShared = size_t{48} << 10;

struct Barrier {
  unsigned arrived = 0;
  uint64_t generation = 0;
};
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  unsigned place;
  Barrier* waits = nullptr;  // for it to leave this generation
  uint64_t generation = 0;
  bool done = false;
};
// The block that runs.
struct Block {
  dim3 grid, size, index;
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  std::vector<uint64_t> lanes = std::vector<uint64_t>(kMostThreads);
  std::vector<char> shared;
  Barrier all;
  bool any = false;  // of the threads of a __syncthreads_or
  unsigned running = 0;
  Thread* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::minstd_rand order{1};
};
inline Block block;
inline std::mutex one_launch;

inline void release_if(Barrier& barrier, unsigned expected) {
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
}
inline void wait(Barrier& barrier, unsigned expected) {
  Thread& self = *block.current;
  self.waits = &barrier, self.generation = barrier.generation;
  ++barrier.arrived;
  release_if(barrier, expected);
  if (barrier.generation == self.generation) swapcontext(&self.context, &block.scheduler);
  self.waits = nullptr;
}
inline void wait_warp(unsigned mask) {
  STD_TORCH_CHECK(mask == 0xffffffffu, "emulated CUDA: exchanges of a part of a warp are not emulated");
  wait(block.warps[block.current->place / kLanes], kLanes);
}
// What every lane of the warp gives, as bits.
template <class T>
const uint64_t* exchange(unsigned mask, T own) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned place = block.current->place;
  wait_warp(mask);
  std::memcpy(&block.lanes[place], &own, sizeof own);
  wait_warp(mask);
  return &block.lanes[place / kLanes * kLanes];
}
template <class T>
T from_lane(unsigned mask, T own, unsigned lane) {
  const uint64_t* lanes = exchange(mask, own);
  T value;
  std::memcpy(&value, lanes + lane, sizeof value);
  return value;
}

inline void enter() {
  block.kernel();
  Thread& self = *block.current;
  self.done = true;
  release_if(block.all, --block.running);
  swapcontext(&self.context, &block.scheduler);
}

inline void run_block() {
  const unsigned count = block.size.x * block.size.y * block.size.z;
  while (block.threads.size() < count) block.threads.emplace_back();
  block.warps.assign((count + kLanes - 1) / kLanes, {});
  block.all = {}, block.any = false, block.running = count;
  std::fill(block.shared.begin(), block.shared.end(), '\xff');  // NaN in every format
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = dim3(i % block.size.x, i / block.size.x % block.size.y, i / block.size.x / block.size.y);
    thread.place = i, thread.waits = nullptr, thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  while (block.running > 0) {
    std::shuffle(order.begin(), order.end(), block.order);
    bool moved = false;
    for (unsigned i : order) {
      Thread& thread = block.threads[i];
      if (thread.done || (thread.waits && thread.waits->generation == thread.generation)) continue;
      moved = true;
      block.current = &thread;
      swapcontext(&block.scheduler, &thread.context);
    }
    STD_TORCH_CHECK(moved, "emulated CUDA: threads wait for a barrier that not all of their block or warp reach");
  }
}

struct Launch {
  dim3 grid, size;
  size_t shared;
  template <class Kernel, class... Args>
  void operator()(Kernel kernel, const Args&... args) const {
    const bool fits = grid.x && grid.y && grid.z && grid.y <= kMostRows && grid.z <= kMostRows &&
                      size.x * size.y * size.z - 1 < kMostThreads && shared <= kMostShared;
    STD_TORCH_CHECK(fits, "emulated CUDA: invalid configuration of a launch");
    const std::lock_guard<std::mutex> lock(one_launch);
    block.grid = grid, block.size = size;
    block.shared.resize(shared + sizeof(uint4));
    block.kernel = [&] { kernel(args...); };
    for (unsigned z = grid.z; z-- > 0;)  // backwards: nothing may rely on an order of blocks
      for (unsigned y = grid.y; y-- > 0;)
        for (unsigned x = grid.x; x-- > 0;) block.index = dim3(x, y, z), run_block();
  }
};
inline Launch launch(dim3 grid, dim3 size, size_t shared, cudaStream_t) { return {grid, size, shared}; }

template <class T>
T* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(block.shared.data());
  return reinterpret_cast<T*>((address + sizeof(uint4) - 1) / sizeof(uint4) * sizeof(uint4));
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

}  // namespace emulated

#define threadIdx (emulated::block.current->index)
#define blockIdx (emulated::block.index)
#define blockDim (emulated::block.size)
#define gridDim (emulated::block.grid)

inline void __syncthreads() { emulated::wait(emulated::block.all, emulated::block.running); }
inline int __syncthreads_or(int own) {
  emulated::block.any |= own != 0;
  __syncthreads();
  const bool any = emulated::block.any;
  __syncthreads();
  emulated::block.any = false;
  __syncthreads();
  return any;
}
template <class T>
T __shfl_up_sync(unsigned mask, T own, unsigned delta) {
  const unsigned lane = emulated::block.current->place % emulated::kLanes;
  return emulated::from_lane(mask, own, lane < delta ? lane : lane - delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T own, unsigned bits) {
  return emulated::from_lane(mask, own, emulated::block.current->place % emulated::kLanes ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, bool own) {
  const uint64_t* lanes = emulated::exchange(mask, uint64_t{own});
  unsigned bits = 0;
  for (unsigned i = 0; i < emulated::kLanes; ++i) bits |= static_cast<unsigned>(lanes[i]) << i;
  return bits;
}
template <class T>
void atomicMin(T* to, T value) {
  *to = std::min(*to, value);
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __half __float2half_rn(float x) { return __half(x); }

inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 20, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t size, cudaStream_t) {
  return std::memset(to, byte, size), cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(EXPR) STD_TORCH_CHECK((EXPR) == cudaSuccess)
#define STD_CUDA_KERNEL_LAUNCH_CHECK()
