// Sixteen float lanes in one AVX-512 register, and the two element types built on them.
// Included inside an ISA namespace after `#pragma GCC target`; see isa_avx512*.cpp.

using V = __m512;

inline V vzero() { return _mm512_setzero_ps(); }
inline V vset1(float x) { return _mm512_set1_ps(x); }
inline V vadd(V a, V b) { return _mm512_add_ps(a, b); }
inline V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
inline V vfnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
#include "exp2.ipp"
inline float vfirst(V a) { return _mm512_cvtss_f32(a); }
inline float vsum(V a) { return _mm512_reduce_add_ps(a); }
inline float vmaximum(V a) { return _mm512_reduce_max_ps(a); }
inline V vload(const float* p) { return _mm512_loadu_ps(p); }
inline void vstore(float* p, V a) { _mm512_storeu_ps(p, a); }
inline __mmask16 vmask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline V vload_part(const float* p, int n) { return _mm512_maskz_loadu_ps(vmask(n), p); }
inline void vstore_part(float* p, V a, int n) { _mm512_mask_storeu_ps(p, vmask(n), a); }

// p[at[0]], p[at[1]], ..., n <= 16 of them.
inline V vgather_part(const float* p, const int16_t* at, int n) {
  const __m512i index = _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(vmask(n), at));
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), vmask(n), index, p, 4);
}

// Lanes outside [lo, hi) become `fill`.
inline V vkeep(V a, int lo, int hi, float fill) {
  const unsigned high = hi >= 16 ? 0xffffu : hi <= 0 ? 0u : (1u << hi) - 1u;
  const unsigned low = lo >= 16 ? 0xffffu : lo <= 0 ? 0u : (1u << lo) - 1u;
  return _mm512_mask_blend_ps(static_cast<__mmask16>(high & ~low), vset1(fill), a);
}

// 2**x; relative error about 2e-7; exactly 0 below 2**-126 (so also for -inf), saturates at 2**126.
inline V vexp2(V x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, vset1(-126.0f), _CMP_GE_OQ);
  x = _mm512_min_ps(_mm512_max_ps(x, vset1(-126.0f)), vset1(126.0f));
  const V n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_maskz_scalef_ps(normal, exp2_polynomial(vsub(x, n)), n);
}

inline V vswap_pairs(V a) { return _mm512_permute_ps(a, 0xB1); }  // lanes 1 0 3 2 ...
inline V vdouble8(const float* p, int n) {                          // p0 p0 p1 p1 ..., n <= 8 values
  const __m512i spread = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_permutexvar_ps(spread, _mm512_maskz_loadu_ps(vmask(n), p));
}
inline V vnegate_even(V a) {
  const __m512i sign = _mm512_set1_epi64(0x80000000);
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), sign));
}

// Eight dwords of each of 16 rows, row r at rows + r * row_bytes: column i into out[i]. Pairs of rows are loaded into
// the halves of a register, which leaves three shuffles a column where whole-row loads would need four.
using Column = __m512i;
constexpr int kColumns = 8;
__attribute__((always_inline)) inline void transpose_columns(const char* rows, ptrdiff_t row_bytes,
                                                             Column (&out)[kColumns]) {
  __m512i r[8], t[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {  // rows j and j + 4, then 8 + j and 12 + j
    const char* low = rows + (j < 4 ? j : j + 4) * row_bytes;
    r[j] = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    r[j] = _mm512_inserti64x4(r[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + 4 * row_bytes)), 1);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 8; j += 2) {
    t[j] = _mm512_unpacklo_epi32(r[j], r[j + 1]);
    t[j + 1] = _mm512_unpackhi_epi32(r[j], r[j + 1]);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) {
    r[j] = _mm512_unpacklo_epi64(t[j], t[j + 2]);
    r[j + 1] = _mm512_unpackhi_epi64(t[j], t[j + 2]);
    r[j + 2] = _mm512_unpacklo_epi64(t[j + 1], t[j + 3]);
    r[j + 3] = _mm512_unpackhi_epi64(t[j + 1], t[j + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    out[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
  }
}
inline void column_store(uint32_t* p, Column a) { _mm512_storeu_si512(p, a); }
inline V as_lanes(Column a) { return _mm512_castsi512_ps(a); }

constexpr int kTileRows = 12;    // of a panel, whose sums fit into registers
constexpr int kTileVectors = 4;  // whose sums of six rows do

#include "f32.ipp"

#ifdef TESSERA_BF16
struct Bf16 {
  using E = uint16_t;
  using W = __m512bh;
  static constexpr int kWord = 2;
  static V widen(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
  static V load(const E* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V load_part(const E* p, int n) { return widen(_mm256_maskz_loadu_epi16(vmask(n), p)); }
  static __m256i narrow(V a) { return (__m256i)_mm512_cvtneps_pbh(a); }  // round to nearest even
  static void store(E* p, V a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
  static void store_part(E* p, V a, int n) { _mm256_mask_storeu_epi16(p, vmask(n), narrow(a)); }
  static V round(V a) { return widen(narrow(a)); }
  static W word_row(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static W word_all(const char* p) { return (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int*>(p)); }
  static W word_of(__m512i a) { return (__m512bh)a; }
  static V mac(V acc, W a, W b) { return _mm512_dpbf16_ps(acc, a, b); }
  static W pair_rows(const E* row0, const E* row1) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0)));
    if (row1 == nullptr) return (__m512bh)even;
    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1)));
    return (__m512bh)_mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
  }
  static void word_store(char* p, W a) { _mm512_storeu_si512(p, (__m512i)a); }
};
#endif
