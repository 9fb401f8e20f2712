// Causal attention over KV slabs: a ragged batch of prefill chunks and decodes, grouped query heads.
//
// Batch invariance: for every query row the keys are taken in blocks of kKeyBlock at absolute positions, each block
// with the same products (gemm.ipp's chains), the same softmax update and the same sums; blocks form partial results
// of kKeySplit keys, combined in ascending order. Rows that see no key of a block skip it. Nothing of this depends on
// how rows are tiled, chunked or dealt to threads.
//
// Memory: rows >= kv_len of a sequence are never touched (they may be PROT_NONE), and no load crosses a row's end.

constexpr int kQueryRows = 96;       // query rows (tokens x group) of one unit
constexpr float kNothing = -1e30f;   // running maximum before any key; finite so that differences stay numbers
constexpr float kLog2e = 1.4426950408889634f;

// Scratch of one unit; rows are (head, token, query head of the group).
template <class T>
struct AttentionScratch {
  typename T::E* q;   // [heads][rows][D]
  float* scores;      // [rows][kKeyBlock]
  typename T::E* p;   // [rows][kKeyBlock]
  char* keys;         // packed [D words][4 vectors]
  char* values;       // packed [kKeyBlock words][D / 16 vectors]
  float* acc;         // [heads][rows][D] of the split under way
  float* total;       // [heads][rows][D] of finished splits
  float* state;       // [heads][rows][4]: maximum and sum of acc, maximum and sum of total
};

template <class T>
size_t attention_scratch(char* base, int heads, int rows, int dim, AttentionScratch<T>* s) {
  size_t used = 0;
  const auto take = [&](size_t nbytes) {
    char* at = base + used;
    used += (nbytes + 63) / 64 * 64;
    return at;
  };
  const size_t all = static_cast<size_t>(heads) * rows;
  AttentionScratch<T> local;
  AttentionScratch<T>& t = s != nullptr ? *s : local;
  t.q = reinterpret_cast<typename T::E*>(take(all * dim * sizeof(typename T::E)));
  t.scores = reinterpret_cast<float*>(take(static_cast<size_t>(rows) * kKeyBlock * 4));
  t.p = reinterpret_cast<typename T::E*>(take(static_cast<size_t>(rows) * kKeyBlock * sizeof(typename T::E)));
  t.keys = take(static_cast<size_t>(dim) / T::kWord * 256);
  t.values = take(static_cast<size_t>(kKeyBlock) / T::kWord * dim * 4);
  t.acc = reinterpret_cast<float*>(take(all * dim * 4));
  t.total = reinterpret_cast<float*>(take(all * dim * 4));
  t.state = reinterpret_cast<float*>(take(all * 16));
  return used;
}

template <class T, int MR, int NV>
void product_tile(const char* a, ptrdiff_t a_row_bytes, const char* b, ptrdiff_t b_word_bytes, int words, float* c,
                  ptrdiff_t c_stride, bool zero) {
  V acc[MR][NV];
  tile_load<MR, NV>(acc, c, c_stride, zero);
  tile_mac<T, MR, NV>(acc, a, a_row_bytes, b, b_word_bytes, words);
  tile_store<MR, NV>(acc, c, c_stride);
}

template <class T, int NV>
void product_rows(const char* a, ptrdiff_t a_row_bytes, const char* b, ptrdiff_t b_word_bytes, int words, float* c,
                  ptrdiff_t c_stride, int rows, bool zero) {
  int r = 0;
  for (; r + 6 <= rows; r += 6)
    product_tile<T, 6, NV>(a + r * a_row_bytes, a_row_bytes, b, b_word_bytes, words, c + r * c_stride, c_stride, zero);
  a += r * a_row_bytes;
  c += r * c_stride;
  switch (rows - r) {
    case 5: return product_tile<T, 5, NV>(a, a_row_bytes, b, b_word_bytes, words, c, c_stride, zero);
    case 4: return product_tile<T, 4, NV>(a, a_row_bytes, b, b_word_bytes, words, c, c_stride, zero);
    case 3: return product_tile<T, 3, NV>(a, a_row_bytes, b, b_word_bytes, words, c, c_stride, zero);
    case 2: return product_tile<T, 2, NV>(a, a_row_bytes, b, b_word_bytes, words, c, c_stride, zero);
    case 1: return product_tile<T, 1, NV>(a, a_row_bytes, b, b_word_bytes, words, c, c_stride, zero);
    default: return;
  }
}

// c[rows, 16 * vectors] (+)= a[rows, words] . b
template <class T>
void product(const char* a, ptrdiff_t a_row_bytes, const char* b, int vectors, int words, float* c,
             ptrdiff_t c_stride, int rows, bool zero) {
  const ptrdiff_t b_word_bytes = vectors * 64;
  int v = 0;
  if constexpr (kTileVectors == 4) {
    for (; v + 4 <= vectors; v += 4)
      product_rows<T, 4>(a, a_row_bytes, b + v * 64, b_word_bytes, words, c + v * 16, c_stride, rows, zero);
    if (vectors - v >= 2) {
      product_rows<T, 2>(a, a_row_bytes, b + v * 64, b_word_bytes, words, c + v * 16, c_stride, rows, zero);
      v += 2;
    }
  }
  for (; v < vectors; ++v)
    product_rows<T, 1>(a, a_row_bytes, b + v * 64, b_word_bytes, words, c + v * 16, c_stride, rows, zero);
}

// `count` key rows into [word][64 keys]; missing keys become zeros.
template <class T>
void pack_keys(const typename T::E* k, ptrdiff_t token_stride, int count, int dim, char* out) {
  const int words = dim / T::kWord;
  const ptrdiff_t row_bytes = token_stride * static_cast<ptrdiff_t>(sizeof(typename T::E));
  for (int group = 0; group < kKeyBlock / 16; ++group) {
    const int left = count - group * 16;
    const int rows = left < 0 ? 0 : left < 16 ? left : 16;
    const char* from = reinterpret_cast<const char*>(k) + group * 16 * row_bytes;
    uint32_t* to = reinterpret_cast<uint32_t*>(out) + group * 16;
    for_columns(from, row_bytes, rows, words,
                [&](int w, const Column& column) { column_store(to + w * kKeyBlock, column); });
  }
}

// `count` value rows into [word of keys][D]; missing rows become zeros.
template <class T>
void pack_values(const typename T::E* v, ptrdiff_t token_stride, int count, int dim, char* out) {
  int key = 0;
  for (; key < count; key += T::kWord, out += dim * 4) {
    const typename T::E* row0 = v + key * token_stride;
    const typename T::E* row1 = key + 1 < count ? row0 + token_stride : nullptr;
    for (int d = 0; d < dim; d += 16) T::word_store(out + d * 4, T::pair_rows(row0 + d, row1 ? row1 + d : nullptr));
  }
  const int written = (key + T::kWord - 1) / T::kWord;
  std::memset(out, 0, static_cast<size_t>(kKeyBlock / T::kWord - written) * dim * 4);
}

// The two products of a block for few rows (a decode), straight from the slab: the packed form would be used too few
// times to pay for writing it. The chains are the same.
constexpr int kDirectRows = 8;

template <class T, int MR>
void scores_direct(const typename T::E* q, const typename T::E* k, ptrdiff_t token_stride, int dim, float* scores) {
  constexpr int kGroups = kTileVectors == 4 ? 2 : 1;  // side by side, or the chains' latency would bound the speed
  const ptrdiff_t row_bytes = token_stride * static_cast<ptrdiff_t>(sizeof(typename T::E));
  const ptrdiff_t q_bytes = dim * static_cast<ptrdiff_t>(sizeof(typename T::E));
  const int words = dim / T::kWord;
  for (int first = 0; first < kKeyBlock / 16; first += kGroups) {
    const char* from = reinterpret_cast<const char*>(k) + first * 16 * row_bytes;
    V acc[MR][kGroups];
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) acc[r][g] = vzero();
    }
    for (int w = 0; w < words; w += kColumns) {
      const char* a = reinterpret_cast<const char*>(q) + w * 4;
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        Column columns[kColumns];
        transpose_columns(from + g * 16 * row_bytes + w * 4, row_bytes, columns);
#pragma GCC unroll 8
        for (int i = 0; i < kColumns; ++i) {
#pragma GCC unroll 8
          for (int r = 0; r < MR; ++r)
            acc[r][g] = T::mac(acc[r][g], T::word_all(a + r * q_bytes + i * 4), T::word_of(columns[i]));
        }
      }
    }
    tile_store<MR, kGroups>(acc, scores + first * 16, kKeyBlock);
  }
}

template <class T, int MR, int NV>
__attribute__((always_inline)) inline void values_direct_columns(const typename T::E* p, const typename T::E* v,
                                                                 ptrdiff_t token_stride, int dim, float* acc_rows) {
  V acc[MR][NV];
  tile_load<MR, NV>(acc, acc_rows, dim, false);
  for (int key = 0; key < kKeyBlock; key += T::kWord, p += T::kWord, v += T::kWord * token_stride) {
    typename T::W b[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) b[i] = T::pair_rows(v + 16 * i, v + token_stride + 16 * i);
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r) {
      const typename T::W a = T::word_all(reinterpret_cast<const char*>(p + r * kKeyBlock));
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) acc[r][i] = T::mac(acc[r][i], a, b[i]);
    }
  }
  tile_store<MR, NV>(acc, acc_rows, dim);
}

template <class T, int MR>
void values_direct(const typename T::E* p, const typename T::E* v, ptrdiff_t token_stride, int dim, float* acc) {
  constexpr int kWide = kTileVectors == 1 ? 1 : MR <= 4 ? 4 : 2;
  int d = 0;
  for (; d + 16 * kWide <= dim; d += 16 * kWide)
    values_direct_columns<T, MR, kWide>(p, v + d, token_stride, dim, acc + d);
  for (; d < dim; d += 16) values_direct_columns<T, MR, 1>(p, v + d, token_stride, dim, acc + d);
}

// The block itself, or where it has fewer than kKeyBlock rows a copy with zeros in their place.
template <class E>
const E* whole_block(const E* rows, ptrdiff_t& token_stride, int count, int dim, char* copy) {
  if (count == kKeyBlock) return rows;
  E* out = reinterpret_cast<E*>(copy);
  for (int key = 0; key < count; ++key)
    std::memcpy(out + key * dim, rows + key * token_stride, static_cast<size_t>(dim) * sizeof(E));
  std::memset(out + count * dim, 0, static_cast<size_t>(kKeyBlock - count) * dim * sizeof(E));
  token_stride = dim;
  return out;
}

template <class T>
struct DirectFns {
  void (*scores)(const typename T::E* q, const typename T::E* k, ptrdiff_t token_stride, int dim, float* scores);
  void (*values)(const typename T::E* p, const typename T::E* v, ptrdiff_t token_stride, int dim, float* acc);
};

template <class T>
const DirectFns<T>& direct_for(int rows) {
  static constexpr DirectFns<T> table[kDirectRows] = {
      {scores_direct<T, 1>, values_direct<T, 1>}, {scores_direct<T, 2>, values_direct<T, 2>},
      {scores_direct<T, 3>, values_direct<T, 3>}, {scores_direct<T, 4>, values_direct<T, 4>},
      {scores_direct<T, 5>, values_direct<T, 5>}, {scores_direct<T, 6>, values_direct<T, 6>},
      {scores_direct<T, 7>, values_direct<T, 7>}, {scores_direct<T, 8>, values_direct<T, 8>}};
  return table[rows - 1];
}

// Scores of one row to probabilities of the block's keys [lo, hi); updates maximum and sum; rescales acc.
template <class T>
void softmax_row(const float* scores, float scale, int lo, int hi, float* state, float* acc, int dim,
                 typename T::E* p) {
  V s[4];
  const V scale_v = vset1(scale);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) s[i] = vmul(vload(scores + 16 * i), scale_v);
  if (lo > 0 || hi < kKeyBlock) {
    for (int i = 0; i < 4; ++i) s[i] = vkeep(s[i], lo - 16 * i, hi - 16 * i, -__builtin_inff());
  }
  const float block_max = vmaximum(vmax(vmax(s[0], s[1]), vmax(s[2], s[3])));
  const float old_max = state[0];
  const float new_max = old_max > block_max ? old_max : block_max;
  const V shift = vset1(new_max);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    s[i] = vexp2(vsub(s[i], shift));
    T::store(p + 16 * i, s[i]);
  }
  const float sum = vsum(vadd(vadd(s[0], s[1]), vadd(s[2], s[3])));
  if (new_max == old_max) {  // the factor is exactly 1
    state[1] = state[1] + sum;
    return;
  }
  const V alpha = vexp2(vset1(old_max - new_max));
  state[0] = new_max;
  state[1] = vfirst(vfma(vset1(state[1]), alpha, vset1(sum)));
  for (int d = 0; d < dim; d += 16) vstore(acc + d, vmul(vload(acc + d), alpha));
}

// Folds one finished split (state[0..1], acc) into the running total (state[2..3], total).
inline void fold_split(float* total_state, float* total, const float* part_state, const float* part, int dim) {
  if (part_state[1] == 0.0f) return;  // saw no key
  if (total_state[1] == 0.0f) {
    total_state[0] = part_state[0];
    total_state[1] = part_state[1];
    std::memcpy(total, part, static_cast<size_t>(dim) * 4);
    return;
  }
  const float top = total_state[0] > part_state[0] ? total_state[0] : part_state[0];
  const V a = vexp2(vset1(total_state[0] - top)), b = vexp2(vset1(part_state[0] - top));
  total_state[0] = top;
  total_state[1] = vfirst(vfma(vset1(total_state[1]), a, vmul(vset1(part_state[1]), b)));
  for (int d = 0; d < dim; d += 16)
    vstore(total + d, vfma(vload(total + d), a, vmul(vload(part + d), b)));
}

template <class T>
void write_rows(typename T::E* out, const float* total, float sum, int dim) {
  const V divisor = vset1(sum);
  for (int d = 0; d < dim; d += 16) T::store(out + d, vdiv(vload(total + d), divisor));
}

inline void reset_state(float* state, float* acc, int dim) {
  state[0] = kNothing;
  state[1] = 0.0f;
  std::memset(acc, 0, static_cast<size_t>(dim) * 4);
}

// Everything one unit needs about its sequence.
struct UnitShape {
  int group, rows, position0, kv_len, slot, token_base;
};

inline UnitShape shape_of(const Attention& a, const AttentionUnit& u) {
  const int q_len = a.q_starts[u.sequence + 1] - a.q_starts[u.sequence];
  const int group = a.heads / a.kv_heads, kv_len = a.kv_lens[u.sequence];
  return {group, u.tokens * group, kv_len - q_len + u.token0, kv_len, a.slots[u.sequence],
          a.q_starts[u.sequence] + u.token0};
}

// Asks for the K and V rows of the next block, a few at a time between the steps of this one: with a mega layout every
// row is on a page of its own, out of reach of the hardware's prefetcher, and a burst would fill the miss queues.
struct Ahead {
  const char *k, *v;
  ptrdiff_t row_stride_bytes;
  int row_bytes, rows, each;

  void some() {
    for (int n = rows < each ? rows : each; n > 0; --n, --rows, k += row_stride_bytes, v += row_stride_bytes) {
      for (int i = 0; i < row_bytes; i += 64) __builtin_prefetch(k + i, 0, 3);
      for (int i = 0; i < row_bytes; i += 64) __builtin_prefetch(v + i, 0, 3);
    }
  }
};
constexpr int kAheadSteps = 4;  // calls of some() a block and head

// One key block of one kv head against all of the unit's rows.
template <class T>
void attend_block(const Attention& a, const UnitShape& u, const AttentionScratch<T>& s, int head, int head_index,
                  int key0, Ahead& ahead) {
  using E = typename T::E;
  const int dim = a.head_dim, vectors = dim / 16;
  const int count = u.kv_len - key0 < kKeyBlock ? u.kv_len - key0 : kKeyBlock;
  // Rows that see a key of this block: position >= key0, and with a window position - window < last key.
  int first = key0 > u.position0 ? (key0 - u.position0) * u.group : 0;
  int last = u.rows;
  if (a.window > 0) {
    const int beyond = (key0 + kKeyBlock - 1 + a.window - u.position0) * u.group;
    last = beyond < last ? beyond : last;
  }
  if (first >= last) return;
  const ptrdiff_t at = u.slot * a.kv.slot_stride + key0 * a.kv.token_stride + head * a.kv.head_stride;
  const ptrdiff_t row0 = static_cast<ptrdiff_t>(head_index) * u.rows + first;
  const int rows = last - first;
  const E* const keys = static_cast<const E*>(a.kv.k) + at;
  const E* const values = static_cast<const E*>(a.kv.v) + at;
  const bool direct = rows <= kDirectRows;
  ahead.some();
  if (direct) {
    ptrdiff_t stride = a.kv.token_stride;
    const E* whole = whole_block(keys, stride, count, dim, s.keys);
    direct_for<T>(rows).scores(s.q + row0 * dim, whole, stride, dim, s.scores);
  } else {
    pack_keys<T>(keys, a.kv.token_stride, count, dim, s.keys);
    product<T>(reinterpret_cast<const char*>(s.q + row0 * dim), dim * static_cast<ptrdiff_t>(sizeof(E)), s.keys,
               kKeyBlock / 16, dim / T::kWord, s.scores, kKeyBlock, rows, true);
  }
  const float scale = a.scale * kLog2e;
  ahead.some();
  for (int r = 0; r < rows; ++r) {
    const int position = u.position0 + (first + r) / u.group;
    const int hi = position + 1 - key0 < kKeyBlock ? position + 1 - key0 : kKeyBlock;
    const int lo = a.window > 0 && position + 1 - a.window > key0 ? position + 1 - a.window - key0 : 0;
    softmax_row<T>(s.scores + r * kKeyBlock, scale, lo, hi, s.state + (row0 + r) * 4, s.acc + (row0 + r) * dim, dim,
                   s.p + r * kKeyBlock);
  }
  ahead.some();
  if (direct) {
    ptrdiff_t stride = a.kv.token_stride;
    const E* whole = whole_block(values, stride, count, dim, s.values);
    direct_for<T>(rows).values(s.p, whole, stride, dim, s.acc + row0 * dim);
    return;
  }
  pack_values<T>(values, a.kv.token_stride, count, dim, s.values);
  product<T>(reinterpret_cast<const char*>(s.p), kKeyBlock * static_cast<ptrdiff_t>(sizeof(E)), s.values, vectors,
             kKeyBlock / T::kWord, s.acc + row0 * dim, dim, rows, false);
}

template <class T>
void gather_queries(const Attention& a, const AttentionUnit& unit, const UnitShape& u, typename T::E* q) {
  const int dim = a.head_dim;
  for (int h = 0; h < unit.heads; ++h) {
    for (int t = 0; t < unit.tokens; ++t) {
      const ptrdiff_t token = u.token_base + t;
      const typename T::E* from =
          static_cast<const typename T::E*>(a.q) + (token * a.heads + (unit.head0 + h) * u.group) * dim;
      const size_t elements = static_cast<size_t>(u.group) * dim;
      std::memcpy(q, from, elements * sizeof(typename T::E));
      q += elements;
    }
  }
}

// Row r of head h of a unit in `out`.
template <class T>
typename T::E* output_row(const Attention& a, const AttentionUnit& unit, const UnitShape& u, int h, int r) {
  const ptrdiff_t token = u.token_base + r / u.group;
  const int head = (unit.head0 + h) * u.group + r % u.group;
  return static_cast<typename T::E*>(a.out) + (token * a.heads + head) * a.head_dim;
}

// The first key a unit needs, down to a whole block.
inline int first_key(const Attention& a, const AttentionUnit& unit, const UnitShape& u) {
  const int seen = a.window > 0 && u.position0 + 1 > a.window ? (u.position0 + 1 - a.window) / kKeyBlock * kKeyBlock : 0;
  return unit.split0 * kKeySplit > seen ? unit.split0 * kKeySplit : seen;
}

// The unit's rows of the block at `key0`, none where the heads of a token are not neighbours.
template <class T>
Ahead block_ahead(const Attention& a, const AttentionUnit& unit, const UnitShape& u, int key0) {
  constexpr ptrdiff_t kBytes = sizeof(typename T::E);
  const int key_end = u.position0 + unit.tokens;
  const int left = key_end - key0 < kKeyBlock ? key_end - key0 : kKeyBlock;
  const bool dense = unit.heads == 1 || a.kv.head_stride == a.head_dim;
  const ptrdiff_t at = u.slot * a.kv.slot_stride + key0 * a.kv.token_stride + unit.head0 * a.kv.head_stride;
  return {static_cast<const char*>(a.kv.k) + at * kBytes, static_cast<const char*>(a.kv.v) + at * kBytes,
          a.kv.token_stride * kBytes, static_cast<int>(unit.heads * a.head_dim * kBytes), dense && left > 0 ? left : 0,
          ceil_div(kKeyBlock, kAheadSteps * unit.heads)};
}

template <class T>
void attend_unit(const Attention& a, const AttentionUnit& unit, const AttentionUnit* next, char* scratch,
                 float* partials) {
  const UnitShape u = shape_of(a, unit);
  const int dim = a.head_dim;
  AttentionScratch<T> s;
  attention_scratch<T>(scratch, unit.heads, u.rows, dim, &s);
  gather_queries<T>(a, unit, u, s.q);
  const int all_rows = unit.heads * u.rows;
  for (int r = 0; r < all_rows; ++r) reset_state(s.state + r * 4 + 2, s.total + r * dim, dim);
  const int key_end = u.position0 + unit.tokens;
  const int key_begin = first_key(a, unit, u);
  for (int split = unit.split0; split < unit.split0 + unit.splits; ++split) {
    const int from = split * kKeySplit > key_begin ? split * kKeySplit : key_begin;
    const int to = (split + 1) * kKeySplit < key_end ? (split + 1) * kKeySplit : key_end;
    if (from >= to) continue;
    for (int r = 0; r < all_rows; ++r) reset_state(s.state + r * 4, s.acc + r * dim, dim);
    for (int key0 = from; key0 < to; key0 += kKeyBlock) {
      Ahead ahead = block_ahead<T>(a, unit, u, key0 + kKeyBlock);
      if (key0 + kKeyBlock >= key_end && next != nullptr) {
        const UnitShape n = shape_of(a, *next);
        ahead = block_ahead<T>(a, *next, n, first_key(a, *next, n));
      }
      for (int h = 0; h < unit.heads; ++h) {
        attend_block<T>(a, u, s, unit.head0 + h, h, key0, ahead);
        ahead.some();
      }
    }
    for (int r = 0; r < all_rows; ++r)
      fold_split(s.state + r * 4 + 2, s.total + r * dim, s.state + r * 4, s.acc + r * dim, dim);
  }
  for (int r = 0; r < all_rows; ++r) {
    const float* total = s.total + r * dim;
    if (unit.partial < 0) {
      write_rows<T>(output_row<T>(a, unit, u, r / u.rows, r % u.rows), total, s.state[r * 4 + 3], dim);
      continue;
    }
    float* part = partials + (static_cast<ptrdiff_t>(unit.partial) + r) * (dim + 2);
    part[0] = s.state[r * 4 + 2];
    part[1] = s.state[r * 4 + 3];
    std::memcpy(part + 2, total, static_cast<size_t>(dim) * 4);
  }
}

// How a batch is cut into units; made once per call by the caller's thread.
struct AttentionPlan {
  std::vector<AttentionUnit> units;
  std::vector<AttentionUnit> merges;  // split0/splits: the splits whose partials start at `partial`
  size_t scratch_bytes = 0;           // per member
  size_t partial_floats = 0;
};

template <class T>
void plan_attention(const Attention& a, int members, AttentionPlan& plan) {
  const int group = a.heads / a.kv_heads;
  const int block_tokens = group >= kQueryRows ? 1 : kQueryRows / group;
  const int enough = members * 4;
  int heads_max = 1, rows_max = 1;
  for (int b = 0; b < a.sequences; ++b) {
    const int q_len = a.q_starts[b + 1] - a.q_starts[b];
    const int kv_len = a.kv_lens[b];
    const bool few_rows = q_len * group * a.kv_heads <= kQueryRows;
    // A decode takes all its kv heads at once (they are neighbours in memory) when there are sequences enough.
    const int heads = few_rows && a.sequences >= enough ? a.kv_heads : 1;
    const int splits = ceil_div(kv_len, kKeySplit);
    const bool cut = q_len <= block_tokens && splits > 1 && a.sequences * (a.kv_heads / heads) < enough;
    for (int block = ceil_div(q_len, block_tokens) - 1; block >= 0; --block) {  // the longest first
      const int token0 = block * block_tokens;
      const int tokens = q_len - token0 < block_tokens ? q_len - token0 : block_tokens;
      for (int head = 0; head < a.kv_heads; head += heads) {
        const int rows = heads * tokens * group;
        heads_max = heads > heads_max ? heads : heads_max;
        rows_max = tokens * group > rows_max ? tokens * group : rows_max;
        if (!cut) {
          plan.units.push_back({b, token0, tokens, head, heads, 0, splits, -1});
          continue;
        }
        const int first_partial = static_cast<int>(plan.partial_floats / (a.head_dim + 2));
        for (int split = 0; split < splits; ++split)
          plan.units.push_back({b, token0, tokens, head, heads, split, 1, first_partial + split * rows});
        plan.merges.push_back({b, token0, tokens, head, heads, 0, splits, first_partial});
        plan.partial_floats += static_cast<size_t>(splits) * rows * (a.head_dim + 2);
      }
    }
  }
  plan.scratch_bytes = attention_scratch<T>(nullptr, heads_max, rows_max, a.head_dim, nullptr);
}

template <class T>
void merge_unit(const Attention& a, const AttentionUnit& unit, char* scratch, const float* partials) {
  const UnitShape u = shape_of(a, unit);
  const int dim = a.head_dim, rows = unit.heads * u.rows;
  float* total = reinterpret_cast<float*>(scratch);
  for (int r = 0; r < rows; ++r) {
    float state[2];
    reset_state(state, total, dim);
    for (int split = 0; split < unit.splits; ++split) {
      const float* part = partials + (static_cast<ptrdiff_t>(unit.partial) + split * rows + r) * (dim + 2);
      fold_split(state, total, part, part + 2, dim);
    }
    write_rows<T>(output_row<T>(a, unit, u, r / u.rows, r % u.rows), total, state[1], dim);
  }
}

// The phase (two with partial results); every member calls it with the same plan.
template <class T>
void attention_phase(const Attention& a, const AttentionPlan& plan, float* partials, Team& team) {
  const int64_t units = static_cast<int64_t>(plan.units.size()), merges = static_cast<int64_t>(plan.merges.size());
  team.phase(units, [&](int64_t i) {
    const AttentionUnit* unit = &plan.units[static_cast<size_t>(i)];
    attend_unit<T>(a, *unit, i + 1 < units ? unit + 1 : nullptr, team.scratch(), partials);
  });
  if (merges == 0) return;
  team.phase(merges, [&](int64_t i) {
    merge_unit<T>(a, plan.merges[static_cast<size_t>(i)], team.scratch(), partials);
  });
}
