// Sizes of a slab in numbers only: planes, slots, groups, bytes of a token. Knows no addresses.
#pragma once

#include <cstdint>

namespace vattn {

// A plane is one region of addresses (mega: K and V; per_layer: K and V of every layer). A group is one page in every
// plane at the same index of one slot.
struct Geometry {
  std::int64_t planes = 0;
  std::int64_t slots = 0;
  std::int64_t groups_per_slot = 0;
  std::int64_t page_bytes = 0;
  std::int64_t token_bytes = 0;  // of one token in one plane
  std::int64_t max_tokens = 0;

  [[nodiscard]] std::int64_t slot_bytes() const noexcept { return groups_per_slot * page_bytes; }
  // ceil(tokens * b / S)
  [[nodiscard]] std::int64_t groups_for(std::int64_t tokens) const noexcept {
    return (tokens * token_bytes + page_bytes - 1) / page_bytes;
  }
  // Whole tokens in the first `groups` groups: floor(groups * S / b), at most max_tokens.
  [[nodiscard]] std::int64_t tokens_in(std::int64_t groups) const noexcept {
    const std::int64_t tokens = groups * page_bytes / token_bytes;
    return tokens < max_tokens ? tokens : max_tokens;
  }
};

}  // namespace vattn
