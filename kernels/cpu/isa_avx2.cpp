// Kernels for CPUs with AVX2 and FMA, but without AVX-512 (fp32) or without its BF16 (bf16).
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "ops.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wpsabi"  // the 64-byte integers of draws.ipp never cross a call to another file
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace tessera {
namespace avx2 {
#include "simd_avx2.hpp"
#include "kernels.ipp"
const Kernels* f32() { return table<F32>("avx2"); }
const Kernels* bf16() { return table<Bf16>("avx2"); }
bool here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace avx2
}  // namespace tessera
#pragma GCC pop_options

const tessera::Kernels* tessera::f32_avx2() { return avx2::here() ? avx2::f32() : nullptr; }
const tessera::Kernels* tessera::bf16_avx2() { return avx2::here() ? avx2::bf16() : nullptr; }
#else
const tessera::Kernels* tessera::f32_avx2() { return nullptr; }
const tessera::Kernels* tessera::bf16_avx2() { return nullptr; }
#endif
