// The seam to virtual memory, shaped after CUDA's calls: reserve addresses, create physical pages, map them,
// set access, unmap, destroy, unreserve. Knows nothing of slots, tokens or Python.
//
// Adding a driver is one file that implements this class and one line in drivers.cpp. The CUDA driver opens libcuda
// with dlopen there, so that neither nvcc nor torch is needed to build.
//
// A driver whose memory is read by somebody who is not a thread of this process (a GPU) also has marks: points in the
// order of that somebody's work. What was readable before a mark may be read until the mark has passed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "errors.hpp"

namespace vattn {

using Address = std::uintptr_t;
using Handle = std::uint64_t;  // one physical page; meaning belongs to the driver
using Mark = std::uint64_t;    // a point in a stream of work; 0: passed

enum class Access : std::uint8_t { none, read, read_write };

// Device types of DLPack.
inline constexpr int kDeviceCpu = 1;
inline constexpr int kDeviceCuda = 2;

// Of the device, all processes together; -1 where the driver does not know [bytes].
struct Memory {
  std::int64_t free_bytes = -1;
  std::int64_t total_bytes = -1;
};

// What can be seen from outside of a driver, for tests and statistics; -1 where it has no meaning.
struct DriverFacts {
  int descriptor = -1;            // file that backs the pages
  std::int64_t inode = -1;        // the same, as /proc/self/maps names it
  std::int64_t mappings = -1;     // kernel mappings held now
  std::int64_t mapping_budget = -1;  // most it will hold; map answers kOverBudget beyond
  int device_type = kDeviceCpu;   // where the addresses are, in DLPack's numbers
  int device = 0;                 // which of them
};

// All verbs may be called from two threads at once, for different addresses and handles.
class Driver {
 public:
  Driver() = default;
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  virtual ~Driver() = default;

  [[nodiscard]] virtual const char* name() const noexcept = 0;
  // Page sizes are multiples of this [bytes].
  [[nodiscard]] virtual std::size_t granularity() const noexcept = 0;
  [[nodiscard]] virtual DriverFacts facts() const noexcept = 0;
  // What a code that one of its verbs answered means, in words.
  [[nodiscard]] virtual std::string explain(Status status) const;

  // Addresses without memory: any touch faults.
  virtual Status reserve(std::size_t bytes, Address& out) noexcept = 0;
  virtual Status unreserve(Address address, std::size_t bytes) noexcept = 0;
  // One committed page. `home` is a wish: pages created with successive homes and mapped at successive addresses
  // may share one kernel mapping; a driver for which that has no meaning ignores it.
  virtual Status create(std::size_t bytes, std::uint64_t home, Handle& out) noexcept = 0;
  virtual Status destroy(Handle page, std::size_t bytes) noexcept = 0;
  // Put a page under an address; unreadable until allow().
  virtual Status map(Address address, std::size_t bytes, Handle page) noexcept = 0;
  // Access of a range that is mapped without gaps.
  virtual Status allow(Address address, std::size_t bytes, Access access) noexcept = 0;
  virtual Status unmap(Address address, std::size_t bytes) noexcept = 0;
  // A hint that a mapped range will be touched soon, for a driver whose first touch costs time. Changes nothing that
  // can be seen, and does nothing where the range is not accessible (any more).
  virtual void warm(Address address, std::size_t bytes) noexcept = 0;
  // No page will be created any more, and none is left: give back all but the addresses. May be called twice.
  virtual void finish() noexcept = 0;

  // After everything launched on `stream` (the device's own handle; 0 its default) until now. Not while the stream is
  // being captured. On success the mark must be forgotten, once, by its owner.
  virtual Status mark(std::uint64_t /*stream*/, Mark& out) noexcept { out = 0; return {}; }
  [[nodiscard]] virtual bool passed(Mark) noexcept { return true; }
  virtual void await(Mark) noexcept {}
  virtual void forget(Mark) noexcept {}
  // Waits until nothing that was launched runs any more.
  virtual void quiesce() noexcept {}
  virtual Status memory(Memory& out) noexcept { out = {}; return {}; }
};

struct DriverSettings {
  std::string name = "memfd";     // memfd, cuda, or fault and fault_cuda: the same behind a FaultDriver
  std::size_t page_bytes = 0;     // what create() will be asked for
  std::int64_t max_mappings = 0;  // lowers the mapping budget; 0: the driver's own
  int device = 0;                 // cuda: which GPU
  std::string library;            // cuda: path of libcuda; empty: as the system finds it
};

// Throws std::invalid_argument for an unknown name, device or page size, DriverFailure where the system refuses.
std::shared_ptr<Driver> open_driver(const DriverSettings& settings);

}  // namespace vattn
