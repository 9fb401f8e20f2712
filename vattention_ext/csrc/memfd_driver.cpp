// The Linux driver's verbs; see memfd_driver.hpp for what it promises.
#include "memfd_driver.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace vattn {
namespace {

constexpr std::size_t kHugeBytes = std::size_t{2} << 20;
constexpr std::uint64_t kSpareOffset = std::uint64_t{1} << 62;  // file bytes below are homes, above is for the rest
constexpr std::int64_t kDefaultMaxMaps = 65530;  // Linux' default where /proc cannot be read
constexpr std::size_t kWarmBytes = std::size_t{256} << 10;  // at once: the kernel's mapping lock is held meanwhile
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older headers lack the name, older kernels answer EINVAL
#endif
constexpr int kInterrupts = 1000;                // retries of a call that signals interrupt

std::int64_t read_max_map_count() {
  std::int64_t value = kDefaultMaxMaps;
  if (std::FILE* file = std::fopen("/proc/sys/vm/max_map_count", "re")) {
    long long read = 0;
    if (std::fscanf(file, "%lld", &read) == 1 && read > 0) value = read;
    std::fclose(file);
  }
  return value;
}

std::int64_t count_own_maps() {
  std::int64_t lines = 0;
  if (std::FILE* file = std::fopen("/proc/self/maps", "re")) {
    for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) lines += c == '\n';
    std::fclose(file);
  }
  return lines;
}

// What is left once the process' present mappings and an eighth of the limit are set aside: libraries load later,
// and malloc maps, too.
std::int64_t default_budget() {
  const std::int64_t limit = read_max_map_count();
  return std::max<std::int64_t>(0, limit - count_own_maps() - std::max<std::int64_t>(limit / 8, 1024));
}

void* at(Address address) noexcept { return reinterpret_cast<void*>(address); }

template <typename Call>
Status retry(Call call) noexcept {
  for (int i = 0; i < kInterrupts; ++i) {
    if (call() == 0) return {};
    if (errno != EINTR) break;
  }
  return {errno};
}

}  // namespace

MemfdDriver::MemfdDriver(std::size_t page_bytes, std::int64_t max_mappings)
    : granularity_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))), page_bytes_(page_bytes) {
  if (page_bytes == 0 || page_bytes % granularity_ != 0) {
    throw std::invalid_argument("page_bytes=" + std::to_string(page_bytes) + " is not a positive multiple of " +
                                std::to_string(granularity_) + " (granularity of the memfd driver); use 2097152");
  }
  first_spare_ = next_spare_ = kSpareOffset / page_bytes;
  budget_ = default_budget();
  if (max_mappings > 0) budget_ = std::min(budget_, max_mappings);
  fd_ = memfd_create("tessera-kv", MFD_CLOEXEC);
  if (fd_ < 0) throw std::runtime_error(std::string("memfd_create failed: ") + std::strerror(errno));
  struct stat info {};
  if (fstat(fd_, &info) == 0) inode_ = static_cast<std::int64_t>(info.st_ino);
}

MemfdDriver::~MemfdDriver() { finish(); }

DriverFacts MemfdDriver::facts() const noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {fd_, inode_, mappings_, budget_};
}

Status MemfdDriver::reserve(std::size_t bytes, Address& out) noexcept try {
  // Aligned to a huge page where pages are that large, so that the kernel may use one.
  const std::size_t align = page_bytes_ % kHugeBytes == 0 ? kHugeBytes : granularity_;
  const std::size_t padded = bytes + align - granularity_;
  void* raw = mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return {errno};
  const Address start = reinterpret_cast<Address>(raw);
  const Address aligned = (start + align - 1) / align * align;
  if (aligned > start) munmap(raw, aligned - start);
  const std::size_t tail = (start + padded) - (aligned + bytes);
  if (tail > 0) munmap(at(aligned + bytes), tail);
  out = aligned;
  const std::lock_guard<std::mutex> lock(mutex_);
  borders_.insert(aligned);
  borders_.insert(aligned + bytes);
  ++mappings_;
  return {};
} catch (const std::bad_alloc&) {
  return {ENOMEM};
}

Status MemfdDriver::unreserve(Address address, std::size_t bytes) noexcept {
  if (munmap(at(address), bytes) != 0) return {errno};
  const std::lock_guard<std::mutex> lock(mutex_);
  // A mapping whose unmap had failed ends here, too; forgetting it restores the count.
  for (auto it = mapped_.begin(); it != mapped_.end();) {
    const Address found = it->first;
    ++it;
    if (found >= address && found < address + bytes) put(found, nullptr);
  }
  borders_.erase(borders_.find(address));
  borders_.erase(borders_.find(address + bytes));
  --mappings_;
  return {};
}

void MemfdDriver::warm(Address address, std::size_t bytes) noexcept {
  for (std::size_t done = 0; done < bytes; done += kWarmBytes) {
    if (madvise(at(address + done), std::min(kWarmBytes, bytes - done), MADV_POPULATE_WRITE) != 0) return;
  }
}

void MemfdDriver::finish() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

Handle MemfdDriver::take_offset(std::uint64_t home) {
  if (home < first_spare_ && used_.insert(home).second) return home;
  Handle page = next_spare_;
  if (spare_.empty()) {
    used_.insert(page);
    ++next_spare_;
  } else {
    page = *spare_.begin();  // the lowest: keeps spare pages together
    used_.insert(page);
    spare_.erase(spare_.begin());
  }
  return page;
}

void MemfdDriver::drop_offset(Handle page) {
  if (page >= first_spare_) spare_.insert(page);
  used_.erase(page);
}

Status MemfdDriver::create(std::size_t bytes, std::uint64_t home, Handle& out) noexcept try {
  Handle page = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    page = take_offset(home);
  }
  const off_t offset = static_cast<off_t>(page * page_bytes_);
  const off_t length = static_cast<off_t>(bytes);
  Status status = retry([&] { return fallocate(fd_, 0, offset, length); });
  if (status.ok()) {
    out = page;
    return {};
  }
  // A part may have been committed before the refusal.
  (void)retry([&] { return fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length); });
  const std::lock_guard<std::mutex> lock(mutex_);
  drop_offset(page);
  return status;
} catch (const std::bad_alloc&) {
  return {ENOMEM};
}

Status MemfdDriver::destroy(Handle page, std::size_t bytes) noexcept try {
  const off_t offset = static_cast<off_t>(page * page_bytes_);
  const off_t length = static_cast<off_t>(bytes);
  Status status = retry([&] { return fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length); });
  if (!status.ok()) return status;
  const std::lock_guard<std::mutex> lock(mutex_);
  drop_offset(page);
  return {};
} catch (const std::bad_alloc&) {
  return {ENOMEM};
}

int MemfdDriver::edge(Address left) const {
  if (borders_.count(left + page_bytes_) != 0) return 0;
  const auto a = mapped_.find(left);
  const auto b = mapped_.find(left + page_bytes_);
  if (a == mapped_.end() || b == mapped_.end()) return (a == mapped_.end()) != (b == mapped_.end());
  return b->second.page != a->second.page + 1 || a->second.access != b->second.access;
}

// Records one page's state and counts how the edges on both sides change.
void MemfdDriver::put(Address address, const Mapped* mapped) {
  mappings_ -= edge(address - page_bytes_) + edge(address);
  if (mapped != nullptr) {
    mapped_[address] = *mapped;
  } else {
    mapped_.erase(address);
  }
  mappings_ += edge(address - page_bytes_) + edge(address);
}

Status MemfdDriver::map(Address address, std::size_t bytes, Handle page) noexcept try {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (mappings_ + 2 > budget_) return {kOverBudget};  // splitting a range makes two more
    const Mapped record{page, Access::none};
    put(address, &record);
  }
  void* got = mmap(at(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, fd_, static_cast<off_t>(page * page_bytes_));
  if (got != MAP_FAILED) return {};
  const Status status{errno};
  const std::lock_guard<std::mutex> lock(mutex_);
  put(address, nullptr);
  return status;
} catch (const std::bad_alloc&) {
  return {ENOMEM};
}

Status MemfdDriver::allow(Address address, std::size_t bytes, Access access) noexcept try {
  const int protection = access == Access::none ? PROT_NONE
                         : access == Access::read ? PROT_READ : PROT_READ | PROT_WRITE;
  if (mprotect(at(address), bytes, protection) != 0) return {errno};
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Address page = address; page < address + bytes; page += page_bytes_) {
    const auto found = mapped_.find(page);
    if (found == mapped_.end()) continue;
    const Mapped record{found->second.page, access};
    put(page, &record);
  }
  return {};
} catch (const std::bad_alloc&) {
  return {ENOMEM};
}

Status MemfdDriver::unmap(Address address, std::size_t bytes) noexcept {
  // PROT_NONE over it, in one call: the addresses never stop being ours.
  void* got = mmap(at(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (got == MAP_FAILED) return {errno};
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Address page = address; page < address + bytes; page += page_bytes_) put(page, nullptr);
  return {};
}

}  // namespace vattn
