// Matrix products from packed panels, and the register tile that attention shares.
//
// Batch invariance: an output element is one chain of multiply-accumulates over k in ascending order, started at
// zero, whatever the tile shape, the row count or the split of K into blocks (a partial chain is kept in fp32).

// acc[r][v] += a[r, :] . b[:, v] over `words`; a's row r at a + r * a_row_bytes, b word-major, b_word_bytes apart.
// `kLines` cache lines of `ahead` are prefetched into L2 a word.
template <class T, int MR, int NV, int kLines = 0>
__attribute__((always_inline)) inline void tile_mac(V (&acc)[MR][NV], const char* a, ptrdiff_t a_row_bytes,
                                                    const char* b, ptrdiff_t b_word_bytes, int words,
                                                    const char* ahead = nullptr) {
  // Rows are reached as base + {0, 1, 2} * stride from every third row: few enough addresses to stay in registers.
  constexpr int kBases = (MR + 2) / 3;
  const char* base[kBases];
#pragma GCC unroll 4
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * a_row_bytes;
  for (int w = 0; w < words; ++w) {
    typename T::W bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = T::word_row(b + v * 64);
    if (kLines > 0) {
#pragma GCC unroll 2
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(ahead + i * 64, 0, 2);
      ahead += kLines * 64;
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const typename T::W av = T::word_all(base[r / 3] + (r % 3) * a_row_bytes);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = T::mac(acc[r][v], av, bv[v]);
    }
    b += b_word_bytes;
#pragma GCC unroll 4
    for (int i = 0; i < kBases; ++i) base[i] += 4;
  }
}

template <int MR, int NV>
__attribute__((always_inline)) inline void tile_load(V (&acc)[MR][NV], const float* c, ptrdiff_t stride, bool zero) {
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = zero ? vzero() : vload(c + r * stride + v * 16);
  }
}

template <int MR, int NV>
__attribute__((always_inline)) inline void tile_store(const V (&acc)[MR][NV], float* c, ptrdiff_t stride) {
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) vstore(c + r * stride + v * 16, acc[r][v]);
  }
}

inline V silu_mul_lanes(V gate, V up, V (*round)(V)) {
  const V sigmoid_inverse = vadd(vset1(1.0f), vexp2(vmul(gate, vset1(-1.4426950408889634f))));
  return vmul(round(vdiv(gate, sigmoid_inverse)), up);
}

// One row of one panel from its accumulators to memory. `columns` = valid columns of this panel.
template <class T>
inline void finish_row(const Gemm& g, V left, V right, int row, int panel, int columns) {
  using E = typename T::E;
  if (g.bias != nullptr) {
    left = vadd(left, vload(g.bias + panel * kPanelColumns));
    right = vadd(right, vload(g.bias + panel * kPanelColumns + 16));
  }
  const int n0 = columns < 16 ? columns : 16, n1 = columns - n0;
  if (g.epilogue == Epilogue::kSiluMul) {
    E* out = static_cast<E*>(g.out) + row * g.out_stride + panel * 16;
    const V y = silu_mul_lanes(T::round(left), T::round(right), T::round);
    if (columns == kPanelColumns) T::store(out, y);
    else T::store_part(out, y, columns / 2);
    return;
  }
  if (g.epilogue == Epilogue::kFloat) {
    float* out = static_cast<float*>(g.out) + row * g.out_stride + panel * kPanelColumns;
    if (columns == kPanelColumns) {
      vstore(out, left);
      vstore(out + 16, right);
    } else {
      vstore_part(out, left, n0);
      vstore_part(out + 16, right, n1);
    }
    return;
  }
  E* out = static_cast<E*>(g.out) + row * g.out_stride + panel * kPanelColumns;
  const bool add = g.epilogue == Epilogue::kResidual;
  if (columns == kPanelColumns) {
    if (add) {
      left = vadd(T::load(out), T::round(left));
      right = vadd(T::load(out + 16), T::round(right));
    }
    T::store(out, left);
    T::store(out + 16, right);
  } else {
    if (add) {
      left = vadd(T::load_part(out, n0), T::round(left));
      right = vadd(T::load_part(out + 16, n1), T::round(right));
    }
    T::store_part(out, left, n0);
    T::store_part(out + 16, right, n1);
  }
}

constexpr int kBlockWords = 288;      // K block of a small batch: 36 KiB of panel stay in L1 for its second tile
constexpr int kSmallBatchRows = 48;   // up to here K is blocked and partial chains are kept in scratch
constexpr int kAheadBytes = 4096;
constexpr int kRowBlock = 240;        // rows of x a unit covers, so that they stay in L2

// One tile: MR rows of one panel, words [w0, w0 + words) of K. `partial` keeps unfinished chains. The weights that
// follow in memory come into L2 meanwhile, half each by the first two tiles, so that memory is busy as long as the
// multipliers are; an only tile reads at memory speed and prefetches just ahead of itself.
template <class T, int MR>
void gemm_tile(const Gemm& g, int row, int panel, int w0, int words, int total_words, float* partial, int tile,
               int tiles) {
  const char* a = static_cast<const char*>(g.x) +
                  (row * g.x_stride) * static_cast<ptrdiff_t>(sizeof(typename T::E)) + w0 * 4;
  const char* b = static_cast<const char*>(g.panels) + (static_cast<ptrdiff_t>(panel) * total_words + w0) * 128;
  const ptrdiff_t a_row_bytes = g.x_stride * static_cast<ptrdiff_t>(sizeof(typename T::E));
  V acc[MR][2];
  tile_load<MR, 2>(acc, partial, kPanelColumns, w0 == 0);
  const char* ahead = b + words * 128;
  if (tiles == 1) tile_mac<T, MR, 2, 2>(acc, a, a_row_bytes, b, 128, words, b + kAheadBytes);
  else if (tile < 2) tile_mac<T, MR, 2, 1>(acc, a, a_row_bytes, b, 128, words, ahead + tile * words * 64);
  else tile_mac<T, MR, 2>(acc, a, a_row_bytes, b, 128, words);
  if (w0 + words < total_words) {
    tile_store<MR, 2>(acc, partial, kPanelColumns);
    return;
  }
  const int left = g.columns - panel * kPanelColumns;
  const int columns = left < kPanelColumns ? left : kPanelColumns;
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r) finish_row<T>(g, acc[r][0], acc[r][1], row + r, panel, columns);
}

template <class T>
using TileFn = void (*)(const Gemm&, int, int, int, int, int, float*, int, int);

template <class T, int... kLessOne>
constexpr std::array<TileFn<T>, kTileRows> tile_table(std::integer_sequence<int, kLessOne...>) {
  return {gemm_tile<T, kLessOne + 1>...};
}

template <class T>
TileFn<T> tile_for(int rows) {
  static constexpr auto table = tile_table<T>(std::make_integer_sequence<int, kTileRows>());
  return table[rows - 1];
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Rows [row0, row0 + rows) of one panel, in tiles of nearly equal height.
template <class T>
void gemm_panel(const Gemm& g, int row0, int rows, int panel, float* partial) {
  const int total_words = g.depth / T::kWord;
  const int block = rows <= kSmallBatchRows ? kBlockWords : total_words;
  const int tiles = ceil_div(rows, kTileRows);
  for (int w0 = 0; w0 < total_words; w0 += block) {
    const int words = total_words - w0 < block ? total_words - w0 : block;
    for (int t = 0; t < tiles; ++t) {
      const int begin = static_cast<int>(static_cast<int64_t>(rows) * t / tiles);
      const int end = static_cast<int>(static_cast<int64_t>(rows) * (t + 1) / tiles);
      tile_for<T>(end - begin)(g, row0 + begin, panel, w0, words, total_words, partial + begin * kPanelColumns, t,
                               tiles);
    }
  }
}

constexpr size_t kGemmScratchBytes = kSmallBatchRows * kPanelColumns * sizeof(float);

// One phase; a unit is one panel for one block of rows. A member's panels are neighbours in memory.
template <class T>
void gemm_phase(const Gemm& g, Team& team) {
  const int panels = ceil_div(g.columns, kPanelColumns);
  const int row_blocks = ceil_div(g.rows, kRowBlock);
  float* partial = reinterpret_cast<float*>(team.scratch());
  team.phase(static_cast<int64_t>(panels) * row_blocks, [&](int64_t unit) {
    const int block = static_cast<int>(unit / panels), panel = static_cast<int>(unit % panels);
    const int row0 = static_cast<int>(static_cast<int64_t>(g.rows) * block / row_blocks);
    const int row1 = static_cast<int>(static_cast<int64_t>(g.rows) * (block + 1) / row_blocks);
    gemm_panel<T>(g, row0, row1 - row0, panel, partial);
  });
}

// Starts to bring this member's first panel into L2 while something small runs before the product.
template <class T>
void gemm_warm(const Gemm& g, const Team& team) {
  const int64_t panels = ceil_div(g.columns, kPanelColumns);
  const int64_t words = g.depth / T::kWord, block = words < kBlockWords ? words : kBlockWords;
  const char* first = static_cast<const char*>(g.panels) + panels * team.member() / team.members * words * 128;
  for (int64_t i = 0; i < block * 128; i += 64) __builtin_prefetch(first + i, 0, 2);
}

// Calls column(w, dwords w of 16 rows) for w < words in ascending order. Rows past `count` and dwords past `words` are
// not read; rows past `count` are zeros.
template <class OnColumn>
__attribute__((always_inline)) inline void for_columns(const char* rows, ptrdiff_t row_bytes, int count, int words,
                                                       const OnColumn& column) {
  Column columns[kColumns];
  if (count == 16) {
    int w = 0;
    for (; w + kColumns <= words; w += kColumns) {
      transpose_columns(rows + w * 4, row_bytes, columns);
#pragma GCC unroll 8
      for (int i = 0; i < kColumns; ++i) column(w + i, columns[i]);
    }
    if (w == words) return;
  }
  // An edge: by way of a copy with zeros where nothing may be read.
  for (int w = count == 16 ? words / kColumns * kColumns : 0; w < words; w += kColumns) {
    const int n = words - w < kColumns ? words - w : kColumns;
    uint32_t copy[16][kColumns] = {};
    for (int r = 0; r < count; ++r) std::memcpy(copy[r], rows + r * row_bytes + w * 4, static_cast<size_t>(n) * 4);
    transpose_columns(reinterpret_cast<const char*>(copy), sizeof(copy[0]), columns);
    for (int i = 0; i < n; ++i) column(w + i, columns[i]);
  }
}

// weight[n, k] rows into panels [panel][word][2 vectors][16 lanes]. A gate_up panel holds gate rows p*16.. in its
// first vector and up rows n/2 + p*16.. in its second. Columns past the end are zeros.
template <class T>
void pack_panels(const void* weight, ptrdiff_t row_stride, int n, int k, bool gate_up, void* out) {
  const ptrdiff_t row_bytes = row_stride * static_cast<ptrdiff_t>(sizeof(typename T::E));
  const int words = k / T::kWord, half = n / 2;
  const int panels = ceil_div(n, kPanelColumns);
  for (int panel = 0; panel < panels; ++panel) {
    for (int vec = 0; vec < 2; ++vec) {
      const int row = gate_up ? panel * 16 + vec * half : panel * kPanelColumns + vec * 16;
      const int limit = gate_up && vec == 0 ? half : n;
      const int rows = limit - row < 0 ? 0 : limit - row < 16 ? limit - row : 16;
      const char* from = static_cast<const char*>(weight) + row * row_bytes;
      uint32_t* to = static_cast<uint32_t*>(out) + static_cast<ptrdiff_t>(panel) * words * 32 + vec * 16;
      for_columns(from, row_bytes, rows, words, [&](int w, const Column& column) { column_store(to + w * 32, column); });
    }
  }
}
