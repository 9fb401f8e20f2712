// The list of drivers by name: the only place that knows which exist.
#include <cstring>
#include <stdexcept>

#include "cuda_driver.hpp"
#include "fault_driver.hpp"
#include "memfd_driver.hpp"

namespace vattn {

std::string Driver::explain(Status status) const {
  if (status.code == kInjected) return "failure injected";
  if (status.code == kOverBudget) return "mapping budget exhausted";
  return status.code > 0 ? std::strerror(status.code) : "code " + std::to_string(status.code);
}

std::shared_ptr<Driver> open_driver(const DriverSettings& settings) {
  const bool fails = settings.name.rfind("fault", 0) == 0;
  std::shared_ptr<Driver> driver;
  if (settings.name == "memfd" || settings.name == "fault") {
    driver = std::make_shared<MemfdDriver>(settings.page_bytes, settings.max_mappings);
  } else if (settings.name == "cuda" || settings.name == "fault_cuda") {
    driver = std::make_shared<CudaDriver>(settings.page_bytes, settings.device, settings.library);
  } else {
    throw std::invalid_argument("driver='" + settings.name + "' is unknown; known: memfd (Linux), cuda (NVIDIA), "
                                "fault and fault_cuda (the same with injected failures)");
  }
  if (fails) return std::make_shared<FaultDriver>(std::move(driver));
  return driver;
}

}  // namespace vattn
