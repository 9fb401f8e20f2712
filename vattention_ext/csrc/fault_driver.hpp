// A driver that refuses on purpose: the nth call of a verb, or of any verb, fails without being carried out.
// For tests of every unwind; knows nothing of what it wraps.
#pragma once

#include <mutex>
#include <utility>

#include "driver.hpp"

namespace vattn {

inline constexpr int kAnyVerb = -1;

class FaultDriver final : public Driver {
 public:
  explicit FaultDriver(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {}

  // Calls nth, nth + 1, ... nth + times - 1 of `verb` (kAnyVerb: of all verbs together), counted from now, fail;
  // times < 0: for ever. nth = 0 clears.
  void fail_at(int verb, std::int64_t nth, std::int64_t times) noexcept;
  // Failures handed out since fail_at.
  [[nodiscard]] std::int64_t fired() const noexcept;

  [[nodiscard]] const char* name() const noexcept override { return "fault"; }
  [[nodiscard]] std::size_t granularity() const noexcept override { return inner_->granularity(); }
  [[nodiscard]] DriverFacts facts() const noexcept override { return inner_->facts(); }
  [[nodiscard]] std::string explain(Status status) const override { return inner_->explain(status); }

  Status reserve(std::size_t bytes, Address& out) noexcept override;
  Status unreserve(Address address, std::size_t bytes) noexcept override;
  Status create(std::size_t bytes, std::uint64_t home, Handle& out) noexcept override;
  Status destroy(Handle page, std::size_t bytes) noexcept override;
  Status map(Address address, std::size_t bytes, Handle page) noexcept override;
  Status allow(Address address, std::size_t bytes, Access access) noexcept override;
  Status unmap(Address address, std::size_t bytes) noexcept override;
  void warm(Address address, std::size_t bytes) noexcept override { inner_->warm(address, bytes); }
  void finish() noexcept override { inner_->finish(); }
  Status mark(std::uint64_t stream, Mark& out) noexcept override { return inner_->mark(stream, out); }
  [[nodiscard]] bool passed(Mark mark) noexcept override { return inner_->passed(mark); }
  void await(Mark mark) noexcept override { inner_->await(mark); }
  void forget(Mark mark) noexcept override { inner_->forget(mark); }
  void quiesce() noexcept override { inner_->quiesce(); }
  Status memory(Memory& out) noexcept override { return inner_->memory(out); }

 private:
  bool strike(Verb verb) noexcept;

  std::shared_ptr<Driver> inner_;
  mutable std::mutex mutex_;
  int verb_ = kAnyVerb;
  std::int64_t nth_ = 0;
  std::int64_t times_ = 0;
  std::int64_t seen_ = 0;
  std::int64_t fired_ = 0;
};

}  // namespace vattn
