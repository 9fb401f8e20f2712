// fp32 kernels for CPUs without AVX-512: AVX2 with FMA on x86, otherwise whatever the compiler's baseline is.
#include <cmath>
#include <cstring>

#include "ops.hpp"

#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors never cross a call that is not inlined or ours
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace tessera {
namespace generic {
#include "simd_generic.hpp"
#include "kernels.ipp"
const Kernels* kernels() { return table<F32>("generic"); }
}  // namespace generic
}  // namespace tessera
#if defined(__x86_64__)
#pragma GCC pop_options
#endif

const tessera::Kernels* tessera::f32_generic() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
#endif
  return generic::kernels();
}
