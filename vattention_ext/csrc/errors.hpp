// What can go wrong, as values: a driver verb's Status and the allocator's Refusal.
// Knows nothing of drivers or slots. Nothing in this extension aborts or exits; misuse by the caller is a
// std::invalid_argument, everything else that can fail is one of these two, or a DriverFailure where nothing can go on.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace vattn {

// The verbs of a driver, in the order in which a page lives.
enum class Verb : std::uint8_t { reserve, unreserve, create, destroy, map, allow, unmap };
inline constexpr int kVerbs = 7;

inline const char* verb_name(Verb verb) noexcept {
  constexpr const char* names[kVerbs] = {"reserve", "unreserve", "create", "destroy", "map", "allow", "unmap"};
  return names[static_cast<int>(verb)];
}

// Codes beside errno: a full mapping budget is told apart because giving kept pages back cures it.
inline constexpr int kOverBudget = -1;
inline constexpr int kInjected = -2;
inline constexpr int kDeviceErrors = -1000;  // and below: -1000 - the device's own number

// Result of one driver verb: code 0 is success, > 0 an errno (ENOMEM: no memory), < 0 one of the codes above.
struct [[nodiscard]] Status {
  int code = 0;
  [[nodiscard]] bool ok() const noexcept { return code == 0; }
};

// The driver itself does not work: it cannot be opened, or cannot say any more what the device does.
class DriverFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// memory: the books allow it, but the system has no page left.
enum class Reason : std::uint8_t { none, pages, mappings, driver, memory };

inline const char* reason_name(Reason reason) noexcept {
  constexpr const char* names[] = {"none", "pages", "mappings", "driver", "memory"};
  return names[static_cast<int>(reason)];
}

// Why a growth was not done; nothing of it remains. Groups are page groups (all planes of one index).
struct [[nodiscard]] Refusal {
  Reason reason = Reason::none;
  std::int64_t requested_groups = 0;
  std::int64_t free_groups = 0;  // obtainable now: never created, kept, or look-ahead of others
  std::int64_t total_groups = 0;
  [[nodiscard]] bool refused() const noexcept { return reason != Reason::none; }
};

}  // namespace vattn
