// Positions, their mappings and the victims among them; see slots.hpp.
#include "slots.hpp"

namespace vattn {
namespace {

// Last plane first; those that fail stay owned. True when none is left.
bool close_all(std::vector<Mapping>& mappings) noexcept {
  bool closed = true;
  for (auto mapping = mappings.rbegin(); mapping != mappings.rend(); ++mapping) closed &= mapping->close().ok();
  return closed;
}

void remove_holder(Group& group, std::int64_t slot) noexcept {
  group.holders.erase(std::remove(group.holders.begin(), group.holders.end(), slot), group.holders.end());
}

}  // namespace

SlotTable::SlotTable(Driver& driver, const Geometry& geometry, std::vector<Address> bases)
    : driver_(driver),
      geometry_(geometry),
      bases_(std::move(bases)),
      slots_(static_cast<std::size_t>(geometry.slots)) {}

std::int64_t SlotTable::best_fit(std::int64_t need) const noexcept {
  std::int64_t best = -1;
  for (std::int64_t i = 0; i < count(); ++i) {
    const Slot& slot = at(i);
    if (slot.active || slot.quarantined > 0) continue;
    if (best < 0) {
      best = i;
      continue;
    }
    const std::int64_t mine = slot.mapped;
    const std::int64_t theirs = at(best).mapped;
    if ((slot.leaving > 0) != (at(best).leaving > 0)) {
      if (slot.leaving == 0) best = i;
      continue;
    }
    const bool better = theirs >= need ? (mine >= need && mine < theirs) : mine > theirs;
    if (better) best = i;
  }
  return best;
}

void SlotTable::activate(std::int64_t index) noexcept {
  Slot& slot = at(index);
  kept_order_.erase({slot.release_order, index});
  kept_ -= slot.mapped;
  slot.active = true;
  slot.tokens = slot.in_use = 0;
}

void SlotTable::set_tokens(std::int64_t slot, std::int64_t tokens) noexcept {
  at(slot).tokens = tokens;
  at(slot).in_use = geometry_.groups_for(tokens);
}

void SlotTable::deactivate(std::int64_t index, std::uint64_t order) {
  Slot& slot = at(index);
  kept_order_.insert({order, index});
  slot.release_order = order;
  slot.released_at = std::chrono::steady_clock::now();
  slot.active = false;
  slot.tokens = slot.in_use = 0;
  kept_ += slot.mapped;
}

void SlotTable::count_mapped(std::int64_t index, std::int64_t change) noexcept {
  at(index).mapped += change;
  if (!at(index).active) kept_ += change;
}

Status SlotTable::map(std::int64_t slot, Arrival& arrival) const noexcept {
  const auto bytes = static_cast<std::size_t>(geometry_.page_bytes);
  // A second call goes on where a full mapping budget stopped the first.
  for (auto plane = static_cast<std::int64_t>(arrival.mappings.size()); plane < geometry_.planes; ++plane) {
    Mapping mapping;
    const Page& page = arrival.group->pages[static_cast<std::size_t>(plane)];
    const Status status = Mapping::open(driver_, address(plane, slot, arrival.index), bytes, page, mapping);
    if (!status.ok()) return status;
    arrival.mappings.push_back(std::move(mapping));
  }
  return {};
}

Status SlotTable::allow(std::int64_t slot, std::int64_t first, std::int64_t count, Access access) const noexcept {
  for (std::int64_t plane = 0; plane < geometry_.planes; ++plane) {
    const auto bytes = static_cast<std::size_t>(count * geometry_.page_bytes);
    const Status status = driver_.allow(address(plane, slot, first), bytes, access);
    if (!status.ok()) return status;
  }
  return {};
}

void SlotTable::warm(std::int64_t slot, std::int64_t index) const noexcept {
  for (std::int64_t plane = 0; plane < geometry_.planes; ++plane) {
    driver_.warm(address(plane, slot, index), static_cast<std::size_t>(geometry_.page_bytes));
  }
}

void SlotTable::make_room(std::int64_t slot, std::int64_t groups) {
  if (at(slot).size() < groups) at(slot).positions.resize(static_cast<std::size_t>(groups));
}

void SlotTable::commit(std::int64_t slot_index, Arrival arrival, Access access) noexcept {
  Slot& slot = at(slot_index);
  Position& position = slot.positions[static_cast<std::size_t>(arrival.index)];
  arrival.group->holders.push_back(slot_index);
  if (access == Access::read_write) arrival.group->writer = slot_index;
  position.group = std::move(arrival.group);
  position.mappings = std::move(arrival.mappings);
  position.access = access;
  count_mapped(slot_index, 1);
  while (slot.prefix < slot.size() && slot.positions[static_cast<std::size_t>(slot.prefix)].mapped()) ++slot.prefix;
}

void SlotTable::quarantine(std::int64_t slot, Position& position) noexcept {
  position.quarantined = true;
  ++at(slot).quarantined;
  ++quarantined_;
}

bool SlotTable::discard(std::int64_t slot, Arrival& arrival) noexcept {
  if (close_all(arrival.mappings)) {
    arrival.mappings.clear();
    return true;
  }
  Position& position = at(slot).positions[static_cast<std::size_t>(arrival.index)];
  arrival.group->holders.push_back(slot);
  position.group = std::move(arrival.group);
  position.mappings = std::move(arrival.mappings);
  position.access = Access::none;
  quarantine(slot, position);
  return false;
}

void SlotTable::depart(std::int64_t slot_index, std::int64_t index) noexcept {
  Slot& slot = at(slot_index);
  slot.positions[static_cast<std::size_t>(index)].leaving = true;
  count_mapped(slot_index, -1);
  slot.prefix = std::min(slot.prefix, index);
  ++slot.leaving;
  ++leaving_;
}

Departure SlotTable::lift(Place place) noexcept {
  Slot& slot = at(place.slot);
  Position& position = slot.positions[static_cast<std::size_t>(place.index)];
  if (position.quarantined) {
    --slot.quarantined;
    --quarantined_;
  } else if (position.leaving) {
    --slot.leaving;
    --leaving_;
  } else {
    count_mapped(place.slot, -1);
    slot.prefix = std::min(slot.prefix, place.index);
  }
  Departure departure{place, std::move(position)};
  position = Position{};
  return departure;
}

bool SlotTable::unmap(Departure& departure) noexcept { return close_all(departure.position.mappings); }

bool SlotTable::land(Departure departure, bool unmapped, GroupPtr& last) noexcept {
  const auto [slot, index] = departure.place;
  if (!unmapped) {
    make_room(slot, index + 1);  // a vector that had this index keeps its capacity: this cannot throw
    Position& position = at(slot).positions[static_cast<std::size_t>(index)];
    position = std::move(departure.position);
    position.leaving = false;
    quarantine(slot, position);
    return false;
  }
  GroupPtr group = std::move(departure.position.group);
  remove_holder(*group, slot);
  if (group->writer == slot) {
    group->writer = -1;
    if (!group->holders.empty()) pass_on_writing(*group, index);
  }
  if (group->holders.empty()) last = std::move(group);
  return true;
}

bool SlotTable::drop(std::int64_t slot, std::int64_t index, GroupPtr& last) noexcept {
  Departure departure = lift({slot, index});
  const bool unmapped = unmap(departure);
  return land(std::move(departure), unmapped, last);
}

// Every shared group keeps one slot that may write it, so that what is mapped writable is what exists. If access
// cannot be raised the group stays read-only, which is harmless: shared groups are full.
void SlotTable::pass_on_writing(Group& group, std::int64_t index) noexcept {
  std::int64_t heir = -1;
  for (const std::int64_t holder : group.holders) {
    if (index >= at(holder).size()) continue;  // the mapper has it in hand
    const Position& position = at(holder).positions[static_cast<std::size_t>(index)];
    if (position.group.get() == &group && position.mapped() && (heir < 0 || holder < heir)) heir = holder;
  }
  if (heir < 0) return;
  if (allow(heir, index, 1, Access::read_write).ok()) {
    group.writer = heir;
    at(heir).positions[static_cast<std::size_t>(index)].access = Access::read_write;
  } else {
    (void)allow(heir, index, 1, Access::read);
  }
}

void SlotTable::shorten(std::int64_t slot) noexcept {
  auto& positions = at(slot).positions;
  while (!positions.empty() && positions.back().group == nullptr) positions.pop_back();
}

std::int64_t SlotTable::last_mapped(const Slot& slot, std::int64_t from) const noexcept {
  for (std::int64_t index = slot.size() - 1; index >= from; --index) {
    if (slot.positions[static_cast<std::size_t>(index)].mapped()) return index;
  }
  return -1;
}

Place SlotTable::oldest_kept(FenceNumber passed) const noexcept {
  for (const auto& [order, slot] : kept_order_) {
    if (at(slot).mapped == 0 || at(slot).guard > passed) continue;
    const std::int64_t index = last_mapped(at(slot), 0);
    if (index >= 0) return {slot, index};
  }
  return {};
}

std::int64_t SlotTable::kept(FenceNumber passed) const noexcept {
  std::int64_t groups = 0;
  for (const auto& [order, slot] : kept_order_) groups += at(slot).guard > passed ? 0 : at(slot).mapped;
  return groups;
}

Place SlotTable::any_look_ahead(std::int64_t self, std::int64_t need, FenceNumber passed) const noexcept {
  for (std::int64_t i = 0; i < count(); ++i) {
    const Slot& slot = at(i);
    if (!slot.active || slot.guard > passed) continue;
    const std::int64_t index = last_mapped(slot, i == self ? std::max(need, slot.in_use) : slot.in_use);
    if (index >= 0) return {i, index};
  }
  return {};
}

std::int64_t SlotTable::look_ahead(std::int64_t self, std::int64_t need, FenceNumber passed) const noexcept {
  std::int64_t groups = 0;
  for (std::int64_t i = 0; i < count(); ++i) {
    const Slot& slot = at(i);
    if (!slot.active || slot.guard > passed) continue;
    const std::int64_t from = i == self ? std::max(need, slot.in_use) : slot.in_use;
    for (std::int64_t index = from; index < slot.size(); ++index) {
      groups += slot.positions[static_cast<std::size_t>(index)].mapped();
    }
  }
  return groups;
}

Place SlotTable::any_leaving(FenceNumber passed) const noexcept {
  if (leaving_ == 0) return {};
  for (std::int64_t i = 0; i < count(); ++i) {
    const Slot& slot = at(i);
    if (slot.leaving == 0 || slot.guard > passed) continue;
    for (std::int64_t index = slot.size() - 1; index >= 0; --index) {
      if (slot.positions[static_cast<std::size_t>(index)].leaving) return {i, index};
    }
  }
  return {};
}

}  // namespace vattn
