// fp32 kernels for CPUs with AVX-512.
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "ops.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
// GCC 12 takes the undefined pass-through operand inside its own intrinsics for a bug of ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace tessera {
namespace avx512 {
#include "simd_avx512.hpp"
#include "kernels.ipp"
const Kernels* kernels() { return table<F32>("avx512"); }
}  // namespace avx512
}  // namespace tessera
#pragma GCC pop_options

const tessera::Kernels* tessera::f32_avx512() {
  const bool native = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return native ? avx512::kernels() : nullptr;
}
#else
const tessera::Kernels* tessera::f32_avx512() { return nullptr; }
#endif
