// The thread team every kernel runs on: the caller plus n-1 persistent workers.
// It knows nothing of tensors: it deals unit numbers and scratch memory.
//
// A kernel is a sequence of phases of independent units. A phase is over when all its units are done, not when all
// members have arrived: a worker that the system has not scheduled holds nobody up, and one that comes late walks
// through the finished phases. Each member has its own run of neighbouring units and, when that is dealt out, helps
// with the others'. Which member runs a unit never changes the unit's result.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace tessera {

constexpr int kMaxPhases = 16;

struct alignas(128) Counter {  // on lines of its own
  std::atomic<int64_t> value{0};
};

// Grow-only, 64-byte aligned memory on huge pages where the system gives them.
class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  char* ensure(size_t nbytes);  // contents are lost when it grows; throws std::bad_alloc
  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  size_t nbytes_ = 0;
};

class Pool;

// One member's view of a running region.
class Team {
 public:
  // `counters`: for each phase one counter of units done, then one of units dealt for each member.
  Team(Counter* counters, char* scratch, int member, int members)
      : members(members), member_(member), counters_(counters), scratch_(scratch) {}

  // Runs unit(0), ..., unit(units - 1), shared with the other members; returns when all are done.
  template <class Unit>
  void phase(int64_t units, const Unit& unit) {
    Counter* const counters = counters_ + phases_++ * (members + 1);
    int64_t mine = 0;
    for (int turn = 0; turn < members; ++turn) {
      const int owner = member_ + turn < members ? member_ + turn : member_ + turn - members;
      const int64_t first = units * owner / members, last = units * (owner + 1) / members;
      std::atomic<int64_t>& dealt = counters[1 + owner].value;
      for (int64_t i = first + dealt.fetch_add(1, std::memory_order_relaxed); i < last;
           i = first + dealt.fetch_add(1, std::memory_order_relaxed)) {
        unit(i);
        ++mine;
      }
    }
    if (mine > 0) counters[0].value.fetch_add(mine, std::memory_order_acq_rel);
    wait(counters[0].value, units);
  }
  char* scratch() const { return scratch_; }  // private to this member
  int member() const { return member_; }
  int phases() const { return phases_; }
  const int members;

 private:
  static void wait(const std::atomic<int64_t>& done, int64_t units);
  const int member_;
  int phases_ = 0;
  Counter* counters_;
  char* scratch_;
};

class Pool {
 public:
  // idle: how long a worker looks for the next region before it sleeps; waking it takes the system's time.
  explicit Pool(int threads, std::chrono::microseconds idle = std::chrono::microseconds(150));
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(scratch_.size()); }

  // Runs body(team) on every member and returns when all are done. One region at a time: callers queue on a mutex.
  // `scratch_bytes` is private scratch per member. `body` must not throw.
  template <class Body>
  void run(size_t scratch_bytes, const Body& body) {
    std::lock_guard<std::mutex> lock(region_mutex_);
    run_locked(scratch_bytes, [](const void* ctx, Team& team) { (*static_cast<const Body*>(ctx))(team); }, &body);
  }

 private:
  using Entry = void (*)(const void*, Team&);
  void run_locked(size_t scratch_bytes, Entry entry, const void* ctx);
  void worker(int member, int members);

  const std::chrono::microseconds idle_;
  std::mutex region_mutex_;
  std::vector<std::thread> workers_;
  std::vector<std::unique_ptr<Arena>> scratch_;
  Entry entry_ = nullptr;
  const void* ctx_ = nullptr;
  std::vector<Counter> counters_;
  int used_phases_ = kMaxPhases;  // of the last region, to be cleared
  alignas(128) std::atomic<uint64_t> generation_{0};  // odd while a region is open
  alignas(128) std::atomic<int> inside_{0};           // workers that may be reading the region's state
  alignas(128) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

// The process's pool; the only shared state of this extension. Replaced by set_threads.
std::shared_ptr<Pool> current_pool();
void set_threads(int threads);

}  // namespace tessera
