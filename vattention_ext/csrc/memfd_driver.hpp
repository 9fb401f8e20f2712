// Linux driver: pages are ranges of one sparse memfd, addresses are mmap. Knows nothing of slots.
//
// A page's file offset follows its `home` where that is free, so pages that are neighbours in a slab are neighbours
// in the file and the kernel keeps them as one mapping: a process may hold only vm.max_map_count of them. The driver
// counts the kernel mappings it causes and refuses beyond its budget, because malloc, too, needs some.
#pragma once

#include <cstdint>
#include <mutex>
#include <set>
#include <unordered_map>
#include <unordered_set>

#include "driver.hpp"

namespace vattn {

class MemfdDriver final : public Driver {
 public:
  // page_bytes: a multiple of granularity(). max_mappings: 0, or a lower budget. Throws std::invalid_argument,
  // std::runtime_error.
  MemfdDriver(std::size_t page_bytes, std::int64_t max_mappings);
  ~MemfdDriver() override;

  [[nodiscard]] const char* name() const noexcept override { return "memfd"; }
  [[nodiscard]] std::size_t granularity() const noexcept override { return granularity_; }
  [[nodiscard]] DriverFacts facts() const noexcept override;

  Status reserve(std::size_t bytes, Address& out) noexcept override;
  Status unreserve(Address address, std::size_t bytes) noexcept override;
  Status create(std::size_t bytes, std::uint64_t home, Handle& out) noexcept override;
  Status destroy(Handle page, std::size_t bytes) noexcept override;
  Status map(Address address, std::size_t bytes, Handle page) noexcept override;
  Status allow(Address address, std::size_t bytes, Access access) noexcept override;
  Status unmap(Address address, std::size_t bytes) noexcept override;
  void warm(Address address, std::size_t bytes) noexcept override;
  void finish() noexcept override;

 private:
  struct Mapped {
    Handle page;
    Access access;
  };
  // 1 where the kernel must keep two mappings apart: between `left` and the page after it.
  [[nodiscard]] int edge(Address left) const;
  void put(Address address, const Mapped* mapped);
  Handle take_offset(std::uint64_t home);
  void drop_offset(Handle page);

  std::size_t granularity_;
  std::size_t page_bytes_;
  int fd_ = -1;
  std::int64_t inode_ = -1;
  std::int64_t budget_ = 0;

  mutable std::mutex mutex_;  // guards what follows; never held during a system call
  std::unordered_set<Handle> used_;        // file pages in use
  std::set<Handle> spare_;                 // file pages past the homes, free again
  Handle first_spare_ = 0;                 // first file page past the homes
  Handle next_spare_ = 0;                  // first never used file page past the homes
  std::unordered_multiset<Address> borders_;  // both ends of every reservation: the kernel's edges there are not ours
  std::unordered_map<Address, Mapped> mapped_;
  std::int64_t mappings_ = 0;
};

}  // namespace vattn
