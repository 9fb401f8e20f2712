// The list of drivers by name: the only place that knows which exist.
#include <stdexcept>

#include "fault_driver.hpp"
#include "memfd_driver.hpp"

namespace vattn {

std::shared_ptr<Driver> open_driver(const std::string& name, std::size_t page_bytes, std::int64_t max_mappings) {
  if (name == "memfd") return std::make_shared<MemfdDriver>(page_bytes, max_mappings);
  if (name == "fault") return std::make_shared<FaultDriver>(std::make_shared<MemfdDriver>(page_bytes, max_mappings));
  throw std::invalid_argument("driver='" + name + "' is unknown; known: memfd, fault (memfd with injected failures)");
}

}  // namespace vattn
