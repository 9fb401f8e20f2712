// The thread team: wake-up, barriers, scratch. See pool.hpp.
#include "pool.hpp"

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tessera {
namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Spins about `spins` pauses on `done`, then gives the core away between looks: the awaited thread may need it.
template <class Done>
void await(int spins, const Done& done) {
  for (int i = 0; i < spins; ++i) {
    if (done()) return;
    relax();
  }
  while (!done()) sched_yield();
}

constexpr int kWaitSpins = 20000;
constexpr size_t kHugePage = size_t{2} << 20;

std::mutex g_pool_mutex;
std::shared_ptr<Pool> g_pool;

}  // namespace

Arena::~Arena() { std::free(data_); }

char* Arena::ensure(size_t nbytes) {
  if (nbytes <= nbytes_) return data_;
  const size_t rounded = (nbytes + 4095) / 4096 * 4096;
  const size_t alignment = rounded >= kHugePage ? kHugePage : 4096;
  const size_t total = (rounded + alignment - 1) / alignment * alignment;
  char* fresh = static_cast<char*>(std::aligned_alloc(alignment, total));
  if (fresh == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) madvise(fresh, total, MADV_HUGEPAGE);
  std::free(data_);
  data_ = fresh;
  nbytes_ = total;
  return data_;
}

void Team::wait(const std::atomic<int64_t>& done, int64_t units) {
  await(kWaitSpins, [&] { return done.load(std::memory_order_acquire) >= units; });
}

Pool::Pool(int threads, std::chrono::microseconds idle)
    : idle_(idle), counters_(static_cast<size_t>(kMaxPhases) * (threads + 1)) {
  for (int i = 0; i < threads; ++i) scratch_.push_back(std::make_unique<Arena>());
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i, threads] { worker(i, threads); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stop_.store(true);
  }
  wake_.notify_all();
  for (std::thread& thread : workers_) thread.join();
}

void Pool::run_locked(size_t scratch_bytes, Entry entry, const void* ctx) {
  // No worker is inside here: the last region waited for that.
  for (auto& arena : scratch_) arena->ensure(scratch_bytes);
  const int members = threads();
  for (int i = 0; i < used_phases_ * (members + 1); ++i)
    counters_[static_cast<size_t>(i)].value.store(0, std::memory_order_relaxed);
  Team team(counters_.data(), scratch_[0]->data(), 0, members);
  if (members == 1) {
    entry(ctx, team);
    used_phases_ = team.phases();
    return;
  }
  entry_ = entry;
  ctx_ = ctx;
  generation_.fetch_add(1);  // open; sequentially consistent, as are sleepers_ and inside_ against it
  if (sleepers_.load() > 0) {
    { std::lock_guard<std::mutex> lock(sleep_mutex_); }
    wake_.notify_all();
  }
  entry(ctx, team);
  used_phases_ = team.phases();
  generation_.fetch_add(1);  // closed: who has not entered by now will not
  await(kWaitSpins, [&] { return inside_.load() == 0; });
}

void Pool::worker(int member, int members) {
  uint64_t seen = 0;
  const auto opened = [&] {
    const uint64_t now = generation_.load();
    return (now % 2 == 1 && now != seen) || stop_.load(std::memory_order_relaxed);
  };
  while (true) {
    const auto deadline = std::chrono::steady_clock::now() + idle_;
    for (int i = 0; !opened(); ++i) {
      relax();
      if (i % 64 != 63 || std::chrono::steady_clock::now() < deadline) continue;
      std::unique_lock<std::mutex> lock(sleep_mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, opened);
      sleepers_.fetch_sub(1);
    }
    if (stop_.load()) return;
    inside_.fetch_add(1);
    seen = generation_.load();
    if (seen % 2 == 1) {  // still open, and it stays so until we leave
      Team team(counters_.data(), scratch_[static_cast<size_t>(member)]->data(), member, members);
      entry_(ctx_, team);
    }
    inside_.fetch_sub(1);
  }
}

std::shared_ptr<Pool> current_pool() {
  std::lock_guard<std::mutex> lock(g_pool_mutex);
  if (!g_pool) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    const bool known = sched_getaffinity(0, sizeof(cpus), &cpus) == 0;
    g_pool = std::make_shared<Pool>(std::max(1, known ? CPU_COUNT(&cpus) : 1));
  }
  return g_pool;
}

void set_threads(int threads) {
  std::lock_guard<std::mutex> lock(g_pool_mutex);
  if (g_pool && g_pool->threads() == threads) return;
  g_pool = std::make_shared<Pool>(threads);  // a region in flight keeps the old pool until it returns
}

}  // namespace tessera
