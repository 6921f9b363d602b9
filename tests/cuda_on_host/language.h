// CUDA's own names, in the global namespace as nvcc has them: qualifiers, built-in variables and functions.
#pragma once
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "collectives.h"
#include "matrix.h"
#include "memory.h"

// __global__, __device__, __host__ and __forceinline__ come with vector_types.h, and mean nothing or what they say.
#undef __launch_bounds__
#define __launch_bounds__(...)
// A static shared array would quietly be each thread's own.
#undef __shared__
#define __shared__ cuda_on_host_has_no_static_shared_memory_use_shared_take

#define threadIdx (::cuda_on_host::current->index)
#define blockIdx (::cuda_on_host::current->block->index)
#define blockDim (::cuda_on_host::current->block->grid->launch.block)
#define gridDim (::cuda_on_host::current->block->grid->launch.grid)
constexpr int warpSize = 32;

inline void __syncthreads(CUDA_ON_HOST_SITE) { cuda_on_host::block_sync({"__syncthreads", file, line}); }
inline void __syncwarp(unsigned mask = cuda_on_host::kWholeWarp, CUDA_ON_HOST_SITE) {
  cuda_on_host::warp_sync(mask, {"__syncwarp", file, line});
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_ON_HOST_SITE) {
  return cuda_on_host::shuffle(cuda_on_host::Shuffle::kIndex, mask, value, lane, width, {"__shfl_sync", file, line});
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_SITE) {
  return cuda_on_host::shuffle(cuda_on_host::Shuffle::kUp, mask, value, int(delta), width, {"__shfl_up_sync", file, line});
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_SITE) {
  return cuda_on_host::shuffle(cuda_on_host::Shuffle::kDown, mask, value, int(delta), width, {"__shfl_down_sync", file, line});
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_HOST_SITE) {
  return cuda_on_host::shuffle(cuda_on_host::Shuffle::kXor, mask, value, lanes, width, {"__shfl_xor_sync", file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_HOST_SITE) {
  return cuda_on_host::ballot(mask, predicate != 0, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_HOST_SITE) {
  return cuda_on_host::ballot(mask, predicate != 0, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_HOST_SITE) {
  return cuda_on_host::ballot(mask, predicate == 0, {"__all_sync", file, line}) == 0;
}

inline void __threadfence() { cuda_on_host::fence(); }
inline void __threadfence_block() { cuda_on_host::fence(); }
inline void __threadfence_system() { cuda_on_host::fence(); }

inline int atomicAdd(int* to, int value) { return cuda_on_host::atomic_add(to, value); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return cuda_on_host::atomic_add(to, value); }
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return cuda_on_host::atomic_add(to, value);
}
inline float atomicAdd(float* to, float value) { return cuda_on_host::atomic_add(to, value); }
inline double atomicAdd(double* to, double value) { return cuda_on_host::atomic_add(to, value); }

// Plain accesses: that a cache may hold old values is not modelled.
template <class T> inline T __ldg(const T* from) { return *from; }
template <class T> inline T __ldcg(const T* from) { return *from; }
template <class T> inline void __stcg(T* to, T value) { *to = value; }

inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline int __float_as_int(float x) { int bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float __int_as_float(int bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
// More accurate than a device's, whose results differ in the last bits.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;
