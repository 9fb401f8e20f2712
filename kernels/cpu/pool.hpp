// The thread team every kernel runs on: the caller plus n-1 persistent workers.
// It knows nothing of tensors: it hands out unit numbers, barriers and scratch memory.
//
// A kernel is written as phases. Inside a phase each member asks `next()` for units until it gets one past the
// end; `barrier()` ends the phase. Which member runs a unit never changes the unit's result.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace tessera {

constexpr int kMaxPhases = 32;

struct alignas(128) PaddedCounter {
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
  Team(Pool& pool, int member, int members) : member(member), members(members), pool_(pool) {}
  int64_t next();   // the next unit of this phase, counted from 0
  void barrier();   // all members arrive; the next phase starts
  char* scratch();  // this member's private scratch
  const int member;
  const int members;

 private:
  Pool& pool_;
  int phase_ = 0;
};

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Runs body(team) on every member and returns when all are done. One region at a time: callers queue on a mutex.
  // `scratch_bytes` is private scratch per member. `body` must not throw.
  template <class Body>
  void run(size_t scratch_bytes, const Body& body) {
    std::lock_guard<std::mutex> lock(region_mutex_);
    run_locked(scratch_bytes, [](const void* ctx, Team& team) { (*static_cast<const Body*>(ctx))(team); }, &body);
  }

 private:
  friend class Team;
  using Entry = void (*)(const void*, Team&);
  void run_locked(size_t scratch_bytes, Entry entry, const void* ctx);
  void worker(int member, int members);

  std::mutex region_mutex_;
  std::vector<std::thread> workers_;
  std::vector<std::unique_ptr<Arena>> scratch_;
  Entry entry_ = nullptr;
  const void* ctx_ = nullptr;
  PaddedCounter counters_[kMaxPhases];
  alignas(128) std::atomic<uint64_t> generation_{0};
  alignas(128) std::atomic<int> finished_{0};
  alignas(128) std::atomic<int> arrived_{0};
  alignas(128) std::atomic<uint64_t> barrier_round_{0};
  alignas(128) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

// The process's pool; the only shared state of this extension. Replaced by set_threads.
std::shared_ptr<Pool> current_pool();
void set_threads(int threads);

}  // namespace tessera
