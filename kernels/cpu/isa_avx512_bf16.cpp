// bf16 kernels for CPUs with AVX512-BF16 (Zen 4 and later, Cooper Lake, Sapphire Rapids and later).
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
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#define TESSERA_BF16 1
namespace tessera {
namespace avx512_bf16 {
#include "simd_avx512.hpp"
#include "kernels.ipp"
const Kernels* kernels() { return table<Bf16>("avx512_bf16"); }
}  // namespace avx512_bf16
}  // namespace tessera
#pragma GCC pop_options

const tessera::Kernels* tessera::bf16_avx512() {
  const bool native = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bf16");
  return native ? avx512_bf16::kernels() : nullptr;
}
#else
const tessera::Kernels* tessera::bf16_avx512() { return nullptr; }
#endif
