// Stress of the allocator's C++ for the sanitizers (scripts/sanitize.sh): threads that grow, share, trim, release and
// look ahead on their own slots of one small pool, another that looks at it, with and without injected failures, and
// closing in the middle of everything. Ends with status 1 and a line if an invariant breaks.
//
//   stress [rounds] [library]   with the fake libcuda's path: the CUDA drivers, too, on streams that run when they like
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>

#include "allocator.hpp"

namespace {

using vattn::Allocator;

std::atomic<int> broken{0};

void expect(bool ok, const char* what, const std::string& more = "") {
  if (ok) return;
  std::fprintf(stderr, "broken: %s %s\n", what, more.c_str());
  ++broken;
}

// The fake's controls; null without it.
struct Fake {
  const char* path = nullptr;
  void (*automatic)(int) = nullptr;
  long (*advance)(std::uint64_t, long) = nullptr;
  const char* (*violations)() = nullptr;
};
Fake fake;

template <typename Function>
void look_up(void* library, const char* name, Function& out) {
  out = reinterpret_cast<Function>(dlsym(library, name));
  expect(out != nullptr, "the fake has no", name);
}

void open_fake(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  expect(library != nullptr, "cannot open", path);
  if (library == nullptr) return;
  fake.path = path;
  look_up(library, "fake_automatic", fake.automatic);
  look_up(library, "fake_advance", fake.advance);
  look_up(library, "fake_violations", fake.violations);
  fake.automatic(0);
}

vattn::Geometry shape(std::int64_t planes) { return {planes, 9, 6, 4096, 384, 60}; }

// Writes and reads back the last byte of what the slot uses: ASan sees nothing of mmap, the kernel does.
void touch(Allocator& kv, std::int64_t slot, std::int64_t tokens) {
  const vattn::Geometry& g = kv.geometry();
  for (const auto& region : kv.regions()) {
    auto* byte = reinterpret_cast<volatile char*>(region->address() + static_cast<std::size_t>(
        slot * g.slot_bytes() + tokens * g.token_bytes - 1));
    *byte = static_cast<char>(slot);
    expect(*byte == static_cast<char>(slot), "a byte written is not read back");
  }
}

void work(Allocator& kv, unsigned seed, int rounds, bool closing) {
  std::mt19937 random(seed);
  const auto below = [&](std::int64_t n) { return static_cast<std::int64_t>(random() % static_cast<unsigned>(n)); };
  std::vector<std::int64_t> mine;
  try {
    for (int i = 0; i < rounds; ++i) {
      const std::int64_t kind = below(8);
      if (below(4) == 0) kv.fence(1 + seed % 2);
      if (mine.size() < 2 || (kind == 0 && mine.size() < 3)) {
        if (const auto slot = kv.acquire(below(60))) mine.push_back(*slot);
        if (mine.empty()) continue;
      }
      const std::int64_t slot = mine[static_cast<std::size_t>(below(static_cast<std::int64_t>(mine.size())))];
      if (kind <= 2) {
        const std::int64_t tokens = 1 + below(60);
        if (kv.try_ensure(slot, tokens) || !kv.ensure(slot, tokens).refused()) {
          // Only beyond what may be shared: shared pages are read-only.
          if (!closing && kv.tokens(slot) == tokens && kind == 1) touch(kv, slot, tokens);
        }
      } else if (kind == 3) {
        auto ticket = kv.look_ahead({{slot, below(60)}, {mine.front(), below(60)}});
        if (below(4) == 0) expect(ticket->wait(30), "a ticket was not done");
      } else if (kind == 4) {
        kv.trim(slot, std::min(kv.tokens(slot), below(60)));
      } else if (kind == 5 && mine.size() > 1) {
        const std::int64_t other = mine.front() == slot ? mine.back() : mine.front();
        const std::int64_t full = kv.tokens(other) * kv.geometry().token_bytes / kv.geometry().page_bytes;
        if (kv.tokens(slot) == 0) (void)kv.share(other, slot, full);
        kv.release(slot);  // so that touch() never meets a read-only page
        mine.erase(std::find(mine.begin(), mine.end(), slot));
      } else if (kind == 6) {
        kv.release(slot);
        mine.erase(std::find(mine.begin(), mine.end(), slot));
      } else if (below(5) == 0) {
        kv.reclaim(below(3));
      }
    }
    for (const std::int64_t slot : mine) kv.release(slot);
  } catch (const std::runtime_error&) {
    expect(closing, "closed while nobody closes");
  }
}

void run(std::int64_t planes, const char* driver, bool closing, unsigned seed, int rounds) {
  vattn::Options options;
  options.driver = driver;
  if (fake.path != nullptr) options.library = fake.path;
  options.stock_groups = 2;
  options.pool_groups = 20;
  options.release_after_s = 0.001;
  options.floor_groups = 2;
  Allocator kv(shape(planes), options);
  std::atomic<bool> stop{false};
  std::thread watcher([&] {
    for (std::int64_t i = 0; !stop; ++i) {
      const std::string problem = kv.check();
      expect(problem.empty(), "check:", std::string(driver) + (closing ? ", closing: " : ": ") + problem);
      const vattn::Stats s = kv.stats();
      const std::int64_t mapped = s.in_use_groups + s.kept_groups + s.look_ahead_groups;
      expect(s.total_groups + s.over_limit_groups >= mapped, "more groups than exist");
      if (kv.faults() != nullptr) kv.faults()->fail_at(vattn::kAnyVerb, 1 + i % 7, 1 + i % 2);
      if (fake.path != nullptr) {
        fake.advance(1, i % 5);
        fake.advance(2, i % 7);
      }
      try {
        if (i % 50 == 0) kv.set_limit(15 + i / 50 % 6);
      } catch (const std::runtime_error&) {
        expect(closing, "closed while nobody closes");
      }
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  });
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < 3; ++i) workers.emplace_back(work, std::ref(kv), seed * 10 + i, rounds, closing);
  if (closing) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    kv.close();
  }
  for (std::thread& worker : workers) worker.join();
  stop = true;
  watcher.join();
  if (kv.faults() != nullptr) kv.faults()->fail_at(vattn::kAnyVerb, 0, 0);
  if (fake.path != nullptr) {
    fake.advance(1, -1);
    fake.advance(2, -1);
  }
  if (!closing) {
    kv.set_limit(options.pool_groups);
    kv.reclaim(0);
    const vattn::Stats s = kv.stats();
    expect(s.free_groups == s.total_groups, "groups are missing after reclaim");
    expect(s.mapped_bytes == 0 && s.shared_bytes == 0, "bytes are mapped after reclaim");
  }
  kv.close();
  const std::string problem = kv.check();
  expect(problem.empty() || kv.faults() != nullptr, "check after close:", problem);
  if (fake.path != nullptr) {
    const std::string wrong = fake.violations();
    expect(wrong.empty(), "done to the GPU:", std::string(driver) + (closing ? ", closing: " : ": ") + wrong);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 3000;
  if (argc > 2) open_fake(argv[2]);
  const auto all = [rounds](const char* plain, const char* failing) {
    for (unsigned seed = 1; seed <= 2; ++seed) {
      for (const std::int64_t planes : {2, 6}) {
        run(planes, plain, false, seed, rounds);
        run(planes, failing, false, seed, rounds);
        for (unsigned again = 0; again < 10; ++again) {
          run(planes, again % 2 ? failing : plain, true, seed + again, 100000);
        }
      }
    }
  };
  all("memfd", "fault");
  if (fake.path != nullptr) all("cuda", "fault_cuda");
  std::printf("stress: %d broken\n", broken.load());
  return broken == 0 ? 0 : 1;
}
