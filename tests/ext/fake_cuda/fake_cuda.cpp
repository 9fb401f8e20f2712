// A libcuda without a GPU, for the tests of the CUDA driver: the symbols that vattention_ext/csrc/cuda_library.hpp
// looks up, over one memfd, so that mapped pages really are memory and touching an unmapped one really faults.
//
// It is stricter than CUDA: what a correct caller never does (mapping over a mapping, unmapping what is not mapped or
// half of it, access to unmapped addresses, releasing a page that is mapped, a call without a current context, and
// unmapping or changing what a kernel in flight may read) is refused and remembered, see fake_violations().
// Streams run nothing by themselves: kernels and events wait in them until fake_advance(), unless fake_automatic(1).
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr int kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidDevice = 101, kInvalidContext = 201;
constexpr int kInvalidHandle = 400, kNotReady = 600;

using u64 = std::uint64_t;

struct Mapped {
  u64 bytes = 0;
  u64 page = 0;
  int access = 0;  // 0 none, 1 read, 3 read and write
};
struct Page {
  u64 offset = 0;
  u64 bytes = 0;
  int mappings = 0;
};
struct Event {
  u64 number = 0;   // of the last record; 0: never recorded
  bool done = true;
};
struct Work {        // of a stream: a kernel that may read a range, or an event
  u64 low = 0, high = 0;
  Event* event = nullptr;
  u64 number = 0;
  volatile u64* gate = nullptr;  // scripts/gpu_reader.py's kernel: it ends once this is not 0
};
struct Fault {
  std::string name;
  long nth = 0, times = 0, seen = 0;
  int result = 0;
};

struct Device {
  std::mutex mutex;
  std::condition_variable advanced;
  int fd = -1;
  u64 granularity = 4096;
  u64 memory_bytes = u64{1} << 30;
  u64 used_bytes = 0;
  u64 next_offset = 0;
  u64 next_handle = 1000;
  u64 next_record = 1;
  bool automatic = true;
  long stale_queries = 0;  // queries that still answer "not yet"
  long contexts = 0, events = 0;
  std::map<u64, u64> regions;          // address -> bytes
  std::map<u64, Page> pages;           // handle
  std::map<u64, Mapped> mapped;        // address
  std::multimap<u64, u64> holes;       // bytes -> offset, free again
  std::map<void*, std::deque<Work>> streams;
  std::map<std::string, long> calls;
  Fault faults[2];
  std::vector<std::string> violations;
  std::string joined;
};

Device& device() {
  static Device* one = new Device;  // never destroyed: other statics may still call
  return *one;
}

thread_local std::vector<void*> context_stack;
int context_tag = 0;

using Lock = std::unique_lock<std::mutex>;

int violation(Device& d, const std::string& what) {
  d.violations.push_back(what);
  return kInvalidValue;
}

// Counts the call and injects; every function that needs a context comes through here.
int enter(Device& d, const char* name, bool needs_context = true) {
  ++d.calls[name];
  for (Fault& fault : d.faults) {
    if (fault.nth == 0 || fault.name != name) continue;
    ++fault.seen;
    if (fault.seen >= fault.nth && (fault.times < 0 || fault.seen < fault.nth + fault.times)) return fault.result;
  }
  if (needs_context && (context_stack.empty() || context_stack.back() != &context_tag)) {
    violation(d, std::string(name) + " without the primary context");
    return kInvalidContext;
  }
  return kOk;
}

// A kernel that was launched and is not through may read some of [low, high).
bool in_flight(const Device& d, u64 low, u64 high) {
  for (const auto& [stream, works] : d.streams) {
    for (const Work& work : works) {
      if (work.low < high && low < work.high) return true;
    }
  }
  return false;
}

// False where the first piece of work is a kernel whose gate is shut.
bool run_one(std::deque<Work>& works) {
  const Work work = works.front();
  if (work.gate != nullptr && *work.gate == 0) return false;
  if (work.gate != nullptr) work.gate[3] = 1;
  works.pop_front();
  if (work.event != nullptr && work.event->number == work.number) work.event->done = true;
  return true;
}

void run(std::deque<Work>& works) {
  while (!works.empty() && run_one(works)) {
  }
}

// The same, waiting for gates.
void drain(Device& d, Lock& lock, std::deque<Work>& works) {
  for (run(works); !works.empty(); run(works)) d.advanced.wait_for(lock, std::chrono::milliseconds(1));
}

// Streams whose gates were opened go on when somebody asks.
void run_gated(Device& d) {
  for (auto& [stream, works] : d.streams) {
    if (!works.empty() && works.front().gate != nullptr) run(works);
  }
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return kOk; }
int cuGetErrorName(int result, const char** name) {
  switch (result) {
    case kOutOfMemory: *name = "CUDA_ERROR_OUT_OF_MEMORY"; return kOk;
    case kInvalidValue: *name = "CUDA_ERROR_INVALID_VALUE"; return kOk;
    case kInvalidContext: *name = "CUDA_ERROR_INVALID_CONTEXT"; return kOk;
    case 700: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return kOk;
    default: return kInvalidValue;
  }
}
int cuDeviceGetCount(int* count) { *count = 2; return kOk; }
int cuDeviceGet(int* out, int ordinal) {
  *out = ordinal;
  return ordinal < 2 ? kOk : kInvalidDevice;
}
int cuDeviceGetAttribute(int* out, int, int) { *out = 1; return kOk; }
int cuDriverGetVersion(int* out) { *out = 13000; return kOk; }
int cuDeviceGetName(char* out, int bytes, int) {
  std::snprintf(out, static_cast<std::size_t>(bytes), "fake");
  return kOk;
}
int cuMemcpyHtoD_v2(u64 to, const void* from, std::size_t bytes) {
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kOk;
}
int cuMemcpyDtoH_v2(void* to, u64 from, std::size_t bytes) {
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kOk;
}
int cuCtxSetCurrent(void* context) {
  context_stack.assign(1, context);
  return kOk;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  Device& d = device();
  const Lock lock(d.mutex);
  ++d.contexts;
  *context = &context_tag;
  return kOk;
}
int cuDevicePrimaryCtxRelease_v2(int) {
  Device& d = device();
  const Lock lock(d.mutex);
  --d.contexts;
  return kOk;
}
int cuCtxGetCurrent(void** context) {
  *context = context_stack.empty() ? nullptr : context_stack.back();
  return kOk;
}
int cuCtxPushCurrent_v2(void* context) { context_stack.push_back(context); return kOk; }
int cuCtxPopCurrent_v2(void** context) {
  if (context_stack.empty()) return kInvalidContext;
  *context = context_stack.back();
  context_stack.pop_back();
  return kOk;
}
int cuCtxSynchronize() {
  Device& d = device();
  Lock lock(d.mutex);
  const int failed = enter(d, "cuCtxSynchronize");
  for (auto& [stream, works] : d.streams) drain(d, lock, works);
  d.advanced.notify_all();
  return failed;
}

int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  Device& d = device();
  const Lock lock(d.mutex);
  const int failed = enter(d, "cuMemGetInfo");
  *total = d.memory_bytes;
  *free = d.memory_bytes - d.used_bytes;
  return failed;
}
int cuMemGetAllocationGranularity(std::size_t* out, const void*, int) {
  *out = device().granularity;
  return kOk;
}

int cuMemAddressReserve(u64* out, std::size_t bytes, std::size_t, u64, unsigned long long) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuMemAddressReserve")) return failed;
  if (bytes == 0 || bytes % d.granularity != 0) return violation(d, "reserve of a size that is no multiple");
  void* got = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return kOutOfMemory;
  *out = reinterpret_cast<u64>(got);
  d.regions[*out] = bytes;
  return kOk;
}
int cuMemAddressFree(u64 address, std::size_t bytes) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuMemAddressFree")) return failed;
  const auto found = d.regions.find(address);
  if (found == d.regions.end() || found->second != bytes) return violation(d, "free of addresses never reserved");
  const auto inside = d.mapped.lower_bound(address);
  if (inside != d.mapped.end() && inside->first < address + bytes) return kInvalidValue;  // CUDA refuses this, too
  munmap(reinterpret_cast<void*>(address), bytes);
  d.regions.erase(found);
  return kOk;
}

int cuMemCreate(u64* out, std::size_t bytes, const void*, unsigned long long) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuMemCreate")) return failed;
  if (bytes == 0 || bytes % d.granularity != 0) return violation(d, "create of a size that is no multiple");
  if (d.used_bytes + bytes > d.memory_bytes) return kOutOfMemory;
  if (d.fd < 0) d.fd = memfd_create("tessera-kv", MFD_CLOEXEC);
  Page page{d.next_offset, bytes, 0};
  if (const auto hole = d.holes.find(bytes); hole != d.holes.end()) {
    page.offset = hole->second;
    d.holes.erase(hole);
  } else {
    d.next_offset += bytes;
  }
  if (fallocate(d.fd, 0, static_cast<off_t>(page.offset), static_cast<off_t>(bytes)) != 0) return kOutOfMemory;
  d.used_bytes += bytes;
  *out = d.next_handle++;
  d.pages[*out] = page;
  return kOk;
}
int cuMemRelease(u64 handle) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuMemRelease")) return failed;
  const auto found = d.pages.find(handle);
  if (found == d.pages.end()) return violation(d, "release of a page that does not exist");
  const Page page = found->second;
  if (page.mappings > 0) return violation(d, "release of a page that is mapped");
  (void)!fallocate(d.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(page.offset),
                   static_cast<off_t>(page.bytes));
  d.holes.emplace(page.bytes, page.offset);
  d.used_bytes -= page.bytes;
  d.pages.erase(found);
  return kOk;
}

int cuMemMap(u64 address, std::size_t bytes, std::size_t offset, u64 handle, unsigned long long) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuMemMap")) return failed;
  const auto page = d.pages.find(handle);
  if (page == d.pages.end() || offset != 0 || page->second.bytes != bytes) return violation(d, "map of no such page");
  auto region = d.regions.upper_bound(address);
  if (region == d.regions.begin() || (--region)->first + region->second < address + bytes) {
    return violation(d, "map outside of every reservation");
  }
  const auto next = d.mapped.lower_bound(address);
  if (next != d.mapped.end() && next->first < address + bytes) return violation(d, "map over a mapping");
  if (next != d.mapped.begin() && std::prev(next)->first + std::prev(next)->second.bytes > address) {
    return violation(d, "map over a mapping");
  }
  void* got = mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, d.fd,
                   static_cast<off_t>(page->second.offset));
  if (got == MAP_FAILED) return kOutOfMemory;
  d.mapped[address] = {bytes, handle, 0};
  ++page->second.mappings;
  return kOk;
}
int cuMemUnmap(u64 address, std::size_t bytes) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuMemUnmap")) return failed;
  if (in_flight(d, address, address + bytes)) return violation(d, "unmap of what a kernel in flight may read");
  auto it = d.mapped.find(address);
  u64 covered = 0;
  for (; it != d.mapped.end() && it->first == address + covered && covered < bytes; ++it) covered += it->second.bytes;
  if (covered != bytes) return violation(d, "unmap of what is not mapped, or of half a page");
  for (it = d.mapped.find(address); it != d.mapped.end() && it->first < address + bytes;) {
    --d.pages[it->second.page].mappings;
    it = d.mapped.erase(it);
  }
  const int nothing = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, nothing, -1, 0);
  return kOk;
}
int cuMemSetAccess(u64 address, std::size_t bytes, const int* description, std::size_t count) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuMemSetAccess")) return failed;
  if (count != 1) return violation(d, "access of more than one device");
  const int flags = description[2];
  if (in_flight(d, address, address + bytes)) return violation(d, "access changed under a kernel in flight");
  auto it = d.mapped.find(address);
  u64 covered = 0;
  for (; it != d.mapped.end() && it->first == address + covered && covered < bytes; ++it) covered += it->second.bytes;
  if (covered != bytes) return violation(d, "access to what is not mapped");
  const int protection = flags == 3 ? PROT_READ | PROT_WRITE : flags == 1 ? PROT_READ : PROT_NONE;
  if (mprotect(reinterpret_cast<void*>(address), bytes, protection) != 0) return kOutOfMemory;
  for (it = d.mapped.find(address); it != d.mapped.end() && it->first < address + bytes; ++it) {
    it->second.access = flags;
  }
  return kOk;
}

int cuEventCreate(void** out, unsigned) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuEventCreate")) return failed;
  *out = new Event;
  ++d.events;
  return kOk;
}
int cuEventRecord(void* event, void* stream) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuEventRecord")) return failed;
  auto* e = static_cast<Event*>(event);
  e->number = d.next_record++;
  e->done = false;
  auto& works = d.streams[stream];
  works.push_back({0, 0, e, e->number, nullptr});
  if (d.automatic) run(works);
  return kOk;
}
int cuEventQuery(void* event) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuEventQuery")) return failed;
  if (d.stale_queries > 0) {
    --d.stale_queries;
    return kNotReady;
  }
  run_gated(d);
  return static_cast<Event*>(event)->done ? kOk : kNotReady;
}
int cuEventSynchronize(void* event) {
  Device& d = device();
  Lock lock(d.mutex);
  if (const int failed = enter(d, "cuEventSynchronize")) return failed;
  while (!static_cast<Event*>(event)->done) {
    run_gated(d);
    d.advanced.wait_for(lock, std::chrono::milliseconds(1));
  }
  return kOk;
}
int cuEventDestroy_v2(void* event) {
  Device& d = device();
  const Lock lock(d.mutex);
  if (const int failed = enter(d, "cuEventDestroy")) return failed;
  if (!static_cast<Event*>(event)->done) return violation(d, "an event destroyed before it passed");
  delete static_cast<Event*>(event);
  --d.events;
  return kOk;
}
int cuStreamSynchronize(void* stream) {
  Device& d = device();
  Lock lock(d.mutex);
  if (const int failed = enter(d, "cuStreamSynchronize")) return failed;
  drain(d, lock, d.streams[stream]);
  d.advanced.notify_all();
  return kOk;
}

// One kernel is known, the one of scripts/gpu_reader.py: it reads a range until its gate opens. Its memory is plain.
int cuModuleLoadData(void** module, const void*) { *module = nullptr; return kOk; }
int cuModuleGetFunction(void** function, void*, const char*) { *function = nullptr; return kOk; }
int cuMemHostAlloc(void** out, std::size_t bytes, unsigned) {
  *out = std::calloc(1, bytes);
  return *out == nullptr ? kOutOfMemory : kOk;
}
int cuMemFreeHost(void* memory) { std::free(memory); return kOk; }
int cuMemAlloc_v2(u64* out, std::size_t bytes) {
  *out = reinterpret_cast<u64>(std::calloc(1, bytes));
  return *out == 0 ? kOutOfMemory : kOk;
}
int cuMemFree_v2(u64 memory) { std::free(reinterpret_cast<void*>(memory)); return kOk; }
int cuMemsetD32_v2(u64 to, unsigned value, std::size_t count) {
  auto* words = reinterpret_cast<unsigned*>(to);
  for (std::size_t i = 0; i < count; ++i) words[i] = value;
  return kOk;
}
int cuStreamCreate(void** out, unsigned) { *out = std::malloc(1); return kOk; }
int cuStreamDestroy_v2(void* stream) {
  Device& d = device();
  const Lock lock(d.mutex);
  d.streams.erase(stream);
  std::free(stream);
  return kOk;
}
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void* stream,
                   void** words, void**) {
  Device& d = device();
  const Lock lock(d.mutex);
  const auto word = [words](int i) { return *static_cast<u64*>(words[i]); };
  auto* gate = reinterpret_cast<volatile u64*>(word(0));
  gate[1] = gate[2] = 1;
  d.streams[stream].push_back({word(2), word(2) + 128 * word(3), nullptr, 0, gate});
  return kOk;
}

// What follows is the tests' side.

// A kernel on `stream` that may read [address, address + bytes) until the stream gets past it.
void fake_launch(u64 stream, u64 address, u64 bytes) {
  Device& d = device();
  const Lock lock(d.mutex);
  for (u64 at = address; at < address + bytes;) {  // a kernel faults on what is not there
    auto it = d.mapped.upper_bound(at);
    if (it == d.mapped.begin() || (--it)->first + it->second.bytes <= at || it->second.access == 0) {
      violation(d, "a kernel reads what is not mapped");
      break;
    }
    at = it->first + it->second.bytes;
  }
  d.streams[reinterpret_cast<void*>(stream)].push_back({address, address + bytes, nullptr, 0, nullptr});
}
// The stream runs up to `count` pieces of its work (kernels and events); < 0: all. Returns how many.
long fake_advance(u64 stream, long count) {
  Device& d = device();
  const Lock lock(d.mutex);
  auto& works = d.streams[reinterpret_cast<void*>(stream)];
  long ran = 0;
  for (; !works.empty() && ran != count && run_one(works); ++ran) {
  }
  d.advanced.notify_all();
  return ran;
}
// 1: an event passes as soon as it is recorded, with all before it.
void fake_automatic(int on) {
  Device& d = device();
  const Lock lock(d.mutex);
  d.automatic = on != 0;
}
// Calls nth .. nth + times - 1 of the function answer `result`; times < 0: for ever; nth 0: none.
void fake_fail_too(const char* name, long nth, long times, int result) {
  Device& d = device();
  const Lock lock(d.mutex);
  d.faults[1] = {name, nth, times, 0, result};
}
void fake_fail(const char* name, long nth, long times, int result) {
  Device& d = device();
  const Lock lock(d.mutex);
  d.faults[0] = {name, nth, times, 0, result};
}
// The next `count` questions after an event answer "not yet", as if it passed between the last of them and the next.
void fake_stale(long count) {
  Device& d = device();
  const Lock lock(d.mutex);
  d.stale_queries = count;
}
void fake_granularity(u64 bytes) { device().granularity = bytes; }
void fake_memory(u64 bytes) {
  Device& d = device();
  const Lock lock(d.mutex);
  d.memory_bytes = bytes;
}
long fake_calls(const char* name) {
  Device& d = device();
  const Lock lock(d.mutex);
  return d.calls[name];
}
u64 fake_used_bytes() {
  Device& d = device();
  const Lock lock(d.mutex);
  return d.used_bytes;
}
u64 fake_mapped_bytes() {
  Device& d = device();
  const Lock lock(d.mutex);
  u64 bytes = 0;
  for (const auto& [address, one] : d.mapped) bytes += one.access != 0 ? one.bytes : 0;
  return bytes;
}
// Contexts, reservations, pages, mappings and events that exist.
long fake_leftovers() {
  Device& d = device();
  const Lock lock(d.mutex);
  return d.contexts + d.events + static_cast<long>(d.regions.size() + d.pages.size() + d.mapped.size());
}
// All violations so far, one a line; forgotten by this call.
const char* fake_violations() {
  Device& d = device();
  const Lock lock(d.mutex);
  d.joined.clear();
  for (const std::string& one : d.violations) d.joined += one + "\n";
  d.violations.clear();
  return d.joined.c_str();
}

}  // extern "C"
