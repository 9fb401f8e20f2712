// The seam to virtual memory, shaped after CUDA's calls: reserve addresses, create physical pages, map them,
// set access, unmap, destroy, unreserve. Knows nothing of slots, tokens or Python.
//
// Adding a driver is one file that implements this class and one line in drivers.cpp. A CUDA driver opens libcuda
// with dlopen there, so that neither nvcc nor torch is needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "errors.hpp"

namespace vattn {

using Address = std::uintptr_t;
using Handle = std::uint64_t;  // one physical page; meaning belongs to the driver

enum class Access : std::uint8_t { none, read, read_write };

// What can be seen from outside of a driver, for tests and statistics; -1 where it has no meaning.
struct DriverFacts {
  int descriptor = -1;            // file that backs the pages
  std::int64_t inode = -1;        // the same, as /proc/self/maps names it
  std::int64_t mappings = -1;     // kernel mappings held now
  std::int64_t mapping_budget = -1;  // most it will hold; map answers kOverBudget beyond
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
};

// `name` is "memfd", or "fault" for memfd behind a FaultDriver. `page_bytes` is what create() will be asked for;
// `max_mappings` lowers the mapping budget (0: the driver's own). Throws std::invalid_argument for an unknown name
// or page size, std::runtime_error where the system refuses.
std::shared_ptr<Driver> open_driver(const std::string& name, std::size_t page_bytes, std::int64_t max_mappings);

}  // namespace vattn
