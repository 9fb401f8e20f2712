// Counting and refusing; see fault_driver.hpp.
#include "fault_driver.hpp"

namespace vattn {

void FaultDriver::fail_at(int verb, std::int64_t nth, std::int64_t times) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  verb_ = verb;
  nth_ = nth;
  times_ = times;
  seen_ = 0;
  fired_ = 0;
}

std::int64_t FaultDriver::fired() const noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  return fired_;
}

bool FaultDriver::strike(Verb verb) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (nth_ == 0 || (verb_ != kAnyVerb && verb_ != static_cast<int>(verb))) return false;
  ++seen_;
  if (seen_ < nth_ || (times_ >= 0 && seen_ >= nth_ + times_)) return false;
  ++fired_;
  return true;
}

Status FaultDriver::reserve(std::size_t bytes, Address& out) noexcept {
  return strike(Verb::reserve) ? Status{kInjected} : inner_->reserve(bytes, out);
}

Status FaultDriver::unreserve(Address address, std::size_t bytes) noexcept {
  return strike(Verb::unreserve) ? Status{kInjected} : inner_->unreserve(address, bytes);
}

Status FaultDriver::create(std::size_t bytes, std::uint64_t home, Handle& out) noexcept {
  return strike(Verb::create) ? Status{kInjected} : inner_->create(bytes, home, out);
}

Status FaultDriver::destroy(Handle page, std::size_t bytes) noexcept {
  return strike(Verb::destroy) ? Status{kInjected} : inner_->destroy(page, bytes);
}

Status FaultDriver::map(Address address, std::size_t bytes, Handle page) noexcept {
  return strike(Verb::map) ? Status{kInjected} : inner_->map(address, bytes, page);
}

Status FaultDriver::allow(Address address, std::size_t bytes, Access access) noexcept {
  return strike(Verb::allow) ? Status{kInjected} : inner_->allow(address, bytes, access);
}

Status FaultDriver::unmap(Address address, std::size_t bytes) noexcept {
  return strike(Verb::unmap) ? Status{kInjected} : inner_->unmap(address, bytes);
}

}  // namespace vattn
