// The mapper's units of work. Each takes what it needs under the lock, calls the driver without it, and lands the
// result under it again; the slot it works on is marked busy meanwhile.
#include <algorithm>

#include "allocator.hpp"

namespace vattn {
namespace {

constexpr double kForeverSeconds = 1e9;  // beyond, a duration would overflow
constexpr std::chrono::milliseconds kFencePoll{1};

}  // namespace

std::shared_ptr<Ticket> Allocator::look_ahead(const Pairs& wanted) {
  const Lock lock(mutex_);
  require_open();
  for (const auto& [slot, tokens] : wanted) {
    require_active(slot);
    require_tokens(tokens);
  }
  std::vector<Job> jobs;
  for (const auto& [slot, tokens] : wanted) {
    const std::int64_t groups = geometry_.groups_for(tokens);
    if (groups > table_.at(slot).prefix) jobs.push_back({slot, table_.at(slot).generation, groups, nullptr});
  }
  auto ticket = std::make_shared<Ticket>(static_cast<std::int64_t>(jobs.size()));
  for (Job& job : jobs) {
    job.ticket = ticket;
    mapper_.push(std::move(job));
  }
  return ticket;
}

GroupPtr Allocator::unmap_unlocked(Lock& lock, Place place) {
  Departure departure = table_.lift(place);
  lock.unlock();
  const bool unmapped = SlotTable::unmap(departure);
  lock.lock();
  GroupPtr last;
  if (!table_.land(std::move(departure), unmapped, last)) ++failed_unmaps_;
  table_.shorten(place.slot);
  return last;
}

bool Allocator::empty_unlocked(Lock& lock, GroupPtr group) {
  lock.unlock();
  const bool emptied = PagePool::empty(*group);
  lock.lock();
  pool_.settle(std::move(group), emptied);
  return emptied;
}

void Allocator::stock_unlocked(Lock& lock) {
  GroupPtr group = pool_.claim_empty();  // live meanwhile, so that nobody else creates beyond the limit
  lock.unlock();
  const bool filled = pool_.fill(*group, 0, 0).ok();
  lock.lock();
  if (filled) {
    pool_.stock(std::move(group));
  } else {
    stock_wanted_ = false;
    empty_unlocked(lock, std::move(group));
  }
}

bool Allocator::map_one(Lock& lock, const Job& job) {
  Slot& slot = table_.at(job.slot);
  if (!slot.active || slot.generation != job.generation || slot.prefix >= job.groups) return false;
  fences_.poll();
  Arrival arrival;
  const std::int64_t index = arrival.index = slot.prefix;
  if (index < slot.size()) {
    const Position& old = slot.positions[static_cast<std::size_t>(index)];
    if (old.leaving && !guarded(job.slot)) {
      mapper_.set_busy(job.slot);
      if (GroupPtr group = unmap_unlocked(lock, {job.slot, index})) empty_unlocked(lock, std::move(group));
      mapper_.set_idle();
      return true;  // and once more, for this index
    }
    if (old.leaving || old.quarantined) {
      ++ahead_given_up_;
      return false;
    }
  }
  arrival.mappings.reserve(static_cast<std::size_t>(geometry_.planes));
  const bool fresh = pool_.free() > 0;
  Place victim;  // never look-ahead of others: that would only move the lack
  if (!fresh && pool_.room() + table_.kept() > 0) victim = table_.oldest_kept(fences_.passed());
  if (!fresh && victim.slot < 0) {
    ++ahead_given_up_;
    return false;
  }
  table_.make_room(job.slot, index + 1);
  if (fresh) arrival.group = claim();
  mapper_.set_busy(job.slot, victim.slot);
  if (!fresh) {
    arrival.group = unmap_unlocked(lock, victim);
    stolen_ += arrival.group != nullptr;
    if (arrival.group == nullptr) {
      ++ahead_given_up_;
      mapper_.set_idle();
      return false;
    }
  }
  lock.unlock();
  Status status = fresh ? pool_.fill(*arrival.group, job.slot, index) : Status{};
  if (status.ok()) status = table_.map(job.slot, arrival);
  if (status.ok()) status = table_.allow(job.slot, index, 1, Access::read_write);
  lock.lock();
  // Again: a foreground call may have stolen from this slot's end. The vector kept its capacity, so this cannot throw.
  table_.make_room(job.slot, index + 1);
  if (status.ok()) {
    table_.commit(job.slot, std::move(arrival), Access::read_write);
    ++ahead_mapped_;
  } else {
    std::vector<Arrival> arrivals;
    arrivals.push_back(std::move(arrival));
    undo(job.slot, arrivals);
    ++ahead_given_up_;
  }
  mapper_.set_idle();
  if (!status.ok()) return false;
  // The pages are already anybody's: at worst the hint comes too late and finds them gone.
  lock.unlock();
  table_.warm(job.slot, index);
  lock.lock();
  return true;
}

// What is due now comes before what will be; of the latter the earliest.
Allocator::Chore Allocator::next() {
  fences_.poll();
  const FenceNumber passed = fences_.passed();
  const auto now = Mapper::Clock::now();
  auto soon = Mapper::Clock::time_point::max();  // to ask the fences again: nobody tells us when one passes
  if (table_.leaving() > 0) {
    const Place place = table_.any_leaving(passed);
    if (place.slot >= 0) return {Task::unmap, now, place, false};
    soon = now + kFencePoll;
  }
  if (pool_.stocked() > pool_.free()) return {Task::unstock, now, {}, false};
  if (pool_.room() < 0) {
    Place place = table_.oldest_kept(passed);
    if (place.slot < 0) place = table_.any_look_ahead(-1, 0, passed);
    if (place.slot >= 0) return {Task::unmap, now, place, true};
    if (table_.kept() > 0) soon = now + kFencePoll;
  }
  if (stock_wanted_ && pool_.stocked() < std::min(options_.stock_groups, pool_.free())) {
    return {Task::stock, now, {}, false};
  }
  Chore chore = next_expiry();
  if (chore.kind == Task::unmap && chore.place.slot < 0) {  // due, but guarded
    chore.kind = Task::none;
    chore.when = std::max(chore.when, now + kFencePoll);
  }
  if (soon < chore.when) return {Task::none, soon, {}, false};
  return chore;
}

Allocator::Chore Allocator::next_expiry() const {
  Chore chore;
  if (options_.release_after_s > kForeverSeconds) return chore;
  const auto after =
      std::chrono::duration_cast<Mapper::Clock::duration>(std::chrono::duration<double>(options_.release_after_s));
  if (table_.kept() > options_.floor_groups) {
    const Place oldest = table_.oldest_kept(kEveryFence);
    chore = {Task::unmap, table_.at(oldest.slot).released_at + after, table_.oldest_kept(fences_.passed()), true};
  }
  if (pool_.stocked() > 0 && claimed_at_ + after < chore.when) chore = {Task::unstock, claimed_at_ + after, {}, false};
  return chore;
}

std::optional<Mapper::Clock::time_point> Allocator::next_chore() {
  const Chore chore = next();
  if (chore.when == Mapper::Clock::time_point::max()) return std::nullopt;
  return chore.when;
}

void Allocator::do_chore(Lock& lock) {
  const Chore chore = next();
  if (chore.when > Mapper::Clock::now()) return;
  mapper_.set_busy(chore.place.slot);
  if (chore.kind == Task::unmap) {
    GroupPtr group = unmap_unlocked(lock, chore.place);
    if (group != nullptr && empty_unlocked(lock, std::move(group))) reclaimed_ += chore.reclaims;
  } else if (chore.kind == Task::unstock) {
    stock_wanted_ = false;
    empty_unlocked(lock, pool_.unstock());
  } else if (chore.kind == Task::stock) {
    stock_unlocked(lock);
  }
  mapper_.set_idle();
}

}  // namespace vattn
