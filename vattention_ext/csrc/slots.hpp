// Slots and what is mapped under them. Maps, unmaps, shares and picks victims; decides no policy, takes no lock.
#pragma once

#include <chrono>
#include <set>
#include <utility>
#include <vector>

#include "fences.hpp"
#include "page_pool.hpp"

namespace vattn {

// One index of one slot: empty, mapped, leaving (mapped, but only until a kernel in flight is through), or quarantined
// (an unmap failed: its state is unknown). The last two are not used.
struct Position {
  GroupPtr group;
  std::vector<Mapping> mappings;  // one a plane
  Access access = Access::none;
  bool quarantined = false;
  bool leaving = false;
  [[nodiscard]] bool mapped() const noexcept { return group != nullptr && !quarantined && !leaving; }
};

struct Slot {
  bool active = false;
  std::uint64_t generation = 0;  // grows with every release: look-ahead asked for earlier is void
  std::int64_t tokens = 0;       // computed or in flight
  std::int64_t in_use = 0;       // groups_for(tokens)
  std::int64_t prefix = 0;       // positions [0, prefix) are all mapped
  std::int64_t mapped = 0;       // positions mapped
  std::int64_t quarantined = 0;
  std::int64_t leaving = 0;
  FenceNumber guard = 0;         // kernels before this fence may read what is out of use here
  std::vector<Position> positions;  // as long as the last one that is not empty
  std::uint64_t release_order = 0;
  std::chrono::steady_clock::time_point released_at;

  [[nodiscard]] std::int64_t size() const noexcept { return static_cast<std::int64_t>(positions.size()); }
};

struct Place {
  std::int64_t slot = -1;
  std::int64_t index = -1;
};

// A position on its way out: unmapped as far as `position.mappings` has become empty.
struct Departure {
  Place place;
  Position position;
};

// A group on its way into a position: mapped as far as `mappings` goes.
struct Arrival {
  std::int64_t index = -1;
  GroupPtr group;
  std::vector<Mapping> mappings;
};

class SlotTable {
 public:
  SlotTable(Driver& driver, const Geometry& geometry, std::vector<Address> bases);

  [[nodiscard]] Slot& at(std::int64_t slot) { return slots_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] const Slot& at(std::int64_t slot) const { return slots_[static_cast<std::size_t>(slot)]; }
  [[nodiscard]] std::int64_t count() const noexcept { return static_cast<std::int64_t>(slots_.size()); }

  // Inactive slot with the fewest mapped groups that still are `need`, else the one with the most; -1 if none. One in
  // which a position is leaving only if there is no other: growing there may have to wait.
  [[nodiscard]] std::int64_t best_fit(std::int64_t need) const noexcept;
  void activate(std::int64_t slot) noexcept;
  // Tokens shrink or grow in number; positions that leave use and are shared are to be dropped by the caller.
  void set_tokens(std::int64_t slot, std::int64_t tokens) noexcept;
  // The slot has no request any more; its positions stay mapped and count as kept.
  void deactivate(std::int64_t slot, std::uint64_t order);

  // Maps arrival.group at (slot, arrival.index) in every plane, no access yet. Touches nothing of the table.
  Status map(std::int64_t slot, Arrival& arrival) const noexcept;
  // Access of `count` neighbouring positions in every plane. Touches nothing of the table.
  Status allow(std::int64_t slot, std::int64_t first, std::int64_t count, Access access) const noexcept;
  // Every plane of one position; may be called without the lock, a hint only.
  void warm(std::int64_t slot, std::int64_t index) const noexcept;
  // Makes room so that commit() cannot throw.
  void make_room(std::int64_t slot, std::int64_t groups);
  void commit(std::int64_t slot, Arrival arrival, Access access) noexcept;
  // Undoes map(): empty position again and true, or quarantined and false. `arrival.group` is left to the caller
  // where it returns true.
  bool discard(std::int64_t slot, Arrival& arrival) noexcept;
  // Unmaps a position in any state. True: done, and `last` is the group if nobody holds it any more.
  bool drop(std::int64_t slot, std::int64_t index, GroupPtr& last) noexcept;
  // drop() in three parts, of which the middle one needs no lock. Until land() nothing else may happen to the place,
  // and its group is held by the slot all the same.
  [[nodiscard]] Departure lift(Place place) noexcept;
  static bool unmap(Departure& departure) noexcept;
  bool land(Departure departure, bool unmapped, GroupPtr& last) noexcept;
  // Mapped, but not used any more: to be dropped once the slot's guard has passed.
  void depart(std::int64_t slot, std::int64_t index) noexcept;
  // Frees the end of a position vector that holds nothing.
  void shorten(std::int64_t slot) noexcept;

  // Of what follows, only slots whose guard is at most `passed` count.
  // The group to take first: of the slot longest released, its last; {-1, -1} if none is kept.
  [[nodiscard]] Place oldest_kept(FenceNumber passed) const noexcept;
  // A look-ahead group: of the lowest slot that has one, its last. Positions of `self` below `need` are not offered.
  [[nodiscard]] Place any_look_ahead(std::int64_t self, std::int64_t need, FenceNumber passed) const noexcept;
  [[nodiscard]] std::int64_t kept(FenceNumber passed) const noexcept;
  [[nodiscard]] std::int64_t look_ahead(std::int64_t self, std::int64_t need, FenceNumber passed) const noexcept;
  // A position that is leaving.
  [[nodiscard]] Place any_leaving(FenceNumber passed) const noexcept;

  [[nodiscard]] std::int64_t kept() const noexcept { return kept_; }
  [[nodiscard]] std::int64_t leaving() const noexcept { return leaving_; }
  [[nodiscard]] std::int64_t quarantined_positions() const noexcept { return quarantined_; }

  [[nodiscard]] Address address(std::int64_t plane, std::int64_t slot, std::int64_t index) const noexcept {
    return bases_[static_cast<std::size_t>(plane)] +
           static_cast<Address>((slot * geometry_.groups_per_slot + index) * geometry_.page_bytes);
  }

 private:
  [[nodiscard]] std::int64_t last_mapped(const Slot& slot, std::int64_t from) const noexcept;
  void pass_on_writing(Group& group, std::int64_t index) noexcept;
  void quarantine(std::int64_t slot, Position& position) noexcept;
  void count_mapped(std::int64_t slot, std::int64_t change) noexcept;

  Driver& driver_;
  Geometry geometry_;
  std::vector<Address> bases_;
  std::vector<Slot> slots_;
  std::set<std::pair<std::uint64_t, std::int64_t>> kept_order_;  // (release order, slot), inactive slots
  std::int64_t kept_ = 0;
  std::int64_t leaving_ = 0;
  std::int64_t quarantined_ = 0;
};

}  // namespace vattn
