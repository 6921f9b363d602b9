// Runs CUDA kernels on the CPU: include this instead of cuda_runtime.h and compile with g++ -std=c++20 and the headers of
// the CUDA toolkit (-isystem .../include -isystem .../include/cccl; vector types, cuda_bf16.h and cuda_fp16.h are NVIDIA's).
//
// Every CUDA thread is a fiber. The order in which they run is chosen (options.h) to be as unkind as CUDA allows, shared memory
// starts as NaN, copies come late, dependent grids early: a kernel that forgets to wait gives wrong numbers, and what
// it must not do at all is an Error that says kernel, operation, source line, block and thread. Built with a sanitizer, it
// finds every access out of bounds (Address) and every access that nothing orders, whatever the schedule (Thread).
//
//   cuda_on_host::configure(cuda_on_host::kRandom, /*seed=*/1);
//   cuda_on_host::launch({"scale", dim3(4), dim3(128), /*shared_bytes=*/0, /*overlaps_previous=*/false}, [=] { scale(x, n); });
//   cuda_on_host::synchronize();
//
// Not modelled: wgmma, TMA and its barriers, static shared memory, stale caches, bank conflicts, whether blocks would
// fit on a device together, time. All calls must come from one thread of the host at a time.
#pragma once
#include "collectives.h"
#include "language.h"
#include "launch.h"
#include "matrix.h"
#include "memory.h"
