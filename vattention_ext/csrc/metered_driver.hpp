// A driver that counts: calls, failures and time of every verb of the one it wraps. Changes nothing.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <utility>

#include "driver.hpp"

namespace vattn {

struct VerbCount {
  std::int64_t calls = 0;
  std::int64_t failures = 0;
  std::int64_t time_ns = 0;
};

class MeteredDriver final : public Driver {
 public:
  explicit MeteredDriver(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {}

  [[nodiscard]] VerbCount count(Verb verb) const noexcept {
    const Cell& cell = cells_[static_cast<std::size_t>(verb)];
    return {cell.calls.load(), cell.failures.load(), cell.time_ns.load()};
  }

  // What the last failed verb said, in words; empty while none failed.
  [[nodiscard]] std::string last_error() const {
    const std::int64_t packed = last_failure_.load();
    if (packed == 0) return "";
    const Status status{static_cast<int>(static_cast<std::int32_t>(packed & 0xffffffff))};
    return std::string(verb_name(static_cast<Verb>(packed >> 32))) + ": " + inner_->explain(status);
  }

  [[nodiscard]] const char* name() const noexcept override { return inner_->name(); }
  [[nodiscard]] std::size_t granularity() const noexcept override { return inner_->granularity(); }
  [[nodiscard]] DriverFacts facts() const noexcept override { return inner_->facts(); }
  [[nodiscard]] std::string explain(Status status) const override { return inner_->explain(status); }

  Status reserve(std::size_t bytes, Address& out) noexcept override {
    return timed(Verb::reserve, [&] { return inner_->reserve(bytes, out); });
  }
  Status unreserve(Address address, std::size_t bytes) noexcept override {
    return timed(Verb::unreserve, [&] { return inner_->unreserve(address, bytes); });
  }
  Status create(std::size_t bytes, std::uint64_t home, Handle& out) noexcept override {
    return timed(Verb::create, [&] { return inner_->create(bytes, home, out); });
  }
  Status destroy(Handle page, std::size_t bytes) noexcept override {
    return timed(Verb::destroy, [&] { return inner_->destroy(page, bytes); });
  }
  Status map(Address address, std::size_t bytes, Handle page) noexcept override {
    return timed(Verb::map, [&] { return inner_->map(address, bytes, page); });
  }
  Status allow(Address address, std::size_t bytes, Access access) noexcept override {
    return timed(Verb::allow, [&] { return inner_->allow(address, bytes, access); });
  }
  Status unmap(Address address, std::size_t bytes) noexcept override {
    return timed(Verb::unmap, [&] { return inner_->unmap(address, bytes); });
  }
  void warm(Address address, std::size_t bytes) noexcept override { inner_->warm(address, bytes); }
  void finish() noexcept override { inner_->finish(); }
  Status mark(std::uint64_t stream, Mark& out) noexcept override { return inner_->mark(stream, out); }
  [[nodiscard]] bool passed(Mark mark) noexcept override { return inner_->passed(mark); }
  void await(Mark mark) noexcept override { inner_->await(mark); }
  void forget(Mark mark) noexcept override { inner_->forget(mark); }
  void quiesce() noexcept override { inner_->quiesce(); }
  Status memory(Memory& out) noexcept override { return inner_->memory(out); }

 private:
  struct Cell {
    std::atomic<std::int64_t> calls{0};
    std::atomic<std::int64_t> failures{0};
    std::atomic<std::int64_t> time_ns{0};
  };

  template <typename Call>
  Status timed(Verb verb, Call call) noexcept {
    using clock = std::chrono::steady_clock;
    const clock::time_point start = clock::now();
    const Status status = call();
    const auto spent = std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now() - start);
    Cell& cell = cells_[static_cast<std::size_t>(verb)];
    cell.calls.fetch_add(1, std::memory_order_relaxed);
    cell.time_ns.fetch_add(spent.count(), std::memory_order_relaxed);
    if (!status.ok()) {
      cell.failures.fetch_add(1, std::memory_order_relaxed);
      last_failure_.store((static_cast<std::int64_t>(verb) << 32) | static_cast<std::uint32_t>(status.code));
    }
    return status;
  }

  std::shared_ptr<Driver> inner_;
  std::array<Cell, kVerbs> cells_;
  std::atomic<std::int64_t> last_failure_{0};  // the verb above, its code in the low 32 bits; a code is never 0
};

}  // namespace vattn
