// Opening, closing, and the calls that move no memory or give it back; growth is in grow.cpp, statistics and the
// mapper's units in their own files.
#include "allocator.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace vattn {
namespace {

std::string number(std::int64_t value) { return std::to_string(value); }

}  // namespace

Allocator::Allocator(const Geometry& geometry, const Options& options)
    : geometry_(geometry),
      options_(options),
      driver_([&] {
        auto inner = open_driver({options.driver, static_cast<std::size_t>(geometry.page_bytes), options.max_mappings,
                                  options.device, options.library});
        faults_ = dynamic_cast<FaultDriver*>(inner.get());
        if (faults_ != nullptr && options.fail_nth > 0) {
          faults_->fail_at(options.fail_verb, options.fail_nth, options.fail_times);
        }
        return std::make_shared<MeteredDriver>(std::move(inner));
      }()),
      pool_(*driver_, geometry, options.pool_groups),
      table_(*driver_, geometry, reserve_regions()),
      fences_(*driver_),
      mapper_(mutex_, *this),
      highest_limit_(options.pool_groups) {
  require_mappings_fit(options.driver);
  mapper_.start();
}

Allocator::~Allocator() { close(); }

std::vector<Address> Allocator::reserve_regions() {
  const std::int64_t bytes = geometry_.slots * geometry_.slot_bytes();
  std::vector<Address> bases;
  for (std::int64_t plane = 0; plane < geometry_.planes; ++plane) {
    auto region = std::make_shared<Reservation>();
    const Status status = Reservation::open(driver_, static_cast<std::size_t>(bytes), *region);
    if (!status.ok()) {
      throw DriverFailure("cannot reserve " + number(geometry_.planes) + " x " + number(bytes) +
                          " bytes of addresses: " + driver_->explain(status) +
                          "; lower max_model_len or max_num_seqs");
    }
    bases.push_back(region->address());
    regions_.push_back(std::move(region));
  }
  return bases;
}

void Allocator::require_mappings_fit(const std::string& driver) const {
  const DriverFacts facts = driver_->facts();
  if (facts.mapping_budget < 0) return;
  // At best a slot that holds anything is, in every plane, one mapped range and the gap after it.
  const std::int64_t slots = std::min(geometry_.slots, options_.pool_groups);
  const std::int64_t least = geometry_.planes * (2 * slots + 1) + 2;
  if (least <= facts.mapping_budget) return;
  throw std::invalid_argument(number(geometry_.slots) + " slots x " + number(geometry_.planes) +
                              " planes need at least " + number(least) + " mappings, and driver '" + driver +
                              "' may hold " + number(facts.mapping_budget) +
                              " (from vm.max_map_count); use layout 'mega', fewer slots, or raise vm.max_map_count");
}

void Allocator::require_open() const {
  if (closed_.load()) throw std::runtime_error("the allocator is closed");
}

void Allocator::require_slot(std::int64_t slot) const {
  if (slot >= 0 && slot < geometry_.slots) return;
  throw std::invalid_argument("slot=" + number(slot) + " is not in 0.." + number(geometry_.slots - 1));
}

void Allocator::require_active(std::int64_t slot) const {
  require_slot(slot);
  if (table_.at(slot).active) return;
  throw std::invalid_argument("slot=" + number(slot) + " is not acquired; acquire() first");
}

void Allocator::require_tokens(std::int64_t tokens) const {
  if (tokens >= 0 && tokens <= geometry_.max_tokens) return;
  throw std::invalid_argument("tokens=" + number(tokens) + " is not in 0.." + number(geometry_.max_tokens) +
                              " (max_tokens of a slot)");
}

void Allocator::wait_for_mapper(Lock& lock, std::int64_t slot) {
  const auto waited_ns = static_cast<std::int64_t>(mapper_.wait_not_busy(lock, slot) * 1e9);
  map_wait_ns_ += waited_ns;
  stalls_.add(waited_ns);
  require_open();
}

std::optional<std::int64_t> Allocator::acquire(std::int64_t tokens) {
  const Lock lock(mutex_);
  require_open();
  require_tokens(tokens);
  const std::int64_t slot = table_.best_fit(geometry_.groups_for(tokens));
  if (slot < 0) {
    ++refusals_;
    return std::nullopt;
  }
  table_.activate(slot);
  return slot;
}

void Allocator::set_tokens(std::int64_t slot, std::int64_t tokens) {
  Lock lock(mutex_);
  require_open();
  require_active(slot);
  require_tokens(tokens);
  wait_for_mapper(lock, slot);
  require_active(slot);
  const std::int64_t need = geometry_.groups_for(tokens);
  if (need > table_.at(slot).prefix) {
    throw std::invalid_argument("tokens=" + number(tokens) + " needs " + number(need) + " groups and slot " +
                                number(slot) + " has " + number(table_.at(slot).prefix) + " mapped; use ensure()");
  }
  if (tokens < table_.at(slot).tokens) guard(slot);
  table_.set_tokens(slot, tokens);
  drop_shared_from(slot, need);
}

void Allocator::trim(std::int64_t slot, std::int64_t tokens) {
  set_tokens(slot, tokens);
  Lock lock(mutex_);
  require_open();
  require_active(slot);
  wait_for_mapper(lock, slot);
  require_active(slot);
  Slot& s = table_.at(slot);
  for (std::int64_t index = s.size() - 1; index >= s.in_use; --index) {
    if (s.positions[static_cast<std::size_t>(index)].mapped()) let_go(slot, index);
  }
  table_.shorten(slot);
}

void Allocator::release(std::int64_t slot) {
  Lock lock(mutex_);
  require_open();
  require_active(slot);
  ++table_.at(slot).generation;  // before the wait: the mapper begins no further unit for this slot
  wait_for_mapper(lock, slot);
  require_active(slot);
  guard(slot);
  table_.set_tokens(slot, 0);
  drop_shared_from(slot, 0);
  table_.shorten(slot);
  const bool timer_slept = table_.kept() <= options_.floor_groups;
  table_.deactivate(slot, ++releases_);
  if ((timer_slept && !std::isinf(options_.release_after_s)) || pool_.room() < 0) mapper_.wake();
}

void Allocator::guard(std::int64_t slot) noexcept {
  fences_.poll();
  table_.at(slot).guard = fences_.last();
}

void Allocator::fence(std::uint64_t stream) {
  const Lock lock(mutex_);
  require_open();
  const Status status = fences_.add(stream);
  if (!status.ok()) {
    throw DriverFailure("cannot follow stream " + std::to_string(stream) + ": " + driver_->explain(status) +
                        "; nothing may be unmapped safely any more, end the process");
  }
  stalls_.end_step();
}

std::vector<std::int64_t> Allocator::stalls() {
  const Lock lock(mutex_);
  std::vector<std::int64_t> out;
  out.reserve(Stalls::kSteps);
  stalls_.each([&](std::int64_t wait_ns) { out.push_back(wait_ns); });
  return out;
}

void Allocator::set_limit(std::int64_t groups) {
  const Lock lock(mutex_);
  require_open();
  pool_.set_total(groups);
  highest_limit_ = std::max(highest_limit_, groups);
  mapper_.wake();
}

Memory Allocator::device_memory() {
  require_open();
  Memory memory;
  const Status status = driver_->memory(memory);
  if (!status.ok()) throw DriverFailure("cannot read the device's memory: " + driver_->explain(status));
  return memory;
}

bool Allocator::drop(std::int64_t slot, std::int64_t index) {
  GroupPtr last;
  const bool dropped = table_.drop(slot, index, last);
  if (!dropped) ++failed_unmaps_;
  if (last) pool_.retire(std::move(last));
  return dropped;
}

void Allocator::let_go(std::int64_t slot, std::int64_t index) {
  if (!guarded(slot)) {
    const auto start = Mapper::Clock::now();
    drop(slot, index);
    stalls_.add((Mapper::Clock::now() - start).count());
    return;
  }
  table_.depart(slot, index);
  mapper_.wake();
}

std::int64_t Allocator::drop_leaving() {
  const std::int64_t before = pool_.room();
  for (;;) {
    const Place place = table_.any_leaving(fences_.passed());
    if (place.slot < 0) return pool_.room() - before;
    drop(place.slot, place.index);
    table_.shorten(place.slot);
  }
}

void Allocator::empty_stock() {
  stock_wanted_ = false;
  while (pool_.stocked() > 0) pool_.retire(pool_.unstock());
}

// Positions out of use must be private and writable: whoever gets them next writes there.
void Allocator::drop_shared_from(std::int64_t slot, std::int64_t first) {
  Slot& s = table_.at(slot);
  for (std::int64_t index = s.size() - 1; index >= first; --index) {
    const Position& position = s.positions[static_cast<std::size_t>(index)];
    if (position.mapped() && !position.group->is_private_to(slot)) let_go(slot, index);
  }
}

bool Allocator::heal(std::int64_t slot, std::int64_t first, std::int64_t end) {
  bool healed = true;
  for (std::int64_t index = first; index < std::min(end, table_.at(slot).size()); ++index) {
    if (table_.at(slot).positions[static_cast<std::size_t>(index)].quarantined) healed &= drop(slot, index);
  }
  return healed;
}

std::int64_t Allocator::heal_all() {
  const std::int64_t before = pool_.room();
  if (table_.quarantined_positions() > 0) {
    for (std::int64_t slot = 0; slot < table_.count(); ++slot) {
      if (table_.at(slot).quarantined == 0) continue;
      heal(slot, 0, table_.at(slot).size());
      table_.shorten(slot);
    }
  }
  pool_.retry_stranded();
  return pool_.room() - before;
}

std::int64_t Allocator::give_back(std::int64_t keep_groups) {
  const std::int64_t before = pool_.room();
  while (table_.kept() > keep_groups) {
    const Place place = table_.oldest_kept(fences_.passed());
    if (place.slot < 0) break;  // the rest may still be read
    drop(place.slot, place.index);
    table_.shorten(place.slot);
  }
  return pool_.room() - before;
}

std::int64_t Allocator::reclaim(std::int64_t keep_groups) {
  Lock lock(mutex_);
  require_open();
  wait_for_mapper(lock, -1);
  fences_.poll();
  empty_stock();
  const std::int64_t freed =
      heal_all() + drop_leaving() + give_back(keep_groups < 0 ? options_.floor_groups : keep_groups);
  reclaimed_ += freed;
  return freed;
}

std::int64_t Allocator::mapped_tokens(std::int64_t slot) {
  const Lock lock(mutex_);
  require_open();
  require_slot(slot);
  return geometry_.tokens_in(table_.at(slot).prefix);
}

std::int64_t Allocator::tokens(std::int64_t slot) {
  const Lock lock(mutex_);
  require_open();
  require_slot(slot);
  return table_.at(slot).tokens;
}

std::vector<std::shared_ptr<Reservation>> Allocator::regions() {
  const Lock lock(mutex_);
  return regions_;
}

void Allocator::close() noexcept {
  const std::lock_guard<std::mutex> once(closing_);
  if (closed_.exchange(true)) return;
  mapper_.stop();
  const Lock lock(mutex_);
  driver_->quiesce();
  fences_.clear();
  for (std::int64_t slot = 0; slot < table_.count(); ++slot) {
    Slot& s = table_.at(slot);
    for (std::int64_t index = s.size() - 1; index >= 0; --index) {
      // Quarantined ones are tried once more; what still refuses goes with the addresses.
      if (s.positions[static_cast<std::size_t>(index)].group != nullptr) drop(slot, index);
    }
    table_.shorten(slot);
  }
  pool_.retry_stranded();
  empty_stock();
  regions_.clear();  // unreserved when the last exported tensor lets go
  driver_->finish();
}

}  // namespace vattn
