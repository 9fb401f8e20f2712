// A thread of the CPU that a GPU calls by a word of memory which both see, and waits for: microseconds, where waking a
// thread through the system takes tens. It knows jobs, not what they are about.
#pragma once
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "ops.hpp"

namespace tessera {

class Bell {
 public:
  // word: 0 = nothing is asked; the device writes the number of a job and waits until it is 0 again. Jobs run on
  // `threads` threads, which look for work without pause until there was none for 20 ms, and then now and again.
  Bell(int32_t* word, int threads);
  ~Bell() { stop(); }
  Bell(const Bell&) = delete;
  Bell& operator=(const Bell&) = delete;

  int32_t add(std::unique_ptr<Job> job);  // its number, from 1 on; a job that runs once gives it back
  void stop();                            // nothing may call any more; idempotent

 private:
  void serve();
  void answer(int32_t number);

  int32_t* const word_;
  Pool pool_;
  std::mutex mutex_;
  std::deque<std::unique_ptr<Job>> jobs_;  // number - 1 is the place
  std::deque<int32_t> free_;
  std::atomic<bool> stop_{false};
  std::thread thread_;  // the last: it uses all of the above
};

}  // namespace tessera
