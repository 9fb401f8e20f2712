// What can be seen: statistics, recounted from the slots each time, and the check of every invariant.
#include <algorithm>
#include <unordered_map>

#include "allocator.hpp"

namespace vattn {
namespace {

enum Kind : int { kInUse, kLookAhead, kKept, kLeaving, kQuarantined };
constexpr int kKinds = 5;

Kind kind_of(const Slot& slot, std::int64_t index, const Position& position) {
  if (position.quarantined) return kQuarantined;
  if (position.leaving) return kLeaving;
  if (!slot.active) return kKept;
  return index < slot.in_use ? kInUse : kLookAhead;
}

}  // namespace

Stats Allocator::stats() {
  const Lock lock(mutex_);
  Stats s{};
  s.total_groups = pool_.total();
  s.free_groups = pool_.free();
  s.quarantined_groups = pool_.stranded();
  std::unordered_map<const Group*, Kind> shared;
  std::int64_t counts[kKinds] = {};
  for (std::int64_t i = 0; i < table_.count(); ++i) {
    const Slot& slot = table_.at(i);
    s.active_slots += slot.active;
    s.quarantined_positions += slot.quarantined;
    s.leaving_positions += slot.leaving;
    for (std::int64_t index = 0; index < slot.size(); ++index) {
      const Position& position = slot.positions[static_cast<std::size_t>(index)];
      if (position.group == nullptr) continue;
      std::int64_t planes = 0;
      for (const Mapping& mapping : position.mappings) planes += mapping.owned();
      (position.access == Access::read_write ? s.mapped_bytes : s.shared_bytes) += planes * geometry_.page_bytes;
      const Kind kind = kind_of(slot, index, position);
      if (position.group->holders.size() == 1) {
        ++counts[kind];
        s.read_only_groups += position.group->writer < 0;
      } else {
        const auto [entry, added] = shared.emplace(position.group.get(), kind);
        if (!added) entry->second = std::min(entry->second, kind);
      }
    }
  }
  for (const auto& [group, kind] : shared) {
    ++counts[kind];
    s.read_only_groups += group->writer < 0;
  }
  s.shared_groups = static_cast<std::int64_t>(shared.size());
  s.in_use_groups = counts[kInUse];
  s.look_ahead_groups = counts[kLookAhead];
  s.kept_groups = counts[kKept];
  s.quarantined_groups += counts[kQuarantined];
  s.moving_groups = pool_.live() - pool_.stranded();
  for (const Kind kind : {kInUse, kLookAhead, kKept, kQuarantined}) s.moving_groups -= counts[kind];
  s.stocked_groups = pool_.stocked();
  s.over_limit_groups = std::max<std::int64_t>(0, -pool_.room());
  s.physical_bytes = (pool_.live() + pool_.stocked()) * geometry_.planes * geometry_.page_bytes;
  s.refusals = refusals_;
  s.stolen_groups = stolen_;
  s.reclaimed_groups = reclaimed_;
  s.failed_unmaps = failed_unmaps_;
  s.look_ahead_mapped = ahead_mapped_;
  s.look_ahead_given_up = ahead_given_up_;
  s.queued_jobs = mapper_.queued();
  s.map_wait_ns = map_wait_ns_;
  s.grow_ns = grow_ns_;
  s.fence_wait_ns = fence_wait_ns_;
  s.steps = stalls_.steps();
  s.pending_fences = fences_.pending();
  s.last_error = driver_->last_error();
  s.facts = driver_->facts();
  for (int verb = 0; verb < kVerbs; ++verb) s.verbs[verb] = driver_->count(static_cast<Verb>(verb));
  return s;
}

std::string Allocator::check() {
  Lock lock(mutex_);
  mapper_.wait_not_busy(lock, -1);  // lets the lock go, so a close may have come and gone: only now look
  if (closed_.load()) {
    lock.unlock();  // a close under way takes the two in this order
    const std::lock_guard<std::mutex> closing(closing_);
    lock.lock();
    const bool left = table_.quarantined_positions() == 0 && pool_.live() != pool_.stranded();
    return left ? "groups left after close" : "";
  }
  std::unordered_map<const Group*, std::int64_t> holders;
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < table_.count(); ++i) {
    const Slot& slot = table_.at(i);
    const std::string where = "slot " + std::to_string(i);
    std::int64_t mapped = 0;
    std::int64_t prefix = 0;
    std::int64_t quarantined = 0;
    std::int64_t leaving = 0;
    if (slot.size() > geometry_.groups_per_slot) return where + " is longer than its range";
    for (std::int64_t index = 0; index < slot.size(); ++index) {
      const Position& position = slot.positions[static_cast<std::size_t>(index)];
      if (position.group == nullptr) continue;
      const Group& group = *position.group;
      ++holders[&group];
      if (std::count(group.holders.begin(), group.holders.end(), i) != 1) return where + " is not once a holder";
      quarantined += position.quarantined;
      leaving += position.leaving;
      if (position.quarantined && position.leaving) return where + " has a position in two states";
      if (!position.mapped()) continue;
      ++mapped;
      prefix += prefix == index;
      if (static_cast<std::int64_t>(group.pages.size()) != geometry_.planes) return where + " has half a group";
      if (position.mappings.size() != group.pages.size()) return where + " has half a mapping";
      const bool writable = position.access == Access::read_write;
      if (writable != (group.writer == i)) return where + " and its group disagree on who writes";
      if (index >= slot.in_use && !group.is_private_to(i)) return where + " keeps a shared group out of use";
    }
    if (mapped != slot.mapped || prefix != slot.prefix || quarantined != slot.quarantined ||
        leaving != slot.leaving) {
      return where + " miscounts";
    }
    if (slot.in_use != geometry_.groups_for(slot.tokens)) return where + " miscounts its tokens";
    if (slot.active && slot.in_use > slot.prefix) return where + " uses what is not mapped";
    if (!slot.active) kept += mapped;
  }
  if (kept != table_.kept()) return "kept groups are miscounted";
  for (const auto& [group, count] : holders) {
    if (count != static_cast<std::int64_t>(group->holders.size())) return "a group has a holder that does not hold it";
  }
  const auto held = static_cast<std::int64_t>(holders.size());
  if (held + pool_.stranded() != pool_.live()) return "live groups are neither mapped nor stranded";
  if (pool_.live() > highest_limit_) return "more groups than the pool has";
  return "";
}

}  // namespace vattn
