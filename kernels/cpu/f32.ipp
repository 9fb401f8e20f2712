// Floats as elements, by the lanes of either instruction set. A packed "word" is what one multiply-accumulate lane
// consumes: one float here, two bf16 in Bf16.
struct F32 {
  using E = float;
  using W = V;
  static constexpr int kWord = 1;  // elements a word
  static V load(const E* p) { return vload(p); }
  static V load_part(const E* p, int n) { return vload_part(p, n); }
  static void store(E* p, V a) { vstore(p, a); }
  static void store_part(E* p, V a, int n) { vstore_part(p, a, n); }
  static V round(V a) { return a; }
  static W word_row(const char* p) { return vload(reinterpret_cast<const float*>(p)); }
  static W word_all(const char* p) { return vset1(*reinterpret_cast<const float*>(p)); }
  static W word_of(Column a) { return as_lanes(a); }
  static V mac(V acc, W a, W b) { return vfma(a, b, acc); }
  // 16 elements of one V row (kWord rows in Bf16) as words.
  static W pair_rows(const E* row0, const E*) { return vload(row0); }
  static void word_store(char* p, W a) { vstore(reinterpret_cast<float*>(p), a); }
};
