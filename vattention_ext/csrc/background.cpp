// The mapper's units of work. Each takes what it needs under the lock, calls the driver without it, and lands the
// result under it again; the slot it works on is marked busy meanwhile.
#include "allocator.hpp"

namespace vattn {
namespace {

constexpr double kForeverSeconds = 1e9;  // beyond, a duration would overflow

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

bool Allocator::map_one(Lock& lock, const Job& job) {
  Slot& slot = table_.at(job.slot);
  if (!slot.active || slot.generation != job.generation || slot.prefix >= job.groups) return false;
  Arrival arrival;
  const std::int64_t index = arrival.index = slot.prefix;
  if (arrival.index < slot.size() && slot.positions[static_cast<std::size_t>(arrival.index)].quarantined) {
    ++ahead_given_up_;
    return false;
  }
  arrival.mappings.reserve(static_cast<std::size_t>(geometry_.planes));
  const bool fresh = pool_.free() > 0;
  if (fresh) {
    arrival.group = pool_.claim();
  } else if (const Place place = table_.oldest_kept(); place.slot >= 0) {
    arrival.group = steal(place);  // never look-ahead of others: that would only move the lack
  }
  if (arrival.group == nullptr) {
    ++ahead_given_up_;
    return false;
  }
  table_.make_room(job.slot, arrival.index + 1);
  mapper_.set_busy(job.slot);
  lock.unlock();
  Status status = fresh ? pool_.fill(*arrival.group, job.slot, arrival.index) : Status{};
  if (status.ok()) status = table_.map(job.slot, arrival);
  if (status.ok()) status = table_.allow(job.slot, arrival.index, 1, Access::read_write);
  lock.lock();
  // Again: a foreground call may have stolen from this slot's end. The vector kept its capacity, so this cannot throw.
  table_.make_room(job.slot, arrival.index + 1);
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

std::optional<Mapper::Clock::time_point> Allocator::next_expiry() const {
  if (options_.release_after_s > kForeverSeconds || table_.kept() <= options_.floor_groups) return std::nullopt;
  const Place place = table_.oldest_kept();
  const auto after = std::chrono::duration<double>(options_.release_after_s);
  return table_.at(place.slot).released_at + std::chrono::duration_cast<Mapper::Clock::duration>(after);
}

void Allocator::expire_one(Lock& lock) {
  const Place place = table_.oldest_kept();
  GroupPtr group = steal(place);
  if (group == nullptr) return;  // its unmap failed: quarantined, and no longer kept
  --stolen_;
  mapper_.set_busy(-2);  // no slot: only those wait that need every page
  lock.unlock();
  const bool emptied = PagePool::empty(*group);
  lock.lock();
  pool_.settle(std::move(group), emptied);
  reclaimed_ += emptied;
  mapper_.set_idle();
}

}  // namespace vattn
