// Fences in the order in which they were set: which have passed, and how long each step made its caller wait.
// Knows nothing of pages; the allocator's mutex guards it.
//
// A fence counts as passed when it and all before it have, so that one number says what may still run, on however many
// streams.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <utility>

#include "handles.hpp"

namespace vattn {

using FenceNumber = std::uint64_t;
inline constexpr FenceNumber kEveryFence = ~FenceNumber{0};

class Fences {
 public:
  explicit Fences(Driver& driver) : driver_(driver) {}

  // After everything launched on `stream` until now.
  Status add(std::uint64_t stream) {
    auto fence = std::make_shared<Fence>();
    const Status status = Fence::open(driver_, stream, *fence);
    if (!status.ok()) return status;
    pending_.push_back(std::move(fence));
    ++last_;
    poll();
    return {};
  }

  // Asks the device about the oldest ones.
  void poll() noexcept {
    while (!pending_.empty() && pending_.front()->passed()) pending_.pop_front();
    passed_ = last_ - pending_.size();
  }

  [[nodiscard]] FenceNumber last() const noexcept { return last_; }
  [[nodiscard]] FenceNumber passed() const noexcept { return passed_; }
  [[nodiscard]] std::int64_t pending() const noexcept { return static_cast<std::int64_t>(pending_.size()); }
  // To be awaited without the mutex; null when all have passed.
  [[nodiscard]] std::shared_ptr<const Fence> oldest() const noexcept {
    return pending_.empty() ? nullptr : pending_.front();
  }
  // Nothing runs any more.
  void clear() noexcept {
    pending_.clear();
    passed_ = last_;
  }

 private:
  Driver& driver_;
  std::deque<std::shared_ptr<Fence>> pending_;
  FenceNumber last_ = 0;
  FenceNumber passed_ = 0;
};

// Foreground waits of the latest steps [ns]. A step ends with its fence.
class Stalls {
 public:
  static constexpr std::size_t kSteps = 8192;

  void add(std::int64_t wait_ns) noexcept { current_ns_ += wait_ns; }
  void end_step() noexcept {
    recent_ns_[static_cast<std::size_t>(steps_) % kSteps] = current_ns_;
    ++steps_;
    current_ns_ = 0;
  }
  [[nodiscard]] std::int64_t steps() const noexcept { return steps_; }
  // Calls take(ns) for each step kept, oldest first.
  template <typename Take>
  void each(Take take) const {
    const std::int64_t kept = static_cast<std::int64_t>(kSteps);
    for (std::int64_t step = steps_ > kept ? steps_ - kept : 0; step < steps_; ++step) {
      take(recent_ns_[static_cast<std::size_t>(step) % kSteps]);
    }
  }

 private:
  std::array<std::int64_t, kSteps> recent_ns_{};
  std::int64_t steps_ = 0;
  std::int64_t current_ns_ = 0;
};

}  // namespace vattn
