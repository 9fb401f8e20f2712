// The allocator: what the Python class does, under one mutex. It executes and may refuse; it decides nothing about
// requests, and it knows neither tensors nor models.
//
// Foreground calls (ensure, share, ...) hold the mutex while they call the driver. The mapper lets go of it, so that a
// call which finds its pages mapped waits for nobody.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "fault_driver.hpp"
#include "mapper.hpp"
#include "metered_driver.hpp"
#include "slots.hpp"

namespace vattn {

struct Options {
  std::string driver = "memfd";
  std::int64_t pool_groups = 0;
  double release_after_s = 0;  // infinity: never by time
  std::int64_t floor_groups = 0;
  std::int64_t max_mappings = 0;  // 0: the driver's own budget
  int fail_verb = kAnyVerb;       // driver "fault" only: armed before the first verb
  std::int64_t fail_nth = 0;
  std::int64_t fail_times = 1;
};

struct Stats {
  std::int64_t total_groups, free_groups, in_use_groups, look_ahead_groups, kept_groups, quarantined_groups;
  std::int64_t moving_groups;  // in the mapper's hands: created, not landed; or taken, not destroyed
  std::int64_t shared_groups, read_only_groups;
  std::int64_t active_slots, quarantined_positions;
  std::int64_t mapped_bytes;    // virtual, writable
  std::int64_t shared_bytes;    // virtual, read-only
  std::int64_t physical_bytes;  // committed
  std::int64_t refusals, stolen_groups, reclaimed_groups, failed_unmaps;
  std::int64_t look_ahead_mapped, look_ahead_given_up, queued_jobs;
  std::int64_t map_wait_ns;  // foreground time spent waiting for the mapper
  std::int64_t grow_ns;      // foreground time spent growing
  DriverFacts facts;
  VerbCount verbs[kVerbs];
};

// (slot, tokens) each.
using Pairs = std::vector<std::pair<std::int64_t, std::int64_t>>;

class Allocator final : private Mapper::Work {
 public:
  // Throws std::invalid_argument (a setting that cannot fit), std::runtime_error (the system refuses).
  Allocator(const Geometry& geometry, const Options& options);
  ~Allocator() override;
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  // All of these throw std::invalid_argument for a wrong slot or count, std::runtime_error once closed.
  std::optional<std::int64_t> acquire(std::int64_t tokens);
  Refusal ensure(std::int64_t slot, std::int64_t tokens);
  // The fast path only: true where the slot already holds `tokens` and no one else is inside; never waits.
  bool try_ensure(std::int64_t slot, std::int64_t tokens);
  // The same for all pairs together: true and done, or false and nothing changed.
  bool try_ensure_many(const Pairs& wanted);
  // Each pair as ensure(), in order; a refused one is appended to `refused` and does not stop the rest.
  void ensure_many(const Pairs& wanted, std::vector<std::int64_t>& refused);
  std::shared_ptr<Ticket> look_ahead(const Pairs& wanted);
  void set_tokens(std::int64_t slot, std::int64_t tokens);
  void trim(std::int64_t slot, std::int64_t tokens);
  void release(std::int64_t slot);
  Refusal share(std::int64_t source, std::int64_t target, std::int64_t groups);
  std::int64_t reclaim(std::int64_t keep_groups);
  std::int64_t mapped_tokens(std::int64_t slot);
  std::int64_t tokens(std::int64_t slot);
  Stats stats();
  // Empty when every invariant holds, else the first that does not.
  std::string check();
  void close() noexcept;
  [[nodiscard]] bool closed() const noexcept { return closed_.load(); }

  [[nodiscard]] const Geometry& geometry() const noexcept { return geometry_; }
  // One a plane; empty once closed.
  std::vector<std::shared_ptr<Reservation>> regions();
  // Null unless the driver is "fault".
  [[nodiscard]] FaultDriver* faults() const noexcept { return faults_; }

 private:
  using Lock = Mapper::Lock;
  using Wanted = std::vector<std::int64_t>;

  bool map_one(Lock& lock, const Job& job) override;
  [[nodiscard]] std::optional<Mapper::Clock::time_point> next_expiry() const override;
  void expire_one(Lock& lock) override;

  std::vector<Address> reserve_regions();
  void require_mappings_fit(const std::string& driver) const;
  void require_open() const;
  void require_slot(std::int64_t slot) const;
  void require_active(std::int64_t slot) const;
  void require_tokens(std::int64_t tokens) const;
  // Waits for the mapper to leave `slot` (< 0: everything) and counts the time. The slot may be gone afterwards.
  void wait_for_mapper(Lock& lock, std::int64_t slot);

  [[nodiscard]] bool holds(std::int64_t slot, std::int64_t tokens) const noexcept;
  Refusal ensure_locked(Lock& lock, std::int64_t slot, std::int64_t tokens);
  Refusal map_up_to(Lock& lock, std::int64_t slot, std::int64_t need);
  Refusal grow(std::int64_t slot, const Wanted& missing, std::int64_t need);
  GroupPtr obtain(std::int64_t slot, std::int64_t index, std::int64_t need);
  GroupPtr steal(Place place);
  Reason place_all(std::int64_t slot, std::vector<Arrival>& arrivals, Access access);
  Status map_or_relieve(std::int64_t slot, Arrival& arrival);
  void undo(std::int64_t slot, std::vector<Arrival>& arrivals);
  Refusal refuse(Reason reason, std::int64_t requested, std::int64_t free);
  // Unmaps a position and retires its group if it was the last. False: quarantined.
  bool drop(std::int64_t slot, std::int64_t index);
  void drop_shared_from(std::int64_t slot, std::int64_t first);
  bool heal(std::int64_t slot, std::int64_t first, std::int64_t end);
  std::int64_t heal_all();
  std::int64_t give_back(std::int64_t keep_groups);

  Geometry geometry_;
  Options options_;
  FaultDriver* faults_ = nullptr;
  std::shared_ptr<MeteredDriver> driver_;
  std::vector<std::shared_ptr<Reservation>> regions_;
  PagePool pool_;
  SlotTable table_;
  std::mutex mutex_;
  Mapper mapper_;
  std::atomic<bool> closed_{false};
  std::mutex closing_;
  std::uint64_t releases_ = 0;
  std::int64_t refusals_ = 0, stolen_ = 0, reclaimed_ = 0, failed_unmaps_ = 0, ahead_mapped_ = 0, ahead_given_up_ = 0;
  std::int64_t map_wait_ns_ = 0, grow_ns_ = 0;
};

}  // namespace vattn
