// Move-only owners of what a driver hands out: Reservation (addresses), Page (memory), Mapping (one under the other),
// Fence (a mark in a stream).
// They know nothing of slots. Dropping one gives it back; whoever must know whether that worked calls close() first.
#pragma once

#include <utility>

#include "driver.hpp"

namespace vattn {

// A range of addresses. Shares the driver, because exported tensors may outlive the allocator.
class Reservation {
 public:
  Reservation() = default;
  Reservation(Reservation&& other) noexcept { swap(other); }
  Reservation& operator=(Reservation&& other) noexcept { swap(other); return *this; }
  ~Reservation() { (void)close(); }

  static Status open(std::shared_ptr<Driver> driver, std::size_t bytes, Reservation& out) noexcept {
    Address address = 0;
    Status status = driver->reserve(bytes, address);
    if (status.ok()) {
      Reservation made;
      made.driver_ = std::move(driver);
      made.address_ = address;
      made.bytes_ = bytes;
      out.swap(made);
    }
    return status;
  }

  Status close() noexcept {
    if (!driver_) return {};
    Status status = driver_->unreserve(address_, bytes_);
    driver_.reset();
    return status;
  }

  [[nodiscard]] Address address() const noexcept { return address_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  void swap(Reservation& other) noexcept {
    std::swap(driver_, other.driver_);
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
  }
  std::shared_ptr<Driver> driver_;
  Address address_ = 0;
  std::size_t bytes_ = 0;
};

// One physical page.
class Page {
 public:
  Page() = default;
  Page(Page&& other) noexcept { swap(other); }
  Page& operator=(Page&& other) noexcept { swap(other); return *this; }
  ~Page() { (void)close(); }

  static Status create(Driver& driver, std::size_t bytes, std::uint64_t home, Page& out) noexcept {
    Handle handle = 0;
    Status status = driver.create(bytes, home, handle);
    if (status.ok()) {
      Page made;
      made.driver_ = &driver;
      made.handle_ = handle;
      made.bytes_ = bytes;
      out.swap(made);
    }
    return status;
  }

  // On failure the page is still owned and close() may be tried again.
  Status close() noexcept {
    if (driver_ == nullptr) return {};
    Status status = driver_->destroy(handle_, bytes_);
    if (status.ok()) driver_ = nullptr;
    return status;
  }

  [[nodiscard]] Handle handle() const noexcept { return handle_; }
  [[nodiscard]] bool owned() const noexcept { return driver_ != nullptr; }

 private:
  void swap(Page& other) noexcept {
    std::swap(driver_, other.driver_);
    std::swap(handle_, other.handle_);
    std::swap(bytes_, other.bytes_);
  }
  Driver* driver_ = nullptr;
  Handle handle_ = 0;
  std::size_t bytes_ = 0;
};

// One page under one address. The page must outlive it.
class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept { swap(other); }
  Mapping& operator=(Mapping&& other) noexcept { swap(other); return *this; }
  ~Mapping() { (void)close(); }

  static Status open(Driver& driver, Address address, std::size_t bytes, const Page& page, Mapping& out) noexcept {
    Status status = driver.map(address, bytes, page.handle());
    if (status.ok()) {
      Mapping made;
      made.driver_ = &driver;
      made.address_ = address;
      made.bytes_ = bytes;
      out.swap(made);
    }
    return status;
  }

  // On failure the mapping is still owned (its state is unknown) and close() may be tried again.
  Status close() noexcept {
    if (driver_ == nullptr) return {};
    Status status = driver_->unmap(address_, bytes_);
    if (status.ok()) driver_ = nullptr;
    return status;
  }

  [[nodiscard]] Address address() const noexcept { return address_; }
  [[nodiscard]] bool owned() const noexcept { return driver_ != nullptr; }

 private:
  void swap(Mapping& other) noexcept {
    std::swap(driver_, other.driver_);
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
  }
  Driver* driver_ = nullptr;
  Address address_ = 0;
  std::size_t bytes_ = 0;
};

// A point after which nothing launched before it runs any more.
class Fence {
 public:
  Fence() = default;
  Fence(Fence&& other) noexcept { swap(other); }
  Fence& operator=(Fence&& other) noexcept { swap(other); return *this; }
  ~Fence() {
    if (driver_ != nullptr) driver_->forget(mark_);
  }

  static Status open(Driver& driver, std::uint64_t stream, Fence& out) noexcept {
    Mark mark = 0;
    const Status status = driver.mark(stream, mark);
    if (status.ok()) {
      Fence made;
      made.driver_ = &driver;
      made.mark_ = mark;
      out.swap(made);
    }
    return status;
  }

  [[nodiscard]] bool passed() const noexcept { return driver_ == nullptr || driver_->passed(mark_); }
  void await() const noexcept {
    if (driver_ != nullptr) driver_->await(mark_);
  }

 private:
  void swap(Fence& other) noexcept {
    std::swap(driver_, other.driver_);
    std::swap(mark_, other.mark_);
  }
  Driver* driver_ = nullptr;
  Mark mark_ = 0;
};

}  // namespace vattn
