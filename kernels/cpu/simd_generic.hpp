// Sixteen float lanes through GCC's vector extension: the same operations as simd_avx512.hpp on any CPU.
// Correct and batch-invariant everywhere; fast where the compiler has 256-bit registers.

typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));

inline V vset1(float x) { return V{} + x; }
inline V vzero() { return V{}; }
inline V vadd(V a, V b) { return a + b; }
inline V vsub(V a, V b) { return a - b; }
inline V vmul(V a, V b) { return a * b; }
inline V vdiv(V a, V b) { return a / b; }
inline V vmax(V a, V b) { return a > b ? a : b; }
inline V vmin(V a, V b) { return a < b ? a : b; }
#if defined(__FMA__)
inline V vfma(V a, V b, V c) {
  __m256 a0, a1, b0, b1, c0, c1;
  std::memcpy(&a0, &a, 32), std::memcpy(&a1, reinterpret_cast<const char*>(&a) + 32, 32);
  std::memcpy(&b0, &b, 32), std::memcpy(&b1, reinterpret_cast<const char*>(&b) + 32, 32);
  std::memcpy(&c0, &c, 32), std::memcpy(&c1, reinterpret_cast<const char*>(&c) + 32, 32);
  c0 = _mm256_fmadd_ps(a0, b0, c0), c1 = _mm256_fmadd_ps(a1, b1, c1);
  V out;
  std::memcpy(&out, &c0, 32), std::memcpy(reinterpret_cast<char*>(&out) + 32, &c1, 32);
  return out;
}
#else
inline V vfma(V a, V b, V c) { return a * b + c; }
#endif
inline V vfnma(V a, V b, V c) { return vfma(V{} - a, b, c); }
#include "exp2.ipp"
inline float vfirst(V a) { return a[0]; }
inline float vsum(V a) {
  float s[16];
  std::memcpy(s, &a, 64);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}
inline float vmaximum(V a) {
  float m = a[0];
  for (int i = 1; i < 16; ++i) m = a[i] > m ? a[i] : m;
  return m;
}
inline V vload(const float* p) {
  V a;
  std::memcpy(&a, p, 64);
  return a;
}
inline void vstore(float* p, V a) { std::memcpy(p, &a, 64); }
inline V vload_part(const float* p, int n) {
  V a{};
  std::memcpy(&a, p, static_cast<size_t>(n) * 4);
  return a;
}
inline void vstore_part(float* p, V a, int n) { std::memcpy(p, &a, static_cast<size_t>(n) * 4); }
inline V vgather_part(const float* p, const int16_t* at, int n) {  // p[at[0]], ..., n <= 16 of them
  V a{};
  for (int i = 0; i < n; ++i) a[i] = p[at[i]];
  return a;
}
inline V vkeep(V a, int lo, int hi, float fill) {
  const VI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return ((lane >= lo) & (lane < hi)) ? a : vset1(fill);
}
inline V vexp2(V x) {
  const VI normal = x >= vset1(-126.0f);
  x = vmin(vmax(x, vset1(-126.0f)), vset1(126.0f));
  const V magic = vset1(12582912.0f);  // 1.5 * 2**23: adding it leaves the rounded integer in the low bits
  const V shifted = x + magic;
  const V n = shifted - magic;
  V p = exp2_polynomial(x - n);
  VI bits, exponent;
  std::memcpy(&bits, &p, 64);
  std::memcpy(&exponent, &shifted, 64);
  bits += (exponent - 0x4B400000) << 23;
  std::memcpy(&p, &bits, 64);
  return normal ? p : V{};
}
inline V vswap_pairs(V a) {
  const VI swap = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
  return __builtin_shuffle(a, swap);
}
inline V vdouble8(const float* p, int n) {
  V a{};
  for (int i = 0; i < n; ++i) a[2 * i] = a[2 * i + 1] = p[i];
  return a;
}
inline V vnegate_even(V a) {
  for (int i = 0; i < 16; i += 2) a[i] = -a[i];
  return a;
}
using Column = V;
constexpr int kColumns = 8;
inline void transpose_columns(const char* rows, ptrdiff_t row_bytes, Column (&out)[kColumns]) {
  for (int i = 0; i < 16; ++i)
    for (int w = 0; w < kColumns; ++w)
      std::memcpy(reinterpret_cast<char*>(&out[w]) + i * 4, rows + i * row_bytes + w * 4, 4);
}
inline void column_store(uint32_t* p, Column a) { std::memcpy(p, &a, 64); }

struct F32 {
  using E = float;
  using W = V;
  static constexpr int kWord = 1;
  static V load(const E* p) { return vload(p); }
  static V load_part(const E* p, int n) { return vload_part(p, n); }
  static void store(E* p, V a) { vstore(p, a); }
  static void store_part(E* p, V a, int n) { vstore_part(p, a, n); }
  static V round(V a) { return a; }
  static W word_row(const char* p) { return vload(reinterpret_cast<const float*>(p)); }
  static W word_all(const char* p) { return vset1(*reinterpret_cast<const float*>(p)); }
  static W word_of(V a) { return a; }
  static V mac(V acc, W a, W b) { return vfma(a, b, acc); }
  static W pair_rows(const E* row0, const E*) { return vload(row0); }
  static void word_store(char* p, W a) { vstore(reinterpret_cast<float*>(p), a); }
};
