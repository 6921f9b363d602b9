// Every device primitive that the kernels use, and how a kernel is launched: one name, two bodies. On a GPU a name stands for
// an instruction; where FUSEDRNN_ON_HOST is defined, for its meaning on the CPU (tests/cuda_on_host), which also finds its
// misuse. Kernels contain no inline assembly and no CUDA built-in beside blockIdx, threadIdx and the like.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(FUSEDRNN_ON_HOST)
#include "cuda_on_host.h"
#define FUSEDRNN_SITE , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define FUSEDRNN_ONLY_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FUSEDRNN_SITE
#define FUSEDRNN_ONLY_SITE
#endif

#define FUSEDRNN_DEVICE __device__ __forceinline__

namespace fusedrnn {
namespace prims {

// ---- Barriers, and what lanes hand to each other ----

// Waits for all threads of the block, and makes what they wrote visible to one another.
FUSEDRNN_DEVICE void block_sync(FUSEDRNN_ONLY_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::block_sync({"block_sync", file, line});
#else
  __syncthreads();
#endif
}

// Waits for all threads of the warp: what a whole warp does together may follow.
FUSEDRNN_DEVICE void warp_sync(FUSEDRNN_ONLY_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::warp_sync(cuda_on_host::kWholeWarp, {"warp_sync", file, line});
#else
  __syncwarp();
#endif
}

// The number of the lane whose place in the warp differs from this one's in the bits of `bits`. By a whole warp.
template <class T>
FUSEDRNN_DEVICE T of_lane_across(T number, int bits FUSEDRNN_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  using cuda_on_host::Shuffle;
  return cuda_on_host::shuffle(Shuffle::kXor, cuda_on_host::kWholeWarp, number, bits, 32, {"of_lane_across", file, line});
#else
  return __shfl_xor_sync(0xffffffffu, number, bits);
#endif
}

// Waits until the grid before this one on the stream has ended, and sees all it wrote. Every thread of a grid that was
// launched with `overlaps` calls it before it touches what that grid wrote, and before it exits. Elsewhere it does nothing.
FUSEDRNN_DEVICE void wait_for_previous_grid(FUSEDRNN_ONLY_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::grid_dependency_wait(file, line);
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next grid's blocks may take the room that is left on the chip, from when all blocks of this one have said so.
FUSEDRNN_DEVICE void let_next_grid_start() {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::grid_dependency_trigger();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- Words by which blocks that are on the chip at once speak to each other ----

// Writes a word. Who sees it with wait_until sees all that this thread wrote or saw before, in memory of the whole chip.
FUSEDRNN_DEVICE void store_release(uint32_t* to, uint32_t value) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::st_release(to, value);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
#endif
}

// Waits until a word that another block writes, and only increases, has reached `value`; it may pass 2^32 by less than 2^31.
// In builds with FUSEDRNN_BOUNDED_WAITS it gives up after some seconds, as an error of the launch.
FUSEDRNN_DEVICE void wait_until(const uint32_t* word, uint32_t value FUSEDRNN_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  while (int32_t(cuda_on_host::ld_acquire(word, file, line) - value) < 0) cuda_on_host::spin_pause(file, line);
#else
  uint32_t found;  // polled without order, which empties no cache
#if defined(FUSEDRNN_BOUNDED_WAITS)
  constexpr uint32_t kPatience = 1u << 24;
  for (uint32_t tries = 0;; ++tries) {
    if (tries == kPatience) __trap();
#else
  for (;;) {
#endif
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(word) : "memory");
    if (int32_t(found - value) >= 0) break;
  }
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(word) : "memory");
#endif
}

// ---- Clusters: blocks that are neighbours on the chip (sm_90) ----

// All threads of the cluster arrive, and wait before they arrive again: then each sees what the others wrote before they arrived, in
// shared memory too. Between the two is time for what needs nobody.
FUSEDRNN_DEVICE void cluster_arrive(FUSEDRNN_ONLY_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::cluster_arrive(file, line);
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
FUSEDRNN_DEVICE void cluster_wait(FUSEDRNN_ONLY_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::cluster_wait(file, line);
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Where what lies here in this block's shared memory lies in that of another block of the cluster, by its number there.
template <class T>
FUSEDRNN_DEVICE T* in_block(T* shared, unsigned block FUSEDRNN_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  return cuda_on_host::shared_of_rank(shared, block, file, line);
#elif __CUDA_ARCH__ >= 900
  uint64_t found;
  asm("mapa.u64 %0, %1, %2;" : "=l"(found) : "l"(shared), "r"(block));
  return reinterpret_cast<T*>(found);
#else
  return shared;  // no cluster is launched here
#endif
}

// ---- Shared memory ----

// Hands out the block's dynamic shared memory piece by piece, each 16-byte aligned. All threads take the same.
struct Shared {
#if defined(FUSEDRNN_ON_HOST)
  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(cuda_on_host::shared_take(count * sizeof(T)));
  }
#else
  unsigned char* next;
  FUSEDRNN_DEVICE Shared() {
    extern __shared__ __align__(128) unsigned char memory[];
    next = memory;
  }
  template <class T>
  FUSEDRNN_DEVICE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += (unsigned(count) * unsigned(sizeof(T)) + 15) / 16 * 16;  // of less than 4 GiB
    return piece;
  }
#endif
};

// ---- The matrix units: sum (16, 8) += a (16, k) b (k, 8) by a whole warp, in the fragments of PTX's mma.sync ----

// In each lane, g = lane / 4 and t = lane % 4. sum: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). k = 16, two numbers a
// register, the lower k in the lower half. a: (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8). b: (2t, g), (2t+8, g).
FUSEDRNN_DEVICE void mma(__nv_bfloat16, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FUSEDRNN_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::mma_m16n8k16_bf16(sum, a, b, file, line);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
FUSEDRNN_DEVICE void mma(__half, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FUSEDRNN_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::mma_m16n8k16_f16(sum, a, b, file, line);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// k = 8, one TF32 number a register: a float whose low 13 bits are zero. a: (g, t), (g+8, t), (g, t+4), (g+8, t+4).
// b: (t, g), (t+4, g).
FUSEDRNN_DEVICE void mma(float, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FUSEDRNN_SITE) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::mma_m16n8k8_tf32(sum, a, b, file, line);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace prims

// ---- Launching ----

// Where a kernel runs. On the host there is one queue, and `stream` is not looked at.
struct Queue {
  void* stream;          // a cudaStream_t
  bool overlaps;         // whether the chip lets a grid start before the one before it has ended (sm_90)
  int64_t shared_bytes;  // the most that a block may have on this device
  int multiprocessors;   // of this device
};

struct Grid {
  int64_t blocks;
  int directions, threads;   // or the layers of a stack
  int64_t shared_bytes;
  bool overlaps;             // may start before the grid before it has ended, and waits for it by itself
  bool all_at_once = false;  // its blocks wait for each other, so that all must be on the chip: one to a multiprocessor
  int cluster = 1;           // so many are neighbours and may read each other's shared memory (sm_90)
  int heads = 1;             // of each direction
};

// Runs kernel(args) on the queue; blockIdx.z is the direction, or the layer, blockIdx.y the head. Raises std::runtime_error with the kernel's name
// if CUDA refuses.
template <class Args>
void launch(const char* name, void (*kernel)(Args), const Grid& grid, const Queue& queue, const Args& args) {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::Launch launch{};
  launch.name = name;
  launch.grid = dim3(unsigned(grid.blocks), unsigned(grid.heads), unsigned(grid.directions));
  launch.block = dim3(unsigned(grid.threads));
  launch.shared_bytes = size_t(grid.shared_bytes);
  launch.overlaps_previous = grid.overlaps && queue.overlaps;
  launch.cooperative = grid.all_at_once || grid.cluster > 1;
  if (grid.all_at_once) launch.most_resident = unsigned(queue.multiprocessors);
  launch.cluster = unsigned(grid.cluster);
  cuda_on_host::launch(launch, [kernel, args] { kernel(args); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.blocks), unsigned(grid.heads), unsigned(grid.directions));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  cudaLaunchAttribute attributes[3]{};
  config.attrs = attributes;
  if (grid.overlaps && queue.overlaps) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.all_at_once) {  // CUDA refuses it otherwise
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  constexpr int64_t kWithoutAsking = 48 << 10;  // bytes of shared memory that every kernel may have
  cudaError_t error = cudaSuccess;
  // The limit is the kernel's, not the launch's: were it lowered to what this grid needs, another thread of the host, about
  // to launch the same kernel with more, would be refused.
  if (grid.shared_bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(queue.shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args);
  if (error != cudaSuccess) {
    cudaGetLastError();  // it is told here; the next call is not to find it again
    throw std::runtime_error(std::string("fusedrnn: CUDA did not launch ") + name + ": " + cudaGetErrorString(error));
  }
#endif
}

// Whether the code that this device runs was made for sm_90 or later. Where the library has none, a later chip runs an older
// one's PTX, in which wait_for_previous_grid does nothing and a cluster is none.
template <class Args>
bool is_made_for_sm_90(void (*kernel)(Args)) {
#if defined(FUSEDRNN_ON_HOST)
  (void)kernel;
  return true;
#else
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) return attributes.ptxVersion >= 90;
  cudaGetLastError();  // the launch will say what is wrong
  return false;
#endif
}

// All launches of a call are made. On the host they are run now.
inline void end_of_launches() {
#if defined(FUSEDRNN_ON_HOST)
  cuda_on_host::synchronize();
#endif
}

}  // namespace fusedrnn
