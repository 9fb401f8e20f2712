// Queue, waiting and stopping of the mapper thread; see mapper.hpp.
#include "mapper.hpp"

#include <pthread.h>
#include <signal.h>

#include <utility>

namespace vattn {

void Ticket::finish_one() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (--left_ <= 0) changed_.notify_all();
}

bool Ticket::done() const noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  return left_ <= 0;
}

bool Ticket::wait(double timeout_s) const {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto finished = [this] { return left_ <= 0; };
  if (timeout_s < 0) {
    changed_.wait(lock, finished);
    return true;
  }
  return changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), finished);
}

Mapper::~Mapper() { stop(); }

void Mapper::start() {
  // Signals belong to the process' main thread: the mapper starts, and stays, with all of them blocked.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Mapper::stop() noexcept {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
    wake_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void Mapper::push(Job job) {
  if (stop_) {
    job.ticket->finish_one();
    return;
  }
  jobs_.push_back(std::move(job));
  wake_.notify_one();
}

void Mapper::set_idle() noexcept {
  busy_ = false;
  busy_slot_ = busy_other_ = -1;
  idle_.notify_all();
}

double Mapper::wait_not_busy(Lock& lock, std::int64_t slot) {
  const auto clear = [this, slot] { return !busy_ || (slot >= 0 && busy_slot_ != slot && busy_other_ != slot); };
  if (clear()) return 0.0;
  const Clock::time_point start = Clock::now();
  ++foreground_;
  idle_.wait(lock, clear);
  if (--foreground_ == 0) wake_.notify_one();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void Mapper::run() {
  Lock lock(mutex_);
  while (!stop_) {
    if (foreground_ > 0) {
      wake_.wait(lock);
    } else if (!jobs_.empty()) {
      const Job job = jobs_.front();  // a copy: others push while the lock is let go
      if (!work_.map_one(lock, job)) {
        jobs_.pop_front();
        job.ticket->finish_one();
      }
    } else if (const auto chore = work_.next_chore(); !chore) {
      wake_.wait(lock);
    } else if (*chore > Clock::now()) {
      wake_.wait_until(lock, *chore);
    } else {
      work_.do_chore(lock);
    }
  }
  for (const Job& job : jobs_) job.ticket->finish_one();
  jobs_.clear();
}

}  // namespace vattn
