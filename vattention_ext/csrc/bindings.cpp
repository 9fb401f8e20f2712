// The Python module vattention_ext._native: conversions and the GIL, nothing else.
//
// The GIL is let go around everything that may wait for the mapper or the kernel. The calls a step makes for slots
// that hold their pages already do not let it go: they wait for nobody, and giving the GIL away costs more than that.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>
#include <utility>

#include "allocator.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using vattn::Allocator;
using vattn::Pairs;
using vattn::Verb;

namespace {

constexpr std::int64_t kLimit = std::int64_t{1} << 40;  // of any count that comes from Python

// One plane of the slab; keeps its addresses reserved for as long as it, or a tensor made from it, lives.
struct Region {
  std::shared_ptr<vattn::Reservation> reservation;
  int device_type = vattn::kDeviceCpu;  // DLPack's
  int device = 0;
};

// A DLPack capsule; the protocol's keywords ask for nothing that would differ, except a copy.
nb::object dlpack(const Region& region, const nb::kwargs& kwargs) {
  if (kwargs.contains("copy") && nb::cast<nb::object>(kwargs["copy"]).is(nb::handle(Py_True))) {
    throw nb::buffer_error("a region is mostly unmapped and cannot be copied; copy what is mapped of it");
  }
  auto* keep = new std::shared_ptr<vattn::Reservation>(region.reservation);
  nb::capsule owner(keep, [](void* p) noexcept { delete static_cast<std::shared_ptr<vattn::Reservation>*>(p); });
  const nb::ndarray<std::uint8_t, nb::ndim<1>> array(
      reinterpret_cast<void*>(region.reservation->address()), {region.reservation->bytes()}, owner, {},
      nb::dtype<std::uint8_t>(), region.device_type, region.device);
  return nb::cast(array, nb::rv_policy::reference);
}

std::int64_t to_count(nb::handle value) {
  const long long number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
  return number;
}

// By hand: a step asks for a thousand pairs, and generic conversion costs more than the work.
Pairs to_pairs(nb::handle wanted) {
  Pairs pairs;
  nb::object fast = nb::steal(PySequence_Fast(wanted.ptr(), "expected a list of (slot, tokens)"));
  if (!fast.is_valid()) throw nb::python_error();
  const Py_ssize_t count = PySequence_Size(fast.ptr());
  pairs.reserve(static_cast<std::size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PyList_Check(fast.ptr()) ? PyList_GetItem(fast.ptr(), i) : PyTuple_GetItem(fast.ptr(), i);
    if (item == nullptr) throw nb::python_error();
    const bool is_pair = PyTuple_Check(item) && PyTuple_Size(item) == 2;
    if (!is_pair) throw nb::type_error("each item must be a tuple (slot, tokens)");
    pairs.emplace_back(to_count(PyTuple_GetItem(item, 0)), to_count(PyTuple_GetItem(item, 1)));
  }
  return pairs;
}

nb::object value_class(const char* name) { return nb::module_::import_("vattention_ext.values").attr(name); }

nb::object to_python(const vattn::Refusal& refusal) {
  if (!refusal.refused()) return nb::none();
  return value_class("OutOfPages")("requested_groups"_a = refusal.requested_groups,
                                   "free_groups"_a = refusal.free_groups, "total_groups"_a = refusal.total_groups,
                                   "reason"_a = vattn::reason_name(refusal.reason));
}

nb::object acquire(Allocator& self, std::int64_t tokens) {
  std::optional<std::int64_t> slot;
  {
    const nb::gil_scoped_release release;
    slot = self.acquire(tokens);
  }
  if (slot) return nb::cast(*slot);
  return value_class("OutOfSlots")("total_slots"_a = self.geometry().slots);
}

nb::object ensure(Allocator& self, std::int64_t slot, std::int64_t tokens) {
  if (self.try_ensure(slot, tokens)) return nb::none();
  vattn::Refusal refusal;
  {
    const nb::gil_scoped_release release;
    refusal = self.ensure(slot, tokens);
  }
  return to_python(refusal);
}

nb::list ensure_many(Allocator& self, nb::handle wanted) {
  const Pairs pairs = to_pairs(wanted);
  nb::list out;
  if (self.try_ensure_many(pairs)) return out;
  std::vector<std::int64_t> refused;
  {
    const nb::gil_scoped_release release;
    self.ensure_many(pairs, refused);
  }
  for (const std::int64_t index : refused) out.append(index);
  return out;
}

std::shared_ptr<vattn::Ticket> look_ahead(Allocator& self, nb::handle wanted) {
  const Pairs pairs = to_pairs(wanted);
  const nb::gil_scoped_release release;
  return self.look_ahead(pairs);
}

nb::object share(Allocator& self, std::int64_t source, std::int64_t target, std::int64_t groups) {
  vattn::Refusal refusal;
  {
    const nb::gil_scoped_release release;
    refusal = self.share(source, target, groups);
  }
  return to_python(refusal);
}

nb::dict stats(Allocator& self) {
  vattn::Stats s{};
  {
    const nb::gil_scoped_release release;
    s = self.stats();
  }
  nb::dict out;
  const std::pair<const char*, std::int64_t> counts[] = {
      {"total_groups", s.total_groups},
      {"free_groups", s.free_groups},
      {"in_use_groups", s.in_use_groups},
      {"look_ahead_groups", s.look_ahead_groups},
      {"kept_groups", s.kept_groups},
      {"quarantined_groups", s.quarantined_groups},
      {"moving_groups", s.moving_groups},
      {"stocked_groups", s.stocked_groups},
      {"over_limit_groups", s.over_limit_groups},
      {"leaving_positions", s.leaving_positions},
      {"quarantined_positions", s.quarantined_positions},
      {"shared_groups", s.shared_groups},
      {"read_only_groups", s.read_only_groups},
      {"active_slots", s.active_slots},
      {"mapped_bytes", s.mapped_bytes},
      {"shared_bytes", s.shared_bytes},
      {"physical_bytes", s.physical_bytes},
      {"refusals", s.refusals},
      {"stolen_groups", s.stolen_groups},
      {"reclaimed_groups", s.reclaimed_groups},
      {"failed_unmaps", s.failed_unmaps},
      {"look_ahead_mapped", s.look_ahead_mapped},
      {"look_ahead_given_up", s.look_ahead_given_up},
      {"queued_jobs", s.queued_jobs},
      {"mappings", s.facts.mappings},
      {"mapping_budget", s.facts.mapping_budget},
      {"steps", s.steps},
      {"pending_fences", s.pending_fences},
      {"descriptor", s.facts.descriptor},
      {"inode", s.facts.inode},
  };
  for (const auto& [key, value] : counts) out[key] = value;
  out["map_wait_us"] = static_cast<double>(s.map_wait_ns) / 1e3;
  out["grow_us"] = static_cast<double>(s.grow_ns) / 1e3;
  out["fence_wait_us"] = static_cast<double>(s.fence_wait_ns) / 1e3;
  out["last_error"] = s.last_error;
  nb::dict calls, failures, times;
  for (int i = 0; i < vattn::kVerbs; ++i) {
    const char* verb = vattn::verb_name(static_cast<Verb>(i));
    calls[verb] = s.verbs[i].calls;
    failures[verb] = s.verbs[i].failures;
    times[verb] = static_cast<double>(s.verbs[i].time_ns) / 1e3;
  }
  out["driver_calls"] = calls;
  out["driver_failures"] = failures;
  out["driver_time_us"] = times;
  return out;
}

nb::list stalls_us(Allocator& self) {
  std::vector<std::int64_t> stalls;
  {
    const nb::gil_scoped_release release;
    stalls = self.stalls();
  }
  nb::list out;
  for (const std::int64_t stall_ns : stalls) out.append(static_cast<double>(stall_ns) / 1e3);
  return out;
}

int verb_number(const std::string& verb) {
  if (verb == "any") return vattn::kAnyVerb;
  for (int i = 0; i < vattn::kVerbs; ++i) {
    if (verb == vattn::verb_name(static_cast<Verb>(i))) return i;
  }
  throw std::invalid_argument("verb='" + verb +
                              "' is unknown; known: any, reserve, unreserve, create, destroy, map, allow, unmap");
}

vattn::FaultDriver& faults(Allocator& self) {
  if (self.faults() == nullptr) throw std::invalid_argument("failures are injected by driver='fault' only");
  return *self.faults();
}

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

void build(Allocator* self, std::int64_t planes, std::int64_t slots, std::int64_t groups_per_slot,
           std::int64_t page_bytes, std::int64_t token_bytes, std::int64_t max_tokens, const std::string& driver,
           int device, const std::string& libcuda, std::int64_t pool_groups, double release_after_s,
           std::int64_t floor_groups, std::int64_t stock_groups, std::int64_t max_mappings,
           const std::string& fail_verb, std::int64_t fail_nth, std::int64_t fail_times) {
  const vattn::Geometry geometry{planes, slots, groups_per_slot, page_bytes, token_bytes, max_tokens};
  for (const std::int64_t value : {planes, slots, groups_per_slot, page_bytes, token_bytes, max_tokens, pool_groups}) {
    require(value >= 1 && value <= kLimit, "sizes must be in 1..2^40, got " + std::to_string(value));
  }
  const double bytes = static_cast<double>(planes) * static_cast<double>(slots) *
                       static_cast<double>(groups_per_slot) * static_cast<double>(page_bytes);
  require(bytes < 0x1p61, "the slab has 2^61 bytes or more; lower slots or max_tokens");
  require(static_cast<double>(max_tokens) * static_cast<double>(token_bytes) < 0x1p61, "a slot has 2^61 bytes or more");
  require(token_bytes <= page_bytes, "token_bytes must be at most page_bytes");
  require(geometry.groups_for(max_tokens) <= groups_per_slot, "max_tokens do not fit groups_per_slot");
  for (const std::int64_t value : {floor_groups, stock_groups, max_mappings, fail_nth}) {
    require(value >= 0 && value <= kLimit, "counts must be in 0..2^40, got " + std::to_string(value));
  }
  require(!std::isnan(release_after_s) && release_after_s >= 0, "release_after_s must be >= 0");
  vattn::Options options;
  options.driver = driver;
  options.device = device;
  options.library = libcuda;
  options.stock_groups = stock_groups;
  options.pool_groups = pool_groups;
  options.release_after_s = release_after_s;
  options.floor_groups = floor_groups;
  options.max_mappings = max_mappings;
  options.fail_verb = verb_number(fail_verb);
  options.fail_nth = fail_nth;
  options.fail_times = fail_times;
  const nb::gil_scoped_release release;
  new (self) Allocator(geometry, options);
}

void bind_allocator(nb::module_& m) {
  using Freed = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Allocator>(m, "Allocator")
      .def("__init__", &build, nb::kw_only(), "planes"_a, "slots"_a, "groups_per_slot"_a, "page_bytes"_a,
           "token_bytes"_a, "max_tokens"_a, "driver"_a, "device"_a, "libcuda"_a, "pool_groups"_a, "release_after_s"_a,
           "floor_groups"_a, "stock_groups"_a, "max_mappings"_a, "fail_verb"_a, "fail_nth"_a, "fail_times"_a)
      .def("acquire", &acquire, "tokens"_a)
      .def("ensure", &ensure, "slot"_a, "tokens"_a)
      .def("ensure_many", &ensure_many, "wanted"_a)
      .def("look_ahead", &look_ahead, "wanted"_a)
      .def("set_tokens", &Allocator::set_tokens, "slot"_a, "tokens"_a, Freed())
      .def("trim", &Allocator::trim, "slot"_a, "tokens"_a, Freed())
      .def("release", &Allocator::release, "slot"_a, Freed())
      .def("fence", &Allocator::fence, "stream"_a = 0)
      .def("stalls_us", &stalls_us)
      .def("set_limit",
           [](Allocator& self, std::int64_t groups) {
             require(groups >= 1 && groups <= kLimit, "groups=" + std::to_string(groups) + " is not in 1..2^40");
             self.set_limit(groups);
           },
           "groups"_a, Freed())
      .def("device_memory",
           [](Allocator& self) {
             vattn::Memory memory;
             {
               const nb::gil_scoped_release release;
               memory = self.device_memory();
             }
             return nb::make_tuple(memory.free_bytes, memory.total_bytes);
           })
      .def("share", &share, "src_slot"_a, "dst_slot"_a, "groups"_a)
      .def("reclaim",
           [](Allocator& self, std::optional<std::int64_t> keep) {
             require(!keep || *keep >= 0, "keep_groups must be >= 0");
             const nb::gil_scoped_release release;
             return self.reclaim(keep.value_or(-1));
           },
           "keep_groups"_a = nb::none())
      .def("mapped_tokens", &Allocator::mapped_tokens, "slot"_a, Freed())
      .def("tokens", &Allocator::tokens, "slot"_a, Freed())
      .def("_stats", &stats)
      .def("_check", &Allocator::check, Freed())
      .def("close", &Allocator::close, Freed())
      .def_prop_ro("closed", &Allocator::closed)
      .def_prop_ro("regions",
                   [](Allocator& self) {
                     const nb::gil_scoped_release release;
                     const vattn::DriverFacts facts = self.facts();
                     std::vector<Region> regions;
                     for (auto& reservation : self.regions()) {
                       regions.push_back({std::move(reservation), facts.device_type, facts.device});
                     }
                     return regions;
                   })
      .def("fail_at",
           [](Allocator& self, const std::string& verb, std::int64_t nth, std::int64_t times) {
             require(nth >= 0, "nth must be >= 0 (0 clears)");
             faults(self).fail_at(verb_number(verb), nth, times);
           },
           "verb"_a, "nth"_a, "times"_a = 1)
      .def_prop_ro("faults_fired", [](Allocator& self) { return faults(self).fired(); });
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The allocator in C++; use vattention_ext.KvAllocator.";
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const vattn::DriverFailure& failure) {
      PyErr_SetString(value_class("DriverError").ptr(), failure.what());
    }
  });
  nb::class_<Region>(m, "Region")
      .def_prop_ro("address", [](const Region& r) { return r.reservation->address(); })
      .def_prop_ro("nbytes", [](const Region& r) { return r.reservation->bytes(); })
      .def("__dlpack__", &dlpack)
      .def("__dlpack_device__", [](const Region& r) { return nb::make_tuple(r.device_type, r.device); });
  nb::class_<vattn::Ticket>(m, "Ticket")
      .def_prop_ro("done", &vattn::Ticket::done)
      .def("wait",
           [](const vattn::Ticket& ticket, std::optional<double> timeout_s) {
             require(!timeout_s || *timeout_s >= 0, "timeout_s must be >= 0");
             const nb::gil_scoped_release release;
             return ticket.wait(timeout_s.value_or(-1));
           },
           "timeout_s"_a = nb::none());
  bind_allocator(m);
}
