// What a kernel is told: plain structures of addresses, counts and strides, and the table an ISA fills.
// It knows nothing of Python; strides are in elements unless the name says bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "pool.hpp"

namespace tessera {

constexpr int kPanelColumns = 32;  // output columns of one packed weight panel: two vectors
constexpr int kKeyBlock = 64;      // keys of one softmax block, aligned at absolute positions
constexpr int kKeySplit = 1024;    // keys of one partial result; combined in ascending order

enum class Epilogue : int {
  kStore = 0,     // out = acc (+ bias), in the element type
  kFloat = 1,     // out = acc (+ bias), fp32
  kResidual = 2,  // out = out + round(acc (+ bias)), in place
  kSiluMul = 3,   // out = silu(gate) * up; panels hold 16 gate and 16 up columns
};

// y[M, N] = x[M, K] @ weight[N, K]^T from packed panels.
struct Gemm {
  const void* x = nullptr;
  ptrdiff_t x_stride = 0;
  int rows = 0;  // M
  const void* panels = nullptr;
  int columns = 0;  // N as stored in panels, without padding; for kSiluMul gate + up
  int depth = 0;    // K, a multiple of the word
  const float* bias = nullptr;  // [panels * 32], in panel order, or null
  Epilogue epilogue = Epilogue::kStore;
  void* out = nullptr;
  ptrdiff_t out_stride = 0;
};

struct RmsNorm {
  const void* x = nullptr;  // [N, C]; the addend when residual is given
  void* residual = nullptr;  // [N, C] or null; updated in place
  const void* weight = nullptr;
  void* out = nullptr;
  int rows = 0, width = 0;
  float eps = 0;
};

struct KvView {
  void* k = nullptr;
  void* v = nullptr;
  ptrdiff_t slot_stride = 0, token_stride = 0, head_stride = 0;
  int slots = 0, max_tokens = 0;
};

struct RopeStore {
  const void* qkv = nullptr;  // [N, (H + 2G) * D]
  const float* cos_sin = nullptr;  // [P, 2, D / 2]
  const int32_t* positions = nullptr;
  const int32_t* slots = nullptr;
  void* q = nullptr;  // [N, H, D]
  KvView kv;
  int tokens = 0, heads = 0, kv_heads = 0, head_dim = 0;
  bool interleaved = false;
  int angles = 0;  // P, the positions cos_sin covers
};

// Maps of heads by table row and KV head: int16 orders [T, G, D] (result j is entry order[j], each in 0..D - 1, not
// checked here) or float matrices [T, G, D, D].
struct HeadMaps {
  const int32_t* tables = nullptr;  // [N], the table row of each token
  int rows = 0, groups = 0;         // T, G
  bool matrices = false;
  ptrdiff_t stride = 0;  // entries from a table row to the next
};

struct EncodeStore {
  RopeStore rope;
  bool wide = false;  // qkv is float, whatever the type of q and the slabs
  HeadMaps maps;
  const void* q_map = nullptr;
  const void* k_map = nullptr;
  const void* v_map = nullptr;
  ptrdiff_t q_stride = 0;  // elements from a token's queries to the next one's
};

struct DecodeHeads {
  const void* x = nullptr;  // [N, H * D]
  void* out = nullptr;
  HeadMaps maps;
  const void* out_map = nullptr;
  int tokens = 0, heads = 0, head_dim = 0;
};

// Words or shuffles of R labels under one key; see draws.ipp.
struct Draws {
  const unsigned char* key = nullptr;   // 32 bytes
  const unsigned char* info = nullptr;  // what HKDF expands, with the place of a label's segment, layer and head in it
  int info_bytes = 0, place_at = 0;
  const uint32_t* labels = nullptr;  // [R, 3]: layer, head, segment
  int rows = 0, count = 0;           // R; words of a label, or entries of its shuffle
  int16_t* orders = nullptr;         // [R, count], or null: then words are written
  int16_t* inverses = nullptr;       // [R, count] or null
  uint32_t* words = nullptr;         // [R, count], or null
  int16_t* signs = nullptr;          // 1 or -1 by each word's first bit: [2, R, count / 2], the halves of each label
};
constexpr int kMaxInfoBlocks = 8;

// Matrices of R labels out of what was drawn for them; see rotations.ipp.
struct BuildMaps {
  const int16_t* drawn = nullptr;  // [8, R, D]: for each of two purposes two orders and two rows of signs;
                                   // stretched [20, R, D]: two rotations each and the halves of D floats
  float* out = nullptr;            // [3, R, D, D]: qk, v, its inverse; stretched [4, R, D, D]: q, k, v, out
  int labels = 0, dim = 0;         // R, D: a power of two, 16..256
  bool stretched = false;
};

struct Attention {
  const void* q = nullptr;  // [N, H, D]
  void* out = nullptr;      // [N, H * D]
  KvView kv;
  const int32_t* slots = nullptr;
  const int32_t* q_starts = nullptr;
  const int32_t* kv_lens = nullptr;
  int sequences = 0, heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 0;
  int window = 0;  // keys a query sees, itself included; 0 = all
  int tokens = 0;  // N
};

struct AttentionUnit {
  int sequence, token0, tokens, head0, heads, split0, splits, partial;  // partial < 0: whole result
};

struct SiluMul {
  const void* x = nullptr;  // [N, 2F]
  void* out = nullptr;      // [N, F]
  int rows = 0, width = 0;  // F
};

struct Embed {
  const void* table = nullptr;  // [V, C]
  const void* ids = nullptr;
  void* out = nullptr;
  int rows = 0;
  size_t row_bytes = 0;
  bool wide_ids = false;  // int64 rather than int32
  int64_t vocab = 0;
};

struct Argmax {
  const float* logits = nullptr;
  ptrdiff_t stride = 0;
  int64_t* out = nullptr;
  int rows = 0, width = 0;
};

// The fixed part of one decoder layer; `run_layer` adds the step's part.
struct Layer {
  const void* input_norm = nullptr;
  const void* post_norm = nullptr;
  Gemm qkv, attn_out, gate_up, down;
  const float* cos_sin = nullptr;
  KvView kv;
  int heads = 0, kv_heads = 0, head_dim = 0, width = 0, ffn = 0;
  float eps = 0, scale = 0;
  int window = 0;
  bool interleaved = false;
  int angles = 0;
};

struct Step {
  void* residual = nullptr;  // [N, C], updated in place
  int tokens = 0;
  const int32_t* positions = nullptr;
  const int32_t* token_slots = nullptr;
  const int32_t* slots = nullptr;
  const int32_t* q_starts = nullptr;
  const int32_t* kv_lens = nullptr;
  int sequences = 0;
};

// One element type on one ISA.
struct Kernels {
  const char* isa;
  size_t element_bytes;
  void (*pack)(const void* weight, ptrdiff_t row_stride, int n, int k, bool gate_up, void* panels);
  void (*gemm)(Pool&, const Gemm&);
  void (*rmsnorm)(Pool&, const RmsNorm&);
  void (*rope_store)(Pool&, const RopeStore&);
  void (*encode_store)(Pool&, const EncodeStore&);
  void (*decode_heads)(Pool&, const DecodeHeads&);
  void (*draws)(Pool&, const Draws&);
  void (*build_maps)(Pool&, const BuildMaps&);
  void (*attention)(Pool&, const Attention&);
  void (*silu_mul)(Pool&, const SiluMul&);
  void (*layer)(Pool&, const Layer&, const Step&);
};

const Kernels* bf16_avx512();  // null when this CPU or compiler lacks the instructions
const Kernels* bf16_avx2();
const Kernels* f32_avx512();
const Kernels* f32_avx2();

// Work that a stream of a GPU calls for when its turn comes: by a Bell, or as a host function (cuLaunchHostFunc).
struct Job {
  enum class Kind { kEncode, kDecode, kCopy };
  Kind kind = Kind::kCopy;
  const Kernels* kernels = nullptr;
  EncodeStore encode;
  DecodeHeads decode;
  void* to = nullptr;
  const void* from = nullptr;  // null: zeros are written
  size_t nbytes = 0;
  bool once = true;  // else a graph repeats it, and it is never freed
};
void do_job(const Job& job, Pool& pool);  // noexcept in effect: it allocates nothing that the first run did not
void run_job(void* job);                  // a Job* as a host function has it; freed where it runs once

// Indices are checked before a kernel follows them; each throws std::out_of_range with value and range.
void check(const RopeStore&);
void check(const HeadMaps&, int tokens);
void check(const Draws&);
void check(const BuildMaps&);
void check(const Attention&);
void check(const Embed&);

void embed(Pool&, const Embed&);
void argmax(Pool&, const Argmax&);

}  // namespace tessera
