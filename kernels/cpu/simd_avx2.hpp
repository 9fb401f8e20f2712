// Sixteen float lanes in two AVX2 registers, and the two element types built on them, as in simd_avx512.hpp.
// Included inside an ISA namespace after `#pragma GCC target`; see isa_avx2.cpp.

struct V {
  __m256 lo, hi;
};

inline V vset1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V vzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V vadd(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V vsub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V vmul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V vdiv(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline V vmax(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline V vmin(V a, V b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline V vfma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline V vfnma(V a, V b, V c) { return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)}; }
#include "exp2.ipp"
inline float vfirst(V a) { return _mm256_cvtss_f32(a.lo); }
inline float vsum(V a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float vmaximum(V a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline V vload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void vstore(float* p, V a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }

struct VI {
  __m256i lo, hi;
};

// Lanes below n have every bit, n <= 16.
inline VI vmask(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane)};
}
inline V vload_part(const float* p, int n) {  // what lies past n is not read
  const VI mask = vmask(n);
  return {_mm256_maskload_ps(p, mask.lo), _mm256_maskload_ps(p + 8, mask.hi)};
}
inline void vstore_part(float* p, V a, int n) {
  const VI mask = vmask(n);
  _mm256_maskstore_ps(p, mask.lo, a.lo), _mm256_maskstore_ps(p + 8, mask.hi, a.hi);
}
inline V vgather_part(const float* p, const int16_t* at, int n) {  // p[at[0]], ..., n <= 16 of them
  float found[16] = {};
  for (int i = 0; i < n; ++i) found[i] = p[at[i]];
  return vload(found);
}

// Lanes outside [lo, hi) become `fill`.
inline V vkeep(V a, int lo, int hi, float fill) {
  const VI below = vmask(lo), in = vmask(hi);
  const V other = vset1(fill);
  return {_mm256_blendv_ps(other.lo, a.lo, _mm256_castsi256_ps(_mm256_andnot_si256(below.lo, in.lo))),
          _mm256_blendv_ps(other.hi, a.hi, _mm256_castsi256_ps(_mm256_andnot_si256(below.hi, in.hi)))};
}

// 2**x; relative error about 2e-7; exactly 0 below 2**-126 (so also for -inf), saturates at 2**126.
inline __m256 scaled(__m256 p, __m256 n, __m256 x) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 value = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  return _mm256_and_ps(value, _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_GE_OQ));
}
inline V vexp2(V x) {
  const V near = vmin(vmax(x, vset1(-126.0f)), vset1(126.0f));
  const V n = {_mm256_round_ps(near.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
               _mm256_round_ps(near.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const V p = exp2_polynomial(vsub(near, n));
  return {scaled(p.lo, n.lo, x.lo), scaled(p.hi, n.hi, x.hi)};
}

inline V vswap_pairs(V a) { return {_mm256_permute_ps(a.lo, 0xB1), _mm256_permute_ps(a.hi, 0xB1)}; }  // lanes 1 0 3 2
inline V vdouble8(const float* p, int n) {  // p0 p0 p1 p1 ..., n <= 8 values
  const __m256 values = _mm256_maskload_ps(p, vmask(n).lo);
  return {_mm256_permutevar8x32_ps(values, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
          _mm256_permutevar8x32_ps(values, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
}
inline V vnegate_even(V a) {
  const __m256 sign = _mm256_castsi256_ps(_mm256_set1_epi64x(0x80000000));
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}

// Eight dwords of each of 16 rows, row r at rows + r * row_bytes: column i into out[i].
using Column = V;
constexpr int kColumns = 8;
__attribute__((always_inline)) inline void transpose8(const char* rows, ptrdiff_t row_bytes, __m256 (&out)[8]) {
  __m256 r[8], t[8];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // rows j and j + 4 in the halves of a register, low dwords and high ones
    const char* low = rows + j * row_bytes;
    for (int half = 0; half < 2; ++half) {
      const __m256 a = _mm256_castps128_ps256(_mm_loadu_ps(reinterpret_cast<const float*>(low + 16 * half)));
      r[j + 4 * half] =
          _mm256_insertf128_ps(a, _mm_loadu_ps(reinterpret_cast<const float*>(low + 4 * row_bytes + 16 * half)), 1);
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) {
    t[j] = _mm256_unpacklo_ps(r[j], r[j + 1]);
    t[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
    t[j + 2] = _mm256_unpacklo_ps(r[j + 2], r[j + 3]);
    t[j + 3] = _mm256_unpackhi_ps(r[j + 2], r[j + 3]);
    out[j] = _mm256_shuffle_ps(t[j], t[j + 2], 0x44);
    out[j + 1] = _mm256_shuffle_ps(t[j], t[j + 2], 0xEE);
    out[j + 2] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0x44);
    out[j + 3] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0xEE);
  }
}
__attribute__((always_inline)) inline void transpose_columns(const char* rows, ptrdiff_t row_bytes,
                                                             Column (&out)[kColumns]) {
  __m256 lo[8], hi[8];
  transpose8(rows, row_bytes, lo);
  transpose8(rows + 8 * row_bytes, row_bytes, hi);
#pragma GCC unroll 8
  for (int i = 0; i < kColumns; ++i) out[i] = {lo[i], hi[i]};
}
inline void column_store(uint32_t* p, Column a) { vstore(reinterpret_cast<float*>(p), a); }
inline V as_lanes(Column a) { return a; }

// Sixteen registers hold the sums of so many rows of a panel, or of six rows of so many vectors, and what is added.
constexpr int kTileRows = 3;
constexpr int kTileVectors = 1;

#include "f32.ipp"

// AVX2 knows no bf16: the two of a word are widened where they are multiplied.
struct Bf16 {
  using E = uint16_t;
  using W = VI;
  static constexpr int kWord = 2;
  static __m256 wide(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
  static __m128i eight(const E* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static V load(const E* p) { return {wide(eight(p)), wide(eight(p + 8))}; }
  static V load_part(const E* p, int n) {
    E part[16] = {};
    std::memcpy(part, p, static_cast<size_t>(n) * sizeof(E));
    return load(part);
  }
  // The upper half of each dword, rounded to nearest even; a NaN stays one.
  static __m256i rounded(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(near), _mm256_castsi256_ps(quiet), nan));
  }
  static __m256i narrow(V a) {
    const __m256i lo = _mm256_srli_epi32(rounded(a.lo), 16), hi = _mm256_srli_epi32(rounded(a.hi), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xD8);
  }
  static void store(E* p, V a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
  static void store_part(E* p, V a, int n) {
    E part[16];
    store(part, a);
    std::memcpy(p, part, static_cast<size_t>(n) * sizeof(E));
  }
  static __m256 upper(__m256i a) { return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(-65536))); }
  static __m256 lower(__m256i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
  static V round(V a) { return {upper(rounded(a.lo)), upper(rounded(a.hi))}; }
  static W word_row(const char* p) {
    const __m256i* at = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }
  static W word_all(const char* p) {
    const __m256i both = _mm256_set1_epi32(*reinterpret_cast<const int*>(p));
    return {both, both};
  }
  static W word_of(Column a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
  static V mac(V acc, W a, W b) {
    acc = vfma({upper(a.lo), upper(a.hi)}, {upper(b.lo), upper(b.hi)}, acc);
    return vfma({lower(a.lo), lower(a.hi)}, {lower(b.lo), lower(b.hi)}, acc);
  }
  static W pair_rows(const E* row0, const E* row1) {
    const W even = {_mm256_cvtepu16_epi32(eight(row0)), _mm256_cvtepu16_epi32(eight(row0 + 8))};
    if (row1 == nullptr) return even;
    return {_mm256_or_si256(even.lo, _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(row1)), 16)),
            _mm256_or_si256(even.hi, _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight(row1 + 8)), 16))};
  }
  static void word_store(char* p, W a) {
    __m256i* at = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(at, a.lo), _mm256_storeu_si256(at + 1, a.hi);
  }
};
