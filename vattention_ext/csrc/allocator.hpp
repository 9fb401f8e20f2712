// The allocator: what the Python class does, under one mutex. It executes and may refuse; it decides nothing about
// requests, and it knows neither tensors nor models.
//
// Foreground calls (ensure, share, ...) hold the mutex while they call the driver. The mapper lets go of it, so that a
// call which finds its pages mapped waits for nobody.
//
// Fences. Pages that leave use (release, set_tokens, trim) may be read by kernels launched before; the slot remembers
// the last fence, and until that has passed nothing out of use in it is unmapped. What must go is left to the mapper
// ("leaving"); who needs it sooner waits without the mutex.
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
  int device = 0;        // driver "cuda" only
  std::string library;   // the same: path of libcuda
  std::int64_t stock_groups = 0;  // created ahead by the mapper while memory is being taken
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
  std::int64_t moving_groups;  // in the mapper's hands: created, not landed; or leaving, not destroyed
  std::int64_t leaving_positions;  // to be unmapped when their fence has passed
  std::int64_t stocked_groups;     // of the free ones: created ahead
  std::int64_t over_limit_groups;  // more than the limit, until enough has ended
  std::int64_t shared_groups, read_only_groups;
  std::int64_t active_slots, quarantined_positions;
  std::int64_t mapped_bytes;    // virtual, writable
  std::int64_t shared_bytes;    // virtual, read-only
  std::int64_t physical_bytes;  // committed
  std::int64_t refusals, stolen_groups, reclaimed_groups, failed_unmaps;
  std::int64_t look_ahead_mapped, look_ahead_given_up, queued_jobs;
  std::int64_t map_wait_ns;  // foreground time spent waiting for the mapper
  std::int64_t grow_ns;      // foreground time spent growing
  std::int64_t fence_wait_ns;  // foreground time spent waiting for kernels in flight
  std::int64_t steps, pending_fences;
  std::string last_error;
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
  // After a step's launches on `stream`: what they may read stays mapped until they are through. Throws DriverFailure.
  void fence(std::uint64_t stream);
  // Foreground waits of the latest steps, oldest first [ns].
  std::vector<std::int64_t> stalls();
  // Most groups from now on; more may live until they are released.
  void set_limit(std::int64_t groups);
  Memory device_memory();
  Refusal share(std::int64_t source, std::int64_t target, std::int64_t groups);
  std::int64_t reclaim(std::int64_t keep_groups);
  std::int64_t mapped_tokens(std::int64_t slot);
  std::int64_t tokens(std::int64_t slot);
  Stats stats();
  // Empty when every invariant holds, else the first that does not.
  std::string check();
  void close() noexcept;
  [[nodiscard]] bool closed() const noexcept { return closed_.load(); }

  [[nodiscard]] DriverFacts facts() const noexcept { return driver_->facts(); }
  [[nodiscard]] const Geometry& geometry() const noexcept { return geometry_; }
  // One a plane; empty once closed.
  std::vector<std::shared_ptr<Reservation>> regions();
  // Null unless the driver is "fault".
  [[nodiscard]] FaultDriver* faults() const noexcept { return faults_; }

 private:
  using Lock = Mapper::Lock;
  using Wanted = std::vector<std::int64_t>;

  bool map_one(Lock& lock, const Job& job) override;
  [[nodiscard]] std::optional<Mapper::Clock::time_point> next_chore() override;
  void do_chore(Lock& lock) override;

  enum class Task : std::uint8_t { none, unmap, unstock, stock };
  struct Chore {
    Task kind = Task::none;
    Mapper::Clock::time_point when = Mapper::Clock::time_point::max();
    Place place;
    bool reclaims = false;  // counts as given back in time
  };
  [[nodiscard]] Chore next();
  [[nodiscard]] Chore next_expiry() const;

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
  // Removes positions that are leaving below `need`, or waits for a fence that they need. True: look again.
  bool leaving_in_the_way(Lock& lock, std::int64_t slot, std::int64_t need);
  [[nodiscard]] std::int64_t obtainable(std::int64_t slot, std::int64_t need, std::int64_t count,
                                        FenceNumber passed) const noexcept;
  // Lets at least one more fence pass, without the mutex, and then the mapper leave `slot`. False: none was pending.
  // The slot may be gone afterwards.
  bool wait_for_fence(Lock& lock, std::int64_t slot);
  [[nodiscard]] bool guarded(std::int64_t slot) const noexcept { return table_.at(slot).guard > fences_.passed(); }
  void guard(std::int64_t slot) noexcept;
  Reason grow(std::int64_t slot, const Wanted& missing, std::int64_t need);
  // Null and the reason where no source has one.
  GroupPtr obtain(std::int64_t slot, std::int64_t index, std::int64_t need, Reason& reason);
  GroupPtr steal(Place place);
  Reason place_all(std::int64_t slot, std::vector<Arrival>& arrivals, Access access);
  Status map_or_relieve(std::int64_t slot, Arrival& arrival);
  void undo(std::int64_t slot, std::vector<Arrival>& arrivals);
  Refusal refuse(Reason reason, std::int64_t requested, std::int64_t free);
  // Unmaps a position and retires its group if it was the last. False: quarantined.
  bool drop(std::int64_t slot, std::int64_t index);
  // The same once no kernel in flight may read it: now, or later by the mapper.
  void let_go(std::int64_t slot, std::int64_t index);
  // Unmaps without the mutex; the mapper must be busy with the slot. The group if nobody holds it any more.
  GroupPtr unmap_unlocked(Lock& lock, Place place);
  // Destroys a group's pages without the mutex. True: it is free again.
  bool empty_unlocked(Lock& lock, GroupPtr group);
  void stock_unlocked(Lock& lock);
  GroupPtr claim();
  // Unmaps what is leaving and may. Returns the groups that became free.
  std::int64_t drop_leaving();
  void empty_stock();
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
  Fences fences_;
  Stalls stalls_;
  std::mutex mutex_;
  Mapper mapper_;
  std::atomic<bool> closed_{false};
  std::mutex closing_;
  std::uint64_t releases_ = 0;
  std::int64_t refusals_ = 0, stolen_ = 0, reclaimed_ = 0, failed_unmaps_ = 0, ahead_mapped_ = 0, ahead_given_up_ = 0;
  std::int64_t map_wait_ns_ = 0, grow_ns_ = 0, fence_wait_ns_ = 0;
  std::int64_t highest_limit_ = 0;
  bool stock_wanted_ = false;  // a group was claimed since the stock was last complete, given back, or refused
  Mapper::Clock::time_point claimed_at_;
};

}  // namespace vattn
