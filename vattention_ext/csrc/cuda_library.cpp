// Looking libcuda's functions up; see cuda_library.hpp.
#include "cuda_library.hpp"

#include <dlfcn.h>

#include "errors.hpp"

namespace vattn::cuda {
namespace {

template <typename Function>
void look_up(void* library, const char* symbol, const std::string& path, Function& out) {
  void* found = dlsym(library, symbol);
  if (found == nullptr) {
    throw DriverFailure(path + " has no " + symbol + "; driver 'cuda' needs NVIDIA's driver 450 (CUDA 11) or later");
  }
  out = reinterpret_cast<Function>(found);
}

}  // namespace

Library open_library(const std::string& path) {
  const std::string name = path.empty() ? "libcuda.so.1" : path;
  void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    throw DriverFailure("cannot open " + name + " (" + (why == nullptr ? "unknown error" : why) +
                        "); driver 'cuda' needs NVIDIA's driver, use driver='memfd' on a machine without a GPU");
  }
  Library l{};
  look_up(handle, "cuInit", name, l.init);
  look_up(handle, "cuGetErrorName", name, l.error_name);
  look_up(handle, "cuDeviceGetCount", name, l.device_count);
  look_up(handle, "cuDeviceGet", name, l.device_get);
  look_up(handle, "cuDeviceGetAttribute", name, l.device_attribute);
  look_up(handle, "cuDevicePrimaryCtxRetain", name, l.context_retain);
  look_up(handle, "cuDevicePrimaryCtxRelease_v2", name, l.context_release);
  look_up(handle, "cuCtxGetCurrent", name, l.context_current);
  look_up(handle, "cuCtxPushCurrent_v2", name, l.context_push);
  look_up(handle, "cuCtxPopCurrent_v2", name, l.context_pop);
  look_up(handle, "cuCtxSynchronize", name, l.context_synchronize);
  look_up(handle, "cuMemGetInfo_v2", name, l.memory_info);
  look_up(handle, "cuMemGetAllocationGranularity", name, l.granularity);
  look_up(handle, "cuMemAddressReserve", name, l.address_reserve);
  look_up(handle, "cuMemAddressFree", name, l.address_free);
  look_up(handle, "cuMemCreate", name, l.create);
  look_up(handle, "cuMemRelease", name, l.release);
  look_up(handle, "cuMemMap", name, l.map);
  look_up(handle, "cuMemUnmap", name, l.unmap);
  look_up(handle, "cuMemSetAccess", name, l.set_access);
  look_up(handle, "cuEventCreate", name, l.event_create);
  look_up(handle, "cuEventRecord", name, l.event_record);
  look_up(handle, "cuEventQuery", name, l.event_query);
  look_up(handle, "cuEventSynchronize", name, l.event_synchronize);
  look_up(handle, "cuEventDestroy_v2", name, l.event_destroy);
  look_up(handle, "cuStreamSynchronize", name, l.stream_synchronize);
  const Result result = l.init(0);
  if (result != kSuccess) {
    throw DriverFailure("cuInit of " + name + " failed: " + result_name(l, result) +
                        "; is there a GPU, and may this process use it?");
  }
  return l;
}

std::string result_name(const Library& library, Result result) {
  const char* name = nullptr;
  if (library.error_name(result, &name) == kSuccess && name != nullptr) return name;
  return "CUDA error " + std::to_string(result);
}

}  // namespace vattn::cuda
