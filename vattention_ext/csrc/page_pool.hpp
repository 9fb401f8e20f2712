// The pool: how many page groups exist, and who holds each. Knows nothing of addresses or tokens. Not thread-safe by
// itself: the allocator's mutex guards everything except fill() and empty(), which touch only the group given.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "geometry.hpp"
#include "handles.hpp"

namespace vattn {

// One page in every plane. Reference-counted by its holders: the slots in which it is mapped, always at one index.
struct Group {
  std::vector<Page> pages;
  std::vector<std::int64_t> holders;  // slots; more than one: shared, hence immutable
  std::int64_t writer = -1;           // the one slot that maps it writable, or -1

  [[nodiscard]] bool is_private_to(std::int64_t slot) const noexcept {
    return holders.size() == 1 && holders.front() == slot && writer == slot;
  }
};

using GroupPtr = std::shared_ptr<Group>;

class PagePool {
 public:
  PagePool(Driver& driver, const Geometry& geometry, std::int64_t total_groups)
      : driver_(driver), geometry_(geometry), total_(total_groups) {}

  [[nodiscard]] std::int64_t total() const noexcept { return total_; }
  // The limit may be set below what lives; then nothing is free until enough has ended.
  void set_total(std::int64_t total_groups) noexcept { total_ = total_groups; }
  // Groups that may still be claimed; negative while more live than the limit allows.
  [[nodiscard]] std::int64_t room() const noexcept { return total_ - live_; }
  [[nodiscard]] std::int64_t free() const noexcept { return std::max<std::int64_t>(0, room()); }
  [[nodiscard]] std::int64_t live() const noexcept { return live_; }
  // Groups created ahead that nobody claimed yet; they are free ones.
  [[nodiscard]] std::int64_t stocked() const noexcept { return static_cast<std::int64_t>(stock_.size()); }
  // Groups that are neither mapped nor free, because a destroy failed.
  [[nodiscard]] std::int64_t stranded() const noexcept { return static_cast<std::int64_t>(stranded_.size()); }

  // A group, counted as live; free() must be > 0. It is empty, or comes from the stock; fill() gives it what it lacks.
  [[nodiscard]] GroupPtr claim();
  // The same, but always an empty one.
  [[nodiscard]] GroupPtr claim_empty();
  // A claimed group that is full becomes a free one, for the next claim(); and the other way round.
  void stock(GroupPtr group) noexcept;
  [[nodiscard]] GroupPtr unstock() noexcept;
  // Creates all pages of a claimed group, to live at (slot, index). On failure some may exist: retire() the group.
  Status fill(Group& group, std::int64_t slot, std::int64_t index) noexcept;
  // Destroys the group's pages; false where some could not be.
  static bool empty(Group& group) noexcept;
  // Ends a group nobody holds, after empty() said `emptied`: free again, or stranded.
  void settle(GroupPtr group, bool emptied) noexcept;
  void retire(GroupPtr group) noexcept {
    const bool emptied = empty(*group);
    settle(std::move(group), emptied);
  }
  // Tries stranded groups again. Returns how many became free.
  std::int64_t retry_stranded() noexcept;

 private:
  Driver& driver_;
  Geometry geometry_;
  std::int64_t total_;
  std::int64_t live_ = 0;
  std::vector<GroupPtr> stranded_;
  std::vector<GroupPtr> stock_;
};

}  // namespace vattn
