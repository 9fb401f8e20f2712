// The one background thread: maps ahead of need, unmaps what nobody reads any more, gives kept groups back in time.
// Owns the queue and the waiting; what a unit of work is, it asks its Work. It never enters Python, never spins, and is idle unless asked.
//
// It shares the allocator's mutex. A unit may let go of the mutex while it calls the driver; it then names the slot it
// works on as busy, and the foreground waits for that one unit only, because the mapper lets it go first.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

namespace vattn {

// Future of one look_ahead(): done when each of its jobs was mapped, given up or cancelled. May outlive the allocator.
class Ticket {
 public:
  explicit Ticket(std::int64_t jobs) : left_(jobs) {}
  void finish_one() noexcept;
  [[nodiscard]] bool done() const noexcept;
  // Seconds < 0: for ever. Returns done().
  bool wait(double timeout_s) const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::int64_t left_;
};

struct Job {
  std::int64_t slot = -1;
  std::uint64_t generation = 0;
  std::int64_t groups = 0;
  std::shared_ptr<Ticket> ticket;
};

class Mapper {
 public:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;

  class Work {
   public:
    virtual ~Work() = default;
    // One group for the job, letting go of the lock in between. False when there is nothing left to do for it.
    virtual bool map_one(Lock& lock, const Job& job) = 0;
    // When there is something to do beside jobs; nothing when there will not be unless somebody calls.
    [[nodiscard]] virtual std::optional<Clock::time_point> next_chore() = 0;
    // One unit of it, letting go of the lock in between.
    virtual void do_chore(Lock& lock) = 0;
  };

  Mapper(std::mutex& mutex, Work& work) : mutex_(mutex), work_(work) {}
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;
  ~Mapper();

  void start();
  // The mutex must not be held. Finishes the unit in hand, cancels the rest and joins. Idempotent.
  void stop() noexcept;

  // The mutex must be held for all that follows.
  void push(Job job);
  void wake() noexcept { wake_.notify_one(); }
  // A unit works on one slot, or on two: where a page is taken from, and where it goes. -1: on no slot.
  void set_busy(std::int64_t slot, std::int64_t other = -1) noexcept {
    busy_ = true;
    busy_slot_ = slot;
    busy_other_ = other;
  }
  void set_idle() noexcept;
  [[nodiscard]] bool busy() const noexcept { return busy_; }
  [[nodiscard]] std::int64_t queued() const noexcept { return static_cast<std::int64_t>(jobs_.size()); }
  // Waits until no unit is under way on `slot` (on any slot where slot < 0). Returns the seconds waited.
  double wait_not_busy(Lock& lock, std::int64_t slot);

 private:
  void run();

  std::mutex& mutex_;
  Work& work_;
  std::condition_variable wake_;
  std::condition_variable idle_;
  std::deque<Job> jobs_;
  std::int64_t foreground_ = 0;  // callers that wait for a unit to end: no new one begins before they ran
  bool busy_ = false;
  std::int64_t busy_slot_ = -1;
  std::int64_t busy_other_ = -1;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace vattn
