// The operators of CUDA. This file needs CUDA's headers and none of its libraries but the runtime; what only a torch with
// CUDA has is looked up when a call is made, so that the library loads on every torch.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <string_view>

#include "on_cuda.h"

namespace fusedrnn {
namespace {

void* current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(getter, "fusedrnn: tensors are on a CUDA device, but this torch has no libtorch_cuda.so loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

struct Gpu {
  using Guard = torch::stable::accelerator::DeviceGuard;

  static int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
    STD_TORCH_CHECK(error == cudaSuccess, "fusedrnn: CUDA does not describe device ", device, ": ", cudaGetErrorString(error));
    return value;
  }

  static CudaContext context(int32_t device, bool allow_tf32) {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    STD_TORCH_CHECK(major >= 8, "fusedrnn: CUDA devices must be of compute capability 8.0 or newer, got one of ", major, ".x");
    const Chip chip{attribute(cudaDevAttrMultiProcessorCount, device),
                    attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device), major};
    const char* wanted = std::getenv("FUSEDRNN_KERNEL");  // its other names are Python's matter
    return {chip, current_stream(device), major >= 9, allow_tf32, regimes_named(wanted ? wanted : "")};
  }
};

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) {
  m.impl("recurrence_forward", TORCH_BOX(&fusedrnn::recurrence_forward<fusedrnn::OnCuda<fusedrnn::Gpu>>));
  m.impl("recurrence_backward", TORCH_BOX(&fusedrnn::recurrence_backward<fusedrnn::OnCuda<fusedrnn::Gpu>>));
  m.impl("stack_forward", TORCH_BOX(&fusedrnn::stack_forward<fusedrnn::OnCuda<fusedrnn::Gpu>>));
  m.impl("stack_backward", TORCH_BOX(&fusedrnn::stack_backward<fusedrnn::OnCuda<fusedrnn::Gpu>>));
}
