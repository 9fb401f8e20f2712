// The part of CUDA's driver interface that this extension uses, declared by hand and looked up in libcuda at run time,
// so that neither nvcc nor CUDA's headers are needed to build and the module loads where no GPU is. Decides nothing.
//
// Names, layouts and numbers: CUDA Driver API 11.0 and later; versioned symbols keep their layout for ever.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace vattn::cuda {

using Result = int;  // CUresult
using Device = int;
using DevicePointer = std::uint64_t;
using Context = struct ContextTag*;
using Event = struct EventTag*;
using Stream = struct StreamTag*;
using MemoryHandle = std::uint64_t;

inline constexpr Result kSuccess = 0;
inline constexpr Result kOutOfMemory = 2;
inline constexpr Result kNotReady = 600;

inline constexpr int kLocationDevice = 1;
inline constexpr int kAllocationPinned = 1;
inline constexpr int kGranularityMinimum = 0;
inline constexpr int kAccessNone = 0;
inline constexpr int kAccessReadWrite = 3;
inline constexpr int kAttributeVirtualMemory = 102;
inline constexpr unsigned kEventWithoutTiming = 2;

struct Location {
  int type = kLocationDevice;
  int id = 0;
};

struct AllocationProperties {
  int type = kAllocationPinned;
  int handle_types = 0;  // not exported to other processes
  Location location;
  void* windows_metadata = nullptr;
  struct Flags {
    unsigned char compression = 0;
    unsigned char rdma = 0;
    unsigned short usage = 0;
    unsigned char reserved[4] = {0, 0, 0, 0};
  } flags;
};
static_assert(sizeof(AllocationProperties) == 32, "CUmemAllocationProp on a 64-bit system");

struct AccessDescription {
  Location location;
  int flags = kAccessReadWrite;
};

// Every function, by its symbol. One instance a library, filled by open_library().
struct Library {
  Result (*init)(unsigned);
  Result (*error_name)(Result, const char**);
  Result (*device_count)(int*);
  Result (*device_get)(Device*, int);
  Result (*device_attribute)(int*, int, Device);
  Result (*context_retain)(Context*, Device);
  Result (*context_release)(Device);
  Result (*context_current)(Context*);
  Result (*context_push)(Context);
  Result (*context_pop)(Context*);
  Result (*context_synchronize)();
  Result (*memory_info)(std::size_t*, std::size_t*);
  Result (*granularity)(std::size_t*, const AllocationProperties*, int);
  Result (*address_reserve)(DevicePointer*, std::size_t, std::size_t, DevicePointer, unsigned long long);
  Result (*address_free)(DevicePointer, std::size_t);
  Result (*create)(MemoryHandle*, std::size_t, const AllocationProperties*, unsigned long long);
  Result (*release)(MemoryHandle);
  Result (*map)(DevicePointer, std::size_t, std::size_t, MemoryHandle, unsigned long long);
  Result (*unmap)(DevicePointer, std::size_t);
  Result (*set_access)(DevicePointer, std::size_t, const AccessDescription*, std::size_t);
  Result (*event_create)(Event*, unsigned);
  Result (*event_record)(Event, Stream);
  Result (*event_query)(Event);
  Result (*event_synchronize)(Event);
  Result (*event_destroy)(Event);
  Result (*stream_synchronize)(Stream);
};

// Opens `path` (empty: libcuda.so.1, as the system finds it) and initialises it. The library is never closed: libcuda
// does not survive that. Throws DriverFailure naming what is missing and what to do.
Library open_library(const std::string& path);

// "CUDA_ERROR_OUT_OF_MEMORY" and the like; the number where the library has no name for it.
std::string result_name(const Library& library, Result result);

}  // namespace vattn::cuda
