// The thread behind a Bell. See bell.hpp.
#include "bell.hpp"

namespace tessera {
namespace {

constexpr auto kAwake = std::chrono::milliseconds(20);
constexpr auto kNap = std::chrono::microseconds(100);

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Bell::Bell(int32_t* word, int threads) : word_(word), pool_(threads, kAwake), thread_([this] { serve(); }) {}

int32_t Bell::add(std::unique_ptr<Job> job) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) {
    jobs_.push_back(std::move(job));
    return static_cast<int32_t>(jobs_.size());
  }
  const int32_t number = free_.front();
  free_.pop_front();
  jobs_[static_cast<size_t>(number - 1)] = std::move(job);
  return number;
}

void Bell::stop() {
  stop_.store(true);
  if (thread_.joinable()) thread_.join();
}

void Bell::serve() {
  auto last = std::chrono::steady_clock::now();
  for (int looks = 0; !stop_.load(std::memory_order_relaxed); ++looks) {
    const int32_t number = __atomic_load_n(word_, __ATOMIC_ACQUIRE);
    if (number != 0) {
      answer(number);
      last = std::chrono::steady_clock::now();
    } else if (looks % 256 == 255 && std::chrono::steady_clock::now() - last > kAwake) {
      std::this_thread::sleep_for(kNap);
    } else {
      relax();
    }
  }
}

void Bell::answer(int32_t number) {
  Job* job = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (number > 0 && static_cast<size_t>(number) <= jobs_.size()) job = jobs_[static_cast<size_t>(number - 1)].get();
  }
  const bool once = job != nullptr && job->once;
  if (job != nullptr) do_job(*job, pool_);
  if (once) {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_[static_cast<size_t>(number - 1)].reset();
    free_.push_back(number);
  }
  __atomic_store_n(word_, 0, __ATOMIC_RELEASE);
}

}  // namespace tessera
