// The CUDA driver's verbs; see cuda_driver.hpp for what it promises.
#include "cuda_driver.hpp"

#include <cerrno>
#include <new>
#include <stdexcept>

namespace vattn {

// The primary context on this thread while it lives. The thread's own context, if it is another, comes back after: a
// caller's framework remembers which device is its current one.
class CudaDriver::Bound {
 public:
  explicit Bound(const CudaDriver& driver) noexcept : cuda_(driver.cuda_) {
    cuda::Context current = nullptr;
    result_ = cuda_.context_current(&current);
    if (result_ != cuda::kSuccess || current == driver.context_) return;
    result_ = cuda_.context_push(driver.context_);
    pushed_ = result_ == cuda::kSuccess;
  }
  ~Bound() {
    cuda::Context ignored = nullptr;
    if (pushed_) (void)cuda_.context_pop(&ignored);
  }
  Bound(const Bound&) = delete;
  Bound& operator=(const Bound&) = delete;

  // The call's result, or why there is no context to make it in.
  template <typename Call>
  cuda::Result run(Call call) const noexcept {
    return result_ == cuda::kSuccess ? call() : result_;
  }

 private:
  const cuda::Library& cuda_;
  cuda::Result result_ = cuda::kSuccess;
  bool pushed_ = false;
};

CudaDriver::CudaDriver(std::size_t page_bytes, int device, const std::string& library)
    : cuda_(cuda::open_library(library)), page_bytes_(page_bytes) {
  const auto require = [this](cuda::Result result, const std::string& what) {
    if (result != cuda::kSuccess) throw DriverFailure(what + " failed: " + cuda::result_name(cuda_, result));
  };
  int devices = 0;
  require(cuda_.device_count(&devices), "cuDeviceGetCount");
  if (device < 0 || device >= devices) {
    throw std::invalid_argument("device=" + std::to_string(device) + " is not one of the " + std::to_string(devices) +
                                " GPUs that this process sees (0 is the first)");
  }
  require(cuda_.device_get(&device_, device), "cuDeviceGet");
  int supported = 0;
  require(cuda_.device_attribute(&supported, cuda::kAttributeVirtualMemory, device_), "cuDeviceGetAttribute");
  if (supported == 0) throw DriverFailure("GPU " + std::to_string(device) + " has no virtual memory management");
  properties_.location.id = device_;
  require(cuda_.granularity(&granularity_, &properties_, cuda::kGranularityMinimum), "cuMemGetAllocationGranularity");
  if (page_bytes == 0 || granularity_ == 0 || page_bytes % granularity_ != 0) {
    throw std::invalid_argument("page_bytes=" + std::to_string(page_bytes) + " is not a positive multiple of " +
                                std::to_string(granularity_) + " (granularity of GPU " + std::to_string(device) +
                                "); use " + std::to_string(granularity_));
  }
  require(cuda_.context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

CudaDriver::~CudaDriver() {
  finish();
  (void)cuda_.context_release(device_);
}

DriverFacts CudaDriver::facts() const noexcept {
  DriverFacts facts;
  facts.device_type = kDeviceCuda;
  facts.device = device_;
  return facts;
}

Status CudaDriver::status(cuda::Result result) const noexcept {
  if (result == cuda::kSuccess) return {};
  return {result == cuda::kOutOfMemory ? ENOMEM : kDeviceErrors - result};
}

std::string CudaDriver::explain(Status status) const {
  if (status.code == ENOMEM) return "out of GPU memory";
  if (status.code <= kDeviceErrors) return cuda::result_name(cuda_, kDeviceErrors - status.code);
  return Driver::explain(status);
}

Status CudaDriver::reserve(std::size_t bytes, Address& out) noexcept {
  cuda::DevicePointer address = 0;
  const Status done =
      status(Bound(*this).run([&] { return cuda_.address_reserve(&address, bytes, 0, 0, 0); }));
  if (done.ok()) out = static_cast<Address>(address);
  return done;
}

Status CudaDriver::unreserve(Address address, std::size_t bytes) noexcept {
  return status(Bound(*this).run([&] { return cuda_.address_free(address, bytes); }));
}

Status CudaDriver::create(std::size_t bytes, std::uint64_t /*home*/, Handle& out) noexcept {
  return status(Bound(*this).run([&] { return cuda_.create(&out, bytes, &properties_, 0); }));
}

Status CudaDriver::destroy(Handle page, std::size_t /*bytes*/) noexcept {
  return status(Bound(*this).run([&] { return cuda_.release(page); }));
}

Status CudaDriver::map(Address address, std::size_t bytes, Handle page) noexcept {
  return status(Bound(*this).run([&] { return cuda_.map(address, bytes, 0, page, 0); }));
}

Status CudaDriver::allow(Address address, std::size_t bytes, Access access) noexcept try {
  const bool wanted = access != Access::none;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    bool changes = false;
    for (Address page = address; page < address + bytes; page += page_bytes_) changes |= open_.count(page) != wanted;
    if (!changes) return {};
    open_.reserve(open_.size() + bytes / page_bytes_);
  }
  cuda::AccessDescription description;
  description.location = properties_.location;
  description.flags = wanted ? cuda::kAccessReadWrite : cuda::kAccessNone;
  const Status done = status(Bound(*this).run([&] { return cuda_.set_access(address, bytes, &description, 1); }));
  if (!done.ok()) return done;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Address page = address; page < address + bytes; page += page_bytes_) {
    if (wanted) {
      open_.insert(page);
    } else {
      open_.erase(page);
    }
  }
  return {};
} catch (const std::bad_alloc&) {
  return {ENOMEM};
}

Status CudaDriver::unmap(Address address, std::size_t bytes) noexcept {
  const Status done = status(Bound(*this).run([&] { return cuda_.unmap(address, bytes); }));
  if (!done.ok()) return done;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Address page = address; page < address + bytes; page += page_bytes_) open_.erase(page);
  return {};
}

cuda::Result CudaDriver::take_event(cuda::Event& out) noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!events_.empty()) {
      out = events_.back();
      events_.pop_back();
      return cuda::kSuccess;
    }
  }
  return cuda_.event_create(&out, cuda::kEventWithoutTiming);
}

Status CudaDriver::mark(std::uint64_t stream, Mark& out) noexcept {
  const Bound bound(*this);
  auto* const queue = reinterpret_cast<cuda::Stream>(static_cast<std::uintptr_t>(stream));
  cuda::Event event = nullptr;
  cuda::Result result = bound.run([&] { return take_event(event); });
  if (result == cuda::kSuccess) {
    result = bound.run([&] { return cuda_.event_record(event, queue); });
    if (result == cuda::kSuccess) {
      out = reinterpret_cast<Mark>(event);
      return {};
    }
    forget(reinterpret_cast<Mark>(event));
  }
  // Without an event the only other way to know is to wait.
  out = 0;
  return status(bound.run([&] { return cuda_.stream_synchronize(queue); }));
}

bool CudaDriver::passed(Mark mark) noexcept {
  if (mark == 0) return true;
  // Any error means that the context is gone, and with it every kernel.
  auto* const event = reinterpret_cast<cuda::Event>(mark);
  return Bound(*this).run([&] { return cuda_.event_query(event); }) != cuda::kNotReady;
}

void CudaDriver::await(Mark mark) noexcept {
  if (mark == 0) return;
  (void)Bound(*this).run([&] { return cuda_.event_synchronize(reinterpret_cast<cuda::Event>(mark)); });
}

void CudaDriver::forget(Mark mark) noexcept {
  if (mark == 0) return;
  auto* const event = reinterpret_cast<cuda::Event>(mark);
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!finished_) {
      events_.push_back(event);
      return;
    }
  } catch (const std::bad_alloc&) {  // then it is not kept for later
  }
  (void)Bound(*this).run([&] { return cuda_.event_destroy(event); });
}

void CudaDriver::quiesce() noexcept {
  (void)Bound(*this).run([&] { return cuda_.context_synchronize(); });
}

Status CudaDriver::memory(Memory& out) noexcept {
  std::size_t free = 0;
  std::size_t total = 0;
  const Status done = status(Bound(*this).run([&] { return cuda_.memory_info(&free, &total); }));
  if (done.ok()) out = {static_cast<std::int64_t>(free), static_cast<std::int64_t>(total)};
  return done;
}

void CudaDriver::finish() noexcept {
  std::vector<cuda::Event> events;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    finished_ = true;
    events.swap(events_);
  }
  if (events.empty()) return;
  const Bound bound(*this);
  for (cuda::Event event : events) (void)bound.run([&] { return cuda_.event_destroy(event); });
}

}  // namespace vattn
