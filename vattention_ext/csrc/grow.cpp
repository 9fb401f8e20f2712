// Growth and sharing: everything that maps in the foreground. All or nothing: what fails is undone at every verb.
//
// Where pages come from, in this order: the pool (created now), kept pages of released slots (the longest released
// first), look-ahead pages of running slots. A create that the system refuses falls through to the next source.
#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include "allocator.hpp"

namespace vattn {

bool Allocator::holds(std::int64_t slot, std::int64_t tokens) const noexcept {
  if (slot < 0 || slot >= geometry_.slots || tokens < 0 || tokens > geometry_.max_tokens) return false;
  const Slot& s = table_.at(slot);
  return s.active && geometry_.groups_for(tokens) <= s.prefix;
}

bool Allocator::try_ensure(std::int64_t slot, std::int64_t tokens) {
  const Lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || closed_.load() || !holds(slot, tokens)) return false;
  if (tokens > table_.at(slot).tokens) table_.set_tokens(slot, tokens);
  return true;
}

bool Allocator::try_ensure_many(const Pairs& wanted) {
  const Lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock() || closed_.load()) return false;
  for (const auto& [slot, tokens] : wanted) {
    if (!holds(slot, tokens)) return false;
  }
  for (const auto& [slot, tokens] : wanted) {
    if (tokens > table_.at(slot).tokens) table_.set_tokens(slot, tokens);
  }
  return true;
}

Refusal Allocator::ensure(std::int64_t slot, std::int64_t tokens) {
  Lock lock(mutex_);
  return ensure_locked(lock, slot, tokens);
}

void Allocator::ensure_many(const Pairs& wanted, std::vector<std::int64_t>& refused) {
  Lock lock(mutex_);
  require_open();
  for (const auto& [slot, tokens] : wanted) {  // before the first page moves: a wrong pair changes nothing
    require_active(slot);
    require_tokens(tokens);
  }
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (ensure_locked(lock, wanted[i].first, wanted[i].second).refused()) {
      refused.push_back(static_cast<std::int64_t>(i));
    }
  }
}

Refusal Allocator::ensure_locked(Lock& lock, std::int64_t slot, std::int64_t tokens) {
  require_open();
  require_active(slot);
  require_tokens(tokens);
  const std::int64_t need = geometry_.groups_for(tokens);
  Slot& s = table_.at(slot);
  if (need > s.prefix) {
    wait_for_mapper(lock, slot);
    require_active(slot);
    const std::int64_t waited_ns = map_wait_ns_ + fence_wait_ns_;  // these are counted where they are spent
    const auto start = Mapper::Clock::now();
    const Refusal refusal = need > s.prefix ? map_up_to(lock, slot, need) : Refusal{};
    const std::int64_t spent_ns = (Mapper::Clock::now() - start).count() - (map_wait_ns_ + fence_wait_ns_ - waited_ns);
    grow_ns_ += spent_ns;
    stalls_.add(spent_ns);
    if (refusal.refused()) return refusal;
  }
  if (tokens > s.tokens) table_.set_tokens(slot, tokens);
  return {};
}

std::int64_t Allocator::obtainable(std::int64_t slot, std::int64_t need, std::int64_t count,
                                   FenceNumber passed) const noexcept {
  const std::int64_t cheap = pool_.room() + table_.kept(passed);
  return cheap >= count ? cheap : cheap + table_.look_ahead(slot, need, passed);
}

bool Allocator::wait_for_fence(Lock& lock, std::int64_t slot) {
  const FenceNumber before = fences_.passed();
  fences_.poll();
  if (fences_.passed() > before) return true;  // one has, since the caller looked
  const std::shared_ptr<const Fence> oldest = fences_.oldest();
  if (oldest == nullptr) return false;
  const auto start = Mapper::Clock::now();
  lock.unlock();
  oldest->await();
  lock.lock();
  const std::int64_t waited_ns = (Mapper::Clock::now() - start).count();
  fence_wait_ns_ += waited_ns;
  stalls_.add(waited_ns);
  fences_.poll();
  wait_for_mapper(lock, slot);
  return true;
}

bool Allocator::leaving_in_the_way(Lock& lock, std::int64_t slot, std::int64_t need) {
  Slot& s = table_.at(slot);
  if (s.leaving == 0) return false;
  for (std::int64_t index = 0; index < std::min(need, s.size()); ++index) {
    if (!s.positions[static_cast<std::size_t>(index)].leaving) continue;
    if (guarded(slot)) return wait_for_fence(lock, slot);
    drop(slot, index);
  }
  return false;
}

Refusal Allocator::map_up_to(Lock& lock, std::int64_t slot, std::int64_t need) {
  Slot& s = table_.at(slot);
  for (bool waited = false;;) {
    fences_.poll();
    if (leaving_in_the_way(lock, slot, need)) {
      require_active(slot);
      continue;
    }
    if (need <= s.prefix) return {};
    if (!heal(slot, 0, need)) return refuse(Reason::driver, need - s.prefix, pool_.free());
    Wanted missing;
    for (std::int64_t index = s.prefix; index < need; ++index) {
      if (index >= s.size() || !s.positions[static_cast<std::size_t>(index)].mapped()) missing.push_back(index);
    }
    const auto count = static_cast<std::int64_t>(missing.size());
    std::int64_t available = obtainable(slot, need, count, fences_.passed());
    if (available < count && mapper_.busy() && !waited) {
      // What the mapper has in hand is ours as soon as it lands. Others run meanwhile and may take look-ahead pages of
      // this very slot: everything is looked at again.
      wait_for_mapper(lock, -1);
      require_active(slot);
      waited = true;
      continue;
    }
    if (available < count && drop_leaving() + heal_all() > 0) {
      available = obtainable(slot, need, count, fences_.passed());
    }
    const std::int64_t in_time = obtainable(slot, need, count, kEveryFence) + table_.leaving();
    const Reason reason = available < count ? Reason::pages : grow(slot, missing, need);
    if (reason == Reason::none) return {};
    // The books are right, but kernels in flight may still read what was released last.
    if (in_time > available && in_time >= count && wait_for_fence(lock, slot)) {
      require_active(slot);
      waited = false;
      continue;
    }
    if (reason != Reason::pages) {  // what a failed growth undid is obtainable again
      available = pool_.room() + table_.kept() + table_.look_ahead(slot, need, kEveryFence);
    }
    return refuse(reason, count, available);
  }
}

Refusal Allocator::refuse(Reason reason, std::int64_t requested, std::int64_t free) {
  ++refusals_;
  return {reason, requested, std::max<std::int64_t>(0, free), pool_.total()};
}

Reason Allocator::grow(std::int64_t slot, const Wanted& missing, std::int64_t need) {
  table_.make_room(slot, need);
  std::vector<Arrival> arrivals;
  arrivals.reserve(missing.size());
  Reason reason = Reason::none;
  for (const std::int64_t index : missing) {
    Arrival arrival;
    arrival.index = index;
    arrival.mappings.reserve(static_cast<std::size_t>(geometry_.planes));
    arrival.group = obtain(slot, index, need, reason);
    if (arrival.group == nullptr) break;
    arrivals.push_back(std::move(arrival));
  }
  if (reason == Reason::none) reason = place_all(slot, arrivals, Access::read_write);
  if (reason != Reason::none) undo(slot, arrivals);
  return reason;
}

GroupPtr Allocator::claim() {
  if (options_.stock_groups > 0) {
    stock_wanted_ = true;
    claimed_at_ = Mapper::Clock::now();
    mapper_.wake();
  }
  return pool_.claim();
}

GroupPtr Allocator::obtain(std::int64_t slot, std::int64_t index, std::int64_t need, Reason& reason) {
  Status created;
  if (pool_.free() > 0) {
    GroupPtr group = claim();
    created = pool_.fill(*group, slot, index);
    if (created.ok()) return group;
    pool_.retire(std::move(group));
  }
  for (;;) {
    Place place = table_.oldest_kept(fences_.passed());
    if (place.slot < 0) place = table_.any_look_ahead(slot, need, fences_.passed());
    if (place.slot < 0) {
      reason = created.code == ENOMEM || created.code == ENOSPC ? Reason::memory : Reason::driver;
      return nullptr;
    }
    if (GroupPtr group = steal(place)) return group;
  }
}

GroupPtr Allocator::steal(Place place) {
  GroupPtr group;
  if (!table_.drop(place.slot, place.index, group)) ++failed_unmaps_;
  table_.shorten(place.slot);
  stolen_ += group != nullptr;
  return group;
}

Status Allocator::map_or_relieve(std::int64_t slot, Arrival& arrival) {
  for (;;) {
    const Status status = table_.map(slot, arrival);
    if (status.code != kOverBudget || table_.kept(fences_.passed()) == 0) return status;
    // Kept pages are mappings, too: give them back, oldest first, until it fits.
    reclaimed_ += give_back(table_.kept() - 1);
  }
}

Reason Allocator::place_all(std::int64_t slot, std::vector<Arrival>& arrivals, Access access) {
  if (arrivals.empty()) return Reason::none;
  for (Arrival& arrival : arrivals) {
    const Status status = map_or_relieve(slot, arrival);
    if (!status.ok()) return status.code == kOverBudget ? Reason::mappings : Reason::driver;
  }
  // One call a plane for each run of neighbours: on a GPU setting access is the dearest verb.
  for (std::size_t first = 0; first < arrivals.size();) {
    std::size_t end = first + 1;
    while (end < arrivals.size() && arrivals[end].index == arrivals[end - 1].index + 1) ++end;
    const auto count = static_cast<std::int64_t>(end - first);
    if (!table_.allow(slot, arrivals[first].index, count, access).ok()) return Reason::driver;
    first = end;
  }
  table_.make_room(slot, arrivals.back().index + 1);  // stealing from this slot's own end may have shortened it
  for (Arrival& arrival : arrivals) table_.commit(slot, std::move(arrival), access);
  return Reason::none;
}

void Allocator::undo(std::int64_t slot, std::vector<Arrival>& arrivals) {
  if (!arrivals.empty()) table_.make_room(slot, arrivals.back().index + 1);
  for (auto arrival = arrivals.rbegin(); arrival != arrivals.rend(); ++arrival) {
    if (!table_.discard(slot, *arrival)) {
      ++failed_unmaps_;
    } else if (arrival->group->holders.empty()) {
      pool_.retire(std::move(arrival->group));
    }
  }
  table_.shorten(slot);
}

Refusal Allocator::share(std::int64_t source, std::int64_t target, std::int64_t groups) {
  Lock lock(mutex_);
  const auto require = [&] {
    require_open();
    require_active(source);
    require_active(target);
    const Slot& from = table_.at(source);
    if (source == target) throw std::invalid_argument("slot=" + std::to_string(source) + " cannot share with itself");
    if (groups < 0 || groups > std::min(from.in_use, from.prefix)) {
      throw std::invalid_argument("groups=" + std::to_string(groups) + " is not in 0.." + std::to_string(from.in_use) +
                                  " (groups in use of slot " + std::to_string(source) + ")");
    }
  };
  require();
  Slot& to = table_.at(target);
  const auto in_the_way = [&] {
    for (std::int64_t index = to.in_use; index < std::min(groups, to.size()); ++index) {
      if (to.positions[static_cast<std::size_t>(index)].group != nullptr) return true;
    }
    return false;
  };
  do {
    wait_for_mapper(lock, source);
    wait_for_mapper(lock, target);
    require();
    fences_.poll();
  } while (guarded(target) && in_the_way() && wait_for_fence(lock, target));
  require();
  table_.make_room(target, groups);
  std::vector<Arrival> arrivals;
  for (std::int64_t index = to.in_use; index < groups; ++index) {
    // Look-ahead pages in the way go back to the pool; they held nothing.
    Position& old = to.positions[static_cast<std::size_t>(index)];
    if (old.group != nullptr && !drop(target, index)) return refuse(Reason::driver, groups, pool_.free());
    Arrival arrival;
    arrival.index = index;
    arrival.mappings.reserve(static_cast<std::size_t>(geometry_.planes));
    arrival.group = table_.at(source).positions[static_cast<std::size_t>(index)].group;
    arrival.group->holders.reserve(arrival.group->holders.size() + 1);
    arrivals.push_back(std::move(arrival));
  }
  const Reason reason = place_all(target, arrivals, Access::read);
  if (reason != Reason::none) {
    undo(target, arrivals);
    return refuse(reason, groups, pool_.free());
  }
  const std::int64_t tokens = geometry_.tokens_in(groups);
  if (tokens > to.tokens) table_.set_tokens(target, tokens);
  return {};
}

}  // namespace vattn
