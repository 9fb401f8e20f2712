// Matrices out of orders and signs: a rotation takes a row x to x[order] * signs, to its Hadamard transform, and all
// that once more, over D; between two rotations a row may be stretched. Sixteen rows at once, one in each lane, so that
// every step is the same for all, and a sum of signs is exact. What stood in memory on the way is overwritten.
// Source: Ailon and Chazelle 2009 (randomised Hadamard transforms).

constexpr int kMostEntries = 256;  // of a head

// Entry j of sixteen rows is the vector at x + 16 * j.
struct RowBlock {
  alignas(64) float x[kMostEntries * 16];
  ~RowBlock() { explicit_bzero(x, sizeof x); }
};

inline void hadamard_rows(float* x, int dim) {
  for (int half = 1; half < dim; half *= 2) {
    for (int base = 0; base < dim; base += 2 * half) {
      for (int j = base; j < base + half; ++j) {
        const V a = vload(x + 16 * j), b = vload(x + 16 * (j + half));
        vstore(x + 16 * j, vadd(a, b));
        vstore(x + 16 * (j + half), vsub(a, b));
      }
    }
  }
}

// Both rounds; `scale` stretches entries first, or is null. order, signs: two rows, `next` entries apart.
inline void rotate_rows(const RowBlock& from, const float* scale, const int16_t* order, const int16_t* signs,
                        ptrdiff_t next, int dim, RowBlock& between, RowBlock& to) {
  for (int j = 0; j < dim; ++j) {
    const int i = order[j];
    const float by = static_cast<float>(signs[j]) * (scale == nullptr ? 1.0f : scale[i]);
    vstore(between.x + 16 * j, vmul(vload(from.x + 16 * i), vset1(by)));
  }
  hadamard_rows(between.x, dim);
  order += next, signs += next;
  for (int j = 0; j < dim; ++j)
    vstore(to.x + 16 * j, vmul(vload(between.x + 16 * order[j]), vset1(static_cast<float>(signs[j]))));
  hadamard_rows(to.x, dim);
  const V over = vset1(1.0f / static_cast<float>(dim));  // a power of two: exact
  for (int j = 0; j < dim; ++j) vstore(to.x + 16 * j, vmul(vload(to.x + 16 * j), over));
}

// Rows first .. first + 15 of a matrix, and of its transpose.
inline void store_rows(const RowBlock& block, int dim, int first, float* matrix) {
  for (int lane = 0; lane < 16; ++lane)
    for (int j = 0; j < dim; ++j) matrix[(first + lane) * static_cast<ptrdiff_t>(dim) + j] = block.x[16 * j + lane];
}
inline void store_columns(const RowBlock& block, int dim, int first, float* matrix) {
  for (int j = 0; j < dim; ++j) vstore(matrix + j * static_cast<ptrdiff_t>(dim) + first, vload(block.x + 16 * j));
}

// One label's maps of one purpose (0: queries and keys, 1: values and the output).
inline void build_unit(const BuildMaps& b, int64_t label, int purpose) {
  const int dim = b.dim, per = b.stretched ? 10 : 4;
  const ptrdiff_t next = static_cast<ptrdiff_t>(b.labels) * dim;  // entries from a row of `drawn` to the next
  const int16_t* drawn = b.drawn + purpose * per * next + label * dim;
  const auto table = [&](int number) { return b.out + (number * b.labels + label) * static_cast<ptrdiff_t>(dim) * dim; };
  alignas(64) float scale[kMostEntries], inverse[kMostEntries];
  if (b.stretched) {
    for (int i = 0; i < dim; ++i) {
      const uint32_t bits = static_cast<uint32_t>(static_cast<uint16_t>(drawn[8 * next + i])) << 16 |
                            static_cast<uint16_t>(drawn[9 * next + i]);
      std::memcpy(scale + i, &bits, 4);
      inverse[i] = 1.0f / scale[i];
    }
  }
  RowBlock start, between, turned, done;
  for (int first = 0; first < dim; first += 16) {
    std::memset(start.x, 0, static_cast<size_t>(dim) * 64);
    for (int lane = 0; lane < 16; ++lane) start.x[16 * (first + lane) + lane] = 1.0f;
    rotate_rows(start, nullptr, drawn, drawn + 2 * next, next, dim, between, turned);
    if (!b.stretched) {
      store_rows(turned, dim, first, table(purpose));
      if (purpose == 1) store_columns(turned, dim, first, table(2));  // the inverse of a rotation
      continue;
    }
    const int16_t* right = drawn + 4 * next;
    rotate_rows(turned, scale, right, right + 2 * next, next, dim, between, done);
    store_rows(done, dim, first, table(purpose + 1));
    rotate_rows(turned, inverse, right, right + 2 * next, next, dim, between, done);
    if (purpose == 0) store_rows(done, dim, first, table(0));  // queries: the transposed inverse
    else store_columns(done, dim, first, table(3));            // the output: the inverse
  }
  explicit_bzero(scale, sizeof scale);
  explicit_bzero(inverse, sizeof inverse);
}

inline void run_build_maps(Pool& pool, const BuildMaps& b) {
  pool.run(0, [&](Team& team) {
    team.phase(2 * static_cast<int64_t>(b.labels), [&](int64_t unit) { build_unit(b, unit / 2, unit % 2); });
  });
}
