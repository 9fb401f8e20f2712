// One instance of every kernel for one element type and ISA, each run as a region of its own, and the fused
// decoder layer: the same phases in one region. Included inside an ISA namespace.

#include "gemm.ipp"
#include "rowops.ipp"
#include "headmaps.ipp"
#include "draws.ipp"
#include "rotations.ipp"
#include "attention.ipp"

inline size_t at_least(size_t a, size_t b) { return a > b ? a : b; }

template <class T>
void run_gemm(Pool& pool, const Gemm& g) {
  pool.run(kGemmScratchBytes, [&](Team& team) { gemm_phase<T>(g, team); });
}

template <class T>
void run_rmsnorm(Pool& pool, const RmsNorm& a) {
  pool.run(0, [&](Team& team) { rmsnorm_phase<T>(a, team); });
}

template <class T>
void run_rope_store(Pool& pool, const RopeStore& a) {
  pool.run(0, [&](Team& team) { rope_store_phase<T>(a, team); });
}

template <class T>
void run_silu_mul(Pool& pool, const SiluMul& a) {
  pool.run(0, [&](Team& team) { silu_mul_phase<T>(a, team); });
}

template <class T>
void run_attention(Pool& pool, const Attention& a) {
  AttentionPlan plan;
  plan_attention<T>(a, pool.threads(), plan);
  std::vector<float> partials(plan.partial_floats);
  pool.run(plan.scratch_bytes, [&](Team& team) { attention_phase<T>(a, plan, partials.data(), team); });
}

// Activations of one layer, in one arena kept by the calling thread.
template <class T>
struct LayerBuffers {
  typename T::E *normed, *qkv, *q, *attended, *act;
};

template <class T>
LayerBuffers<T> layer_buffers(Arena& arena, const Layer& l, int tokens) {
  const size_t n = static_cast<size_t>(tokens), e = sizeof(typename T::E);
  const size_t q_width = static_cast<size_t>(l.heads) * l.head_dim;
  const size_t widths[5] = {static_cast<size_t>(l.width), q_width + 2 * static_cast<size_t>(l.kv_heads) * l.head_dim,
                            q_width, q_width, static_cast<size_t>(l.ffn)};
  size_t offset[6] = {0};
  for (int i = 0; i < 5; ++i) offset[i + 1] = offset[i] + (n * widths[i] * e + 127) / 128 * 128;
  char* base = arena.ensure(offset[5]);
  const auto at = [&](int i) { return reinterpret_cast<typename T::E*>(base + offset[i]); };
  return {at(0), at(1), at(2), at(3), at(4)};
}

template <class T>
void run_layer(Pool& pool, const Layer& l, const Step& step) {
  thread_local Arena arena;
  const LayerBuffers<T> buffers = layer_buffers<T>(arena, l, step.tokens);
  const RmsNorm norm1{step.residual, nullptr, l.input_norm, buffers.normed, step.tokens, l.width, l.eps};
  const RmsNorm norm2{step.residual, nullptr, l.post_norm, buffers.normed, step.tokens, l.width, l.eps};
  const auto product = [&](Gemm g, const void* x, void* out, ptrdiff_t out_stride) {
    g.x = x, g.x_stride = g.depth, g.rows = step.tokens, g.out = out, g.out_stride = out_stride;
    return g;
  };
  const Gemm qkv = product(l.qkv, buffers.normed, buffers.qkv, l.qkv.columns);
  const Gemm attn_out = product(l.attn_out, buffers.attended, step.residual, l.width);
  const Gemm gate_up = product(l.gate_up, buffers.normed, buffers.act, l.ffn);
  const Gemm down = product(l.down, buffers.act, step.residual, l.width);
  const RopeStore rope{buffers.qkv, l.cos_sin, step.positions, step.token_slots, buffers.q, l.kv,
                       step.tokens, l.heads, l.kv_heads, l.head_dim, l.interleaved, l.angles};
  const Attention attention{buffers.q, buffers.attended, l.kv, step.slots, step.q_starts, step.kv_lens,
                            step.sequences, l.heads, l.kv_heads, l.head_dim, l.scale, l.window, step.tokens};
  check(rope);
  check(attention);
  thread_local AttentionPlan plan;
  thread_local std::vector<float> partials;
  plan.units.clear(), plan.merges.clear(), plan.partial_floats = 0;
  plan_attention<T>(attention, pool.threads(), plan);
  partials.resize(plan.partial_floats);
  const AttentionPlan* const shared_plan = &plan;  // thread_local names would mean each member's own
  float* const shared_partials = partials.data();
  pool.run(at_least(plan.scratch_bytes, kGemmScratchBytes), [&](Team& team) {
    gemm_warm<T>(qkv, team);
    rmsnorm_phase<T>(norm1, team);
    gemm_phase<T>(qkv, team);
    rope_store_phase<T>(rope, team);
    attention_phase<T>(attention, *shared_plan, shared_partials, team);
    gemm_phase<T>(attn_out, team);
    gemm_warm<T>(gate_up, team);
    rmsnorm_phase<T>(norm2, team);
    gemm_phase<T>(gate_up, team);
    gemm_phase<T>(down, team);
  });
}

template <class T>
const Kernels* table(const char* isa) {
  static const Kernels kernels = {isa,           sizeof(typename T::E), pack_panels<T>,  run_gemm<T>, run_rmsnorm<T>,
                                  run_rope_store<T>, run_encode_store<T>, run_decode_heads<T>, run_draws,
                                  run_build_maps, run_attention<T>, run_silu_mul<T>, run_layer<T>};
  return &kernels;
}
