// Linear maps of heads: after the rotary embedding on the way into the KV slabs, and on the way out of attention.
// A head is rotated and mapped in fp32 and rounded once. Each row is computed by itself, in one order of additions.

// One table row's map of one KV head: an order of entries or a matrix.
template <class Index>
const Index* map_at(const void* maps, const HeadMaps& m, int table, int group, ptrdiff_t entries) {
  return static_cast<const Index*>(maps) + table * m.stride + group * entries;
}

#ifdef TESSERA_BF16
// reorder_head in registers, for heads of 64 or 128: rounded first, which moving does not change. A gather takes a load
// an entry.
inline void reorder_words(const float* x, const int16_t* order, int dim, uint16_t* out) {
  alignas(64) uint16_t rounded[128];
  for (int i = 0; i < dim; i += 16) Bf16::store(rounded + i, vload_part(x + i, 16));
  const __m512i a = _mm512_load_si512(rounded), b = _mm512_load_si512(rounded + 32);
  const __m512i c = _mm512_load_si512(rounded + (dim == 128 ? 64 : 0));
  const __m512i d = _mm512_load_si512(rounded + (dim == 128 ? 96 : 32));
  for (int j = 0; j < dim; j += 32) {
    const __m512i at = _mm512_loadu_si512(order + j);
    const __m512i low = _mm512_permutex2var_epi16(a, at, b), high = _mm512_permutex2var_epi16(c, at, d);
    const __mmask32 upper = _mm512_cmpgt_epi16_mask(at, _mm512_set1_epi16(63));
    _mm512_storeu_si512(out + j, _mm512_mask_blend_epi16(upper, low, high));
  }
}
#endif

// out[j] = x[order[j]]
template <class T>
void reorder_head(const float* x, const int16_t* order, int dim, typename T::E* out) {
#ifdef TESSERA_BF16
  if (sizeof(typename T::E) == 2 && (dim == 64 || dim == 128)) return reorder_words(x, order, dim, out);
#endif
  for (int j = 0; j < dim; j += 16) {
    const int n = dim - j < 16 ? dim - j : 16;
    T::store_part(out + j, vgather_part(x, order + j, n), n);
  }
}

// out[j] = sum over i of x[i] * matrix[i][j], i ascending; kHeads rows of x share the matrix.
template <class T, int kHeads>
void multiply_heads(const float* x, const float* matrix, int dim, typename T::E* out) {
  for (int j = 0; j < dim; j += 32) {
    const int n0 = dim - j < 16 ? dim - j : 16, n1 = dim - j - 16 < 0 ? 0 : dim - j - 16 < 16 ? dim - j - 16 : 16;
    V sum[kHeads][2];
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) sum[h][0] = sum[h][1] = vzero();
    for (int i = 0; i < dim; ++i) {
      const float* row = matrix + static_cast<size_t>(i) * dim + j;
      const V a = vload_part(row, n0), b = vload_part(row + 16, n1);
#pragma GCC unroll 8
      for (int h = 0; h < kHeads; ++h) {
        const V value = vset1(x[h * dim + i]);
        sum[h][0] = vfma(value, a, sum[h][0]);
        sum[h][1] = vfma(value, b, sum[h][1]);
      }
    }
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      T::store_part(out + h * dim + j, sum[h][0], n0);
      if (n1 > 0) T::store_part(out + h * dim + j + 16, sum[h][1], n1);
    }
  }
}

// `heads` neighbouring heads, wide at x, mapped by one map into out.
template <class T>
void map_heads(const HeadMaps& m, const void* maps, int table, int group, const float* x, int heads, int dim,
               typename T::E* out) {
  if (!m.matrices) {
    const int16_t* order = map_at<int16_t>(maps, m, table, group, dim);
    for (int h = 0; h < heads; ++h) reorder_head<T>(x + h * dim, order, dim, out + h * dim);
    return;
  }
  const float* matrix = map_at<float>(maps, m, table, group, static_cast<ptrdiff_t>(dim) * dim);
  int h = 0;
  for (; h + 4 <= heads; h += 4) multiply_heads<T, 4>(x + h * dim, matrix, dim, out + h * dim);
  for (; h < heads; ++h) multiply_heads<T, 1>(x + h * dim, matrix, dim, out + h * dim);
}

template <class T>
void widen_head(const typename T::E* x, int dim, float* out) {
  for (int i = 0; i < dim; i += 16) {
    const int n = dim - i < 16 ? dim - i : 16;
    vstore_part(out + i, T::load_part(x + i, n), n);
  }
}

// In: the type of qkv; T: of what is written.
template <class T, class In>
void encode_store_token(const EncodeStore& e, int token, float* wide) {
  using E = typename T::E;
  using From = typename In::E;
  const RopeStore& a = e.rope;
  const int dim = a.head_dim, each = a.heads / a.kv_heads;
  const From* row = static_cast<const From*>(a.qkv) + static_cast<ptrdiff_t>(token) * (a.heads + 2 * a.kv_heads) * dim;
  const int position = a.positions[token], table = e.maps.tables[token];
  const float* cos = a.cos_sin + static_cast<ptrdiff_t>(position) * dim;
  const float* sin = cos + dim / 2;
  E* q = static_cast<E*>(a.q) + token * e.q_stride;
  const ptrdiff_t base = a.slots[token] * a.kv.slot_stride + position * a.kv.token_stride;
  const From* keys = row + a.heads * dim;
  const From* values = keys + a.kv_heads * dim;
  for (int g = 0; g < a.kv_heads; ++g) {
    for (int h = 0; h < each; ++h)
      rotate_head<In, F32>(row + (g * each + h) * dim, cos, sin, dim, !a.interleaved, wide + h * dim);
    map_heads<T>(e.maps, e.q_map, table, g, wide, each, dim, q + g * each * dim);
    rotate_head<In, F32>(keys + g * dim, cos, sin, dim, !a.interleaved, wide);
    map_heads<T>(e.maps, e.k_map, table, g, wide, 1, dim, static_cast<E*>(a.kv.k) + base + g * a.kv.head_stride);
    widen_head<In>(values + g * dim, dim, wide);
    map_heads<T>(e.maps, e.v_map, table, g, wide, 1, dim, static_cast<E*>(a.kv.v) + base + g * a.kv.head_stride);
  }
}

template <class T>
void decode_heads_token(const DecodeHeads& a, int token, float* wide) {
  using E = typename T::E;
  const int dim = a.head_dim, each = a.heads / a.maps.groups;
  const ptrdiff_t offset = static_cast<ptrdiff_t>(token) * a.heads * dim;
  for (int g = 0; g < a.maps.groups; ++g) {
    const ptrdiff_t at = offset + static_cast<ptrdiff_t>(g) * each * dim;
    for (int h = 0; h < each; ++h) widen_head<T>(static_cast<const E*>(a.x) + at + h * dim, dim, wide + h * dim);
    map_heads<T>(a.maps, a.out_map, a.maps.tables[token], g, wide, each, dim, static_cast<E*>(a.out) + at);
  }
}

// Scratch of a member: the wide heads of one KV head.
inline size_t map_scratch_bytes(int heads, int groups, int dim) {
  return static_cast<size_t>(heads / groups) * dim * sizeof(float);
}

// Tokens of a unit: few enough that a batch of decodes keeps every member busy.
inline int map_unit(const Team& team, int tokens) {
  const int each = tokens / (4 * team.members);
  return each < 1 ? 1 : each > 16 ? 16 : each;
}

// Whether a token has a table row and angles; one that has not is left out.
inline bool in_tables(const HeadMaps& m, int token) { return m.tables[token] >= 0 && m.tables[token] < m.rows; }

template <class T>
void run_encode_store(Pool& pool, const EncodeStore& e) {
  const RopeStore& a = e.rope;
  pool.run(map_scratch_bytes(a.heads, a.kv_heads, a.head_dim), [&](Team& team) {
    float* wide = reinterpret_cast<float*>(team.scratch());
    row_phase(team, a.tokens, map_unit(team, a.tokens), [&](int token) {
      if (!in_tables(e.maps, token) || a.positions[token] < 0 || a.positions[token] >= a.angles) return;
      if (e.wide) encode_store_token<T, F32>(e, token, wide);
      else encode_store_token<T, T>(e, token, wide);
    });
  });
}

template <class T>
void run_decode_heads(Pool& pool, const DecodeHeads& a) {
  pool.run(map_scratch_bytes(a.heads, a.maps.groups, a.head_dim), [&](Team& team) {
    float* wide = reinterpret_cast<float*>(team.scratch());
    row_phase(team, a.tokens, map_unit(team, a.tokens), [&](int token) {
      if (in_tables(a.maps, token)) decode_heads_token<T>(a, token, wide);
    });
  });
}
