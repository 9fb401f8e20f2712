// CUDA driver: pages are cuMemCreate allocations of one device, addresses cuMemAddressReserve. Knows nothing of slots.
//
// Shared pages are mapped writable everywhere: raising the access of a page that a kernel may be reading is not a thing
// to do to a GPU, so what only some slots may write is the kernels' affair here (they take a first writable byte).
// Every call makes the device's primary context current on the calling thread, for the call alone.
#pragma once

#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "cuda_library.hpp"
#include "driver.hpp"

namespace vattn {

class CudaDriver final : public Driver {
 public:
  // Throws DriverFailure (no library, no such device), std::invalid_argument (page_bytes).
  CudaDriver(std::size_t page_bytes, int device, const std::string& library);
  ~CudaDriver() override;

  [[nodiscard]] const char* name() const noexcept override { return "cuda"; }
  [[nodiscard]] std::size_t granularity() const noexcept override { return granularity_; }
  [[nodiscard]] DriverFacts facts() const noexcept override;
  [[nodiscard]] std::string explain(Status status) const override;

  Status reserve(std::size_t bytes, Address& out) noexcept override;
  Status unreserve(Address address, std::size_t bytes) noexcept override;
  Status create(std::size_t bytes, std::uint64_t home, Handle& out) noexcept override;
  Status destroy(Handle page, std::size_t bytes) noexcept override;
  Status map(Address address, std::size_t bytes, Handle page) noexcept override;
  Status allow(Address address, std::size_t bytes, Access access) noexcept override;
  Status unmap(Address address, std::size_t bytes) noexcept override;
  void warm(Address, std::size_t) noexcept override {}
  void finish() noexcept override;

  Status mark(std::uint64_t stream, Mark& out) noexcept override;
  [[nodiscard]] bool passed(Mark mark) noexcept override;
  void await(Mark mark) noexcept override;
  void forget(Mark mark) noexcept override;
  void quiesce() noexcept override;
  Status memory(Memory& out) noexcept override;

 private:
  class Bound;
  [[nodiscard]] Status status(cuda::Result result) const noexcept;
  [[nodiscard]] cuda::Result take_event(cuda::Event& out) noexcept;

  cuda::Library cuda_;
  cuda::AllocationProperties properties_;
  cuda::Device device_ = 0;
  cuda::Context context_ = nullptr;
  std::size_t granularity_ = 0;
  std::size_t page_bytes_;

  std::mutex mutex_;  // guards what follows; never held during a call of libcuda
  std::unordered_set<Address> open_;  // pages that have access
  std::vector<cuda::Event> events_;   // not recorded, or passed
  bool finished_ = false;
};

}  // namespace vattn
