// Row-wise operations: RMSNorm, rotary embedding with the store into the KV slabs, SiLU * up.
// Each row is computed by itself; units are runs of rows.

// One phase that calls row(r) for every r < rows, `each` rows a unit.
template <class Row>
void row_phase(Team& team, int rows, int each, const Row& row) {
  team.phase(ceil_div(rows, each), [&](int64_t unit) {
    const int first = static_cast<int>(unit) * each;
    for (int r = first; r < first + each && r < rows; ++r) row(r);
  });
}

template <class T>
void rmsnorm_row(const RmsNorm& a, int row) {
  using E = typename T::E;
  const ptrdiff_t offset = static_cast<ptrdiff_t>(row) * a.width;
  const E* x = static_cast<const E*>(a.x) + offset;
  const E* weight = static_cast<const E*>(a.weight);
  E* out = static_cast<E*>(a.out) + offset;
  if (a.residual != nullptr) {
    E* residual = static_cast<E*>(a.residual) + offset;
    int i = 0;
    for (; i + 16 <= a.width; i += 16) T::store(residual + i, vadd(T::load(residual + i), T::load(x + i)));
    if (const int n = a.width - i) {
      T::store_part(residual + i, vadd(T::load_part(residual + i, n), T::load_part(x + i, n)), n);
    }
    x = residual;
  }
  V sum[4] = {vzero(), vzero(), vzero(), vzero()};
  int i = 0;
  for (; i + 64 <= a.width; i += 64) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V value = T::load(x + i + 16 * j);
      sum[j] = vfma(value, value, sum[j]);
    }
  }
  for (; i < a.width; i += 16) {
    const V value = T::load_part(x + i, a.width - i < 16 ? a.width - i : 16);
    sum[0] = vfma(value, value, sum[0]);
  }
  const float mean = vsum(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3]))) / static_cast<float>(a.width);
  const V scale = vset1(1.0f / __builtin_sqrtf(mean + a.eps));
  for (i = 0; i + 16 <= a.width; i += 16)
    T::store(out + i, vmul(T::round(vmul(T::load(x + i), scale)), T::load(weight + i)));
  if (const int n = a.width - i) {
    T::store_part(out + i, vmul(T::round(vmul(T::load_part(x + i, n), scale)), T::load_part(weight + i, n)), n);
  }
}

template <class T>
void rmsnorm_phase(const RmsNorm& a, Team& team) {
  row_phase(team, a.rows, a.rows >= 64 ? 16 : 4, [&](int row) { rmsnorm_row<T>(a, row); });
}

// out = x rotated by the angles of one position; cos and sin are [D / 2]. `half` selects rotate-half pairs
// (i, i + D/2), otherwise pairs are neighbours (2i, 2i + 1).
// The result has elements of Out.
template <class T, class Out = T>
void rotate_head(const typename T::E* x, const float* cos, const float* sin, int dim, bool half,
                 typename Out::E* out) {
  const int pairs = dim / 2;
  if (half) {
    for (int i = 0; i < pairs; i += 16) {
      const int n = pairs - i < 16 ? pairs - i : 16;
      const V a = T::load_part(x + i, n), b = T::load_part(x + pairs + i, n);
      const V c = vload_part(cos + i, n), s = vload_part(sin + i, n);
      Out::store_part(out + i, vfnma(b, s, vmul(a, c)), n);
      Out::store_part(out + pairs + i, vfma(a, s, vmul(b, c)), n);
    }
    return;
  }
  for (int i = 0; i < pairs; i += 8) {
    const int n = pairs - i < 8 ? pairs - i : 8;
    const V a = T::load_part(x + 2 * i, 2 * n);
    const V c = vdouble8(cos + i, n), s = vnegate_even(vdouble8(sin + i, n));
    Out::store_part(out + 2 * i, vfma(vswap_pairs(a), s, vmul(a, c)), 2 * n);
  }
}

template <class T>
void rope_store_token(const RopeStore& a, int token) {
  using E = typename T::E;
  const int dim = a.head_dim;
  const E* row = static_cast<const E*>(a.qkv) + static_cast<ptrdiff_t>(token) * (a.heads + 2 * a.kv_heads) * dim;
  const int position = a.positions[token];
  const float* cos = a.cos_sin + static_cast<ptrdiff_t>(position) * dim;
  const float* sin = cos + dim / 2;
  E* q = static_cast<E*>(a.q) + static_cast<ptrdiff_t>(token) * a.heads * dim;
  for (int h = 0; h < a.heads; ++h) rotate_head<T>(row + h * dim, cos, sin, dim, !a.interleaved, q + h * dim);
  const ptrdiff_t base = a.slots[token] * a.kv.slot_stride + position * a.kv.token_stride;
  const E* keys = row + a.heads * dim;
  const E* values = keys + a.kv_heads * dim;
  for (int g = 0; g < a.kv_heads; ++g) {
    E* k = static_cast<E*>(a.kv.k) + base + g * a.kv.head_stride;
    E* v = static_cast<E*>(a.kv.v) + base + g * a.kv.head_stride;
    rotate_head<T>(keys + g * dim, cos, sin, dim, !a.interleaved, k);
    std::memcpy(v, values + g * dim, static_cast<size_t>(dim) * sizeof(E));
  }
}

template <class T>
void rope_store_phase(const RopeStore& a, Team& team) {
  row_phase(team, a.tokens, a.tokens >= 64 ? 16 : 2, [&](int token) { rope_store_token<T>(a, token); });
}

template <class T>
void silu_mul_row(const SiluMul& a, int row) {
  using E = typename T::E;
  const E* gate = static_cast<const E*>(a.x) + static_cast<ptrdiff_t>(row) * 2 * a.width;
  const E* up = gate + a.width;
  E* out = static_cast<E*>(a.out) + static_cast<ptrdiff_t>(row) * a.width;
  for (int i = 0; i < a.width; i += 16) {
    const int n = a.width - i < 16 ? a.width - i : 16;
    T::store_part(out + i, silu_mul_lanes(T::load_part(gate + i, n), T::load_part(up + i, n), T::round), n);
  }
}

template <class T>
void silu_mul_phase(const SiluMul& a, Team& team) {
  row_phase(team, a.rows, a.rows >= 64 ? 8 : 1, [&](int row) { silu_mul_row<T>(a, row); });
}
