// Creating and destroying page groups; see page_pool.hpp.
#include "page_pool.hpp"

namespace vattn {

GroupPtr PagePool::claim_empty() {
  auto group = std::make_shared<Group>();
  // All memory a group will need is taken here, so that nothing later can throw half way.
  group->pages.reserve(static_cast<std::size_t>(geometry_.planes));
  group->holders.reserve(2);
  const std::size_t exist = static_cast<std::size_t>(live_ + 1) + stock_.size();
  stock_.reserve(exist);
  stranded_.reserve(exist);
  ++live_;
  return group;
}

GroupPtr PagePool::claim() { return stock_.empty() ? claim_empty() : unstock(); }

void PagePool::stock(GroupPtr group) noexcept {
  stock_.push_back(std::move(group));
  --live_;
}

GroupPtr PagePool::unstock() noexcept {
  GroupPtr group = std::move(stock_.back());
  stock_.pop_back();
  ++live_;
  return group;
}

Status PagePool::fill(Group& group, std::int64_t slot, std::int64_t index) noexcept {
  const auto bytes = static_cast<std::size_t>(geometry_.page_bytes);
  for (auto plane = static_cast<std::int64_t>(group.pages.size()); plane < geometry_.planes; ++plane) {
    const std::int64_t home = (plane * geometry_.slots + slot) * geometry_.groups_per_slot + index;
    Page page;
    const Status status = Page::create(driver_, bytes, static_cast<std::uint64_t>(home), page);
    if (!status.ok()) return status;
    group.pages.push_back(std::move(page));
  }
  return {};
}

bool PagePool::empty(Group& group) noexcept {
  bool emptied = true;
  for (auto page = group.pages.rbegin(); page != group.pages.rend(); ++page) emptied &= page->close().ok();
  return emptied;
}

void PagePool::settle(GroupPtr group, bool emptied) noexcept {
  if (emptied) {
    --live_;
  } else {
    stranded_.push_back(std::move(group));
  }
}

std::int64_t PagePool::retry_stranded() noexcept {
  const auto gone = std::remove_if(stranded_.begin(), stranded_.end(), [](const GroupPtr& g) { return empty(*g); });
  const std::int64_t freed = stranded_.end() - gone;
  stranded_.erase(gone, stranded_.end());
  live_ -= freed;
  return freed;
}

}  // namespace vattn
