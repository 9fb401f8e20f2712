// Python's door: addresses and counts in, nothing out but bytes written. It knows no tensor type; the launchers in
// kernels/*.py check shapes, dtypes and strides before they hand over addresses. The GIL is released inside.
#include <nanobind/nanobind.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "bell.hpp"
#include "ops.hpp"

namespace nb = nanobind;
using namespace tessera;

namespace {

using Address = uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }
template <class T>
const T* of(Address address) {
  return reinterpret_cast<const T*>(address);
}

// The fastest kernels that this CPU runs for elements of this size: 2 = bf16, 4 = fp32. narrow: without AVX-512.
const Kernels* kernels_of(int element_bytes, bool narrow) {
  if (element_bytes != 2 && element_bytes != 4) return nullptr;
  const bool half = element_bytes == 2;
  const Kernels* wide = narrow ? nullptr : half ? bf16_avx512() : f32_avx512();
  return wide != nullptr ? wide : half ? bf16_avx2() : f32_avx2();
}

// One element type's operations; Python keeps one instance a dtype.
class Ops {
 public:
  Ops(int element_bytes, bool narrow) : kernels_(kernels_of(element_bytes, narrow)) {
    if (kernels_ == nullptr)
      throw std::invalid_argument("no kernel for elements of " + std::to_string(element_bytes) + " bytes here");
  }
  const char* isa() const { return kernels_->isa; }

  void pack(Address weight, ptrdiff_t row_stride, int n, int k, bool gate_up, Address panels) const {
    nb::gil_scoped_release release;
    kernels_->pack(at(weight), row_stride, n, k, gate_up, at(panels));
  }

  void gemm(Address x, ptrdiff_t x_stride, int rows, Address panels, int columns, int depth, Address bias,
            int epilogue, Address out, ptrdiff_t out_stride) const {
    nb::gil_scoped_release release;
    kernels_->gemm(*current_pool(), {at(x), x_stride, rows, at(panels), columns, depth, of<float>(bias),
                                     static_cast<Epilogue>(epilogue), at(out), out_stride});
  }

  void rmsnorm(Address x, Address residual, Address weight, Address out, int rows, int width, float eps) const {
    nb::gil_scoped_release release;
    kernels_->rmsnorm(*current_pool(), {at(x), at(residual), at(weight), at(out), rows, width, eps});
  }

  void rope_store(Address qkv, Address cos_sin, Address positions, Address slots, Address q, const KvView& kv,
                  int tokens, int heads, int kv_heads, int head_dim, bool interleaved, int angles) const {
    const RopeStore a{at(qkv), of<float>(cos_sin), of<int32_t>(positions), of<int32_t>(slots), at(q), kv,
                      tokens, heads, kv_heads, head_dim, interleaved, angles};
    check(a);
    nb::gil_scoped_release release;
    kernels_->rope_store(*current_pool(), a);
  }

  void encode_store(Address qkv, Address cos_sin, Address positions, Address slots, Address tables, Address q,
                    const KvView& kv, Address q_map, Address k_map, Address v_map, bool matrices, int rows,
                    ptrdiff_t map_stride, int tokens, int heads, int kv_heads, int head_dim, bool interleaved,
                    int angles, bool wide) const {
    const EncodeStore e{{at(qkv), of<float>(cos_sin), of<int32_t>(positions), of<int32_t>(slots), at(q), kv,
                         tokens, heads, kv_heads, head_dim, interleaved, angles},
                        wide, {of<int32_t>(tables), rows, kv_heads, matrices, map_stride}, at(q_map), at(k_map),
                        at(v_map), heads * head_dim};
    check(e.rope);
    check(e.maps, tokens);
    nb::gil_scoped_release release;
    kernels_->encode_store(*current_pool(), e);
  }

  void decode_heads(Address x, Address out, Address tables, Address out_map, bool matrices, int rows,
                    ptrdiff_t map_stride, int tokens, int heads, int kv_heads, int head_dim) const {
    const DecodeHeads a{at(x), at(out), {of<int32_t>(tables), rows, kv_heads, matrices, map_stride}, at(out_map),
                        tokens, heads, head_dim};
    check(a.maps, tokens);
    nb::gil_scoped_release release;
    kernels_->decode_heads(*current_pool(), a);
  }

  // Rows [N, (H + 2G) * D] are encoded into rows of the same order; those of no table row are left out.
  Address encode_job(Address qkv, Address out, Address cos_sin, Address positions, Address tables, Address own,
                     Address q_map, Address k_map, Address v_map, bool matrices, int rows, ptrdiff_t map_stride,
                     int tokens, int heads, int kv_heads, int head_dim, int angles, bool wide, bool once) const {
    const ptrdiff_t row = (heads + 2 * kv_heads) * head_dim, e = static_cast<ptrdiff_t>(kernels_->element_bytes);
    const Address keys = out + static_cast<Address>(heads * head_dim * e);
    const KvView kv{at(keys), at(keys + static_cast<Address>(kv_heads * head_dim * e)), row, 0, head_dim, tokens, angles};
    auto job = std::make_unique<Job>();
    job->kind = Job::Kind::kEncode, job->kernels = kernels_, job->once = once;
    job->encode = {{at(qkv), of<float>(cos_sin), of<int32_t>(positions), of<int32_t>(own), at(out), kv, tokens, heads,
                    kv_heads, head_dim, false, angles},
                   wide, {of<int32_t>(tables), rows, kv_heads, matrices, map_stride}, at(q_map), at(k_map), at(v_map),
                   row};
    return reinterpret_cast<Address>(job.release());
  }

  Address decode_job(Address x, Address out, Address tables, Address out_map, bool matrices, int rows,
                     ptrdiff_t map_stride, int tokens, int heads, int kv_heads, int head_dim, bool once) const {
    auto job = std::make_unique<Job>();
    job->kind = Job::Kind::kDecode, job->kernels = kernels_, job->once = once;
    job->decode = {at(x), at(out), {of<int32_t>(tables), rows, kv_heads, matrices, map_stride}, at(out_map),
                   tokens, heads, head_dim};
    return reinterpret_cast<Address>(job.release());
  }

  void draws(Address key, Address info, int info_bytes, int place_at, Address labels, int rows, int count,
             Address orders, Address inverses, Address words, Address signs) const {
    const Draws d{of<unsigned char>(key), of<unsigned char>(info), info_bytes, place_at, of<uint32_t>(labels), rows,
                  count, static_cast<int16_t*>(at(orders)), static_cast<int16_t*>(at(inverses)),
                  static_cast<uint32_t*>(at(words)), static_cast<int16_t*>(at(signs))};
    check(d);
    nb::gil_scoped_release release;
    kernels_->draws(*current_pool(), d);
  }

  void build_maps(Address drawn, Address out, int labels, int dim, bool stretched) const {
    const BuildMaps b{of<int16_t>(drawn), static_cast<float*>(at(out)), labels, dim, stretched};
    check(b);
    nb::gil_scoped_release release;
    kernels_->build_maps(*current_pool(), b);
  }

  void attention(Address q, Address out, const KvView& kv, Address slots, Address q_starts, Address kv_lens,
                 int sequences, int heads, int kv_heads, int head_dim, float scale, int window, int tokens) const {
    const Attention a{at(q), at(out), kv, of<int32_t>(slots), of<int32_t>(q_starts), of<int32_t>(kv_lens),
                               sequences, heads, kv_heads, head_dim, scale, window, tokens};
    check(a);
    nb::gil_scoped_release release;
    kernels_->attention(*current_pool(), a);
  }

  void silu_mul(Address x, Address out, int rows, int width) const {
    nb::gil_scoped_release release;
    kernels_->silu_mul(*current_pool(), {at(x), at(out), rows, width});
  }

  void layer(const Layer& layer, Address residual, int tokens, Address positions, Address token_slots, Address slots,
             Address q_starts, Address kv_lens, int sequences) const {
    nb::gil_scoped_release release;
    kernels_->layer(*current_pool(), layer,
                    {at(residual), tokens, of<int32_t>(positions), of<int32_t>(token_slots), of<int32_t>(slots),
                     of<int32_t>(q_starts), of<int32_t>(kv_lens), sequences});
  }

 private:
  const Kernels* kernels_;
};

Gemm layer_gemm(Address panels, Address bias, int columns, int depth, Epilogue epilogue) {
  Gemm g;
  g.panels = at(panels), g.bias = of<float>(bias), g.columns = columns, g.depth = depth, g.epilogue = epilogue;
  return g;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("has_bf16", [] { return kernels_of(2, false) != nullptr; });
  m.def("has_f32", [] { return kernels_of(4, false) != nullptr; });
  m.def("set_threads", [](int threads) {
    if (threads < 1 || threads > 1024)
      throw std::invalid_argument("threads=" + std::to_string(threads) + " is outside 1..1024");
    nb::gil_scoped_release release;
    set_threads(threads);
  });
  m.def("threads", [] { return current_pool()->threads(); });
  m.def("embed", [](Address table, Address ids, Address out, int rows, size_t row_bytes, bool wide_ids,
                    int64_t vocab) {
    const Embed a{at(table), at(ids), at(out), rows, row_bytes, wide_ids, vocab};
    check(a);
    nb::gil_scoped_release release;
    embed(*current_pool(), a);
  });
  m.def("argmax", [](Address logits, ptrdiff_t stride, Address out, int rows, int width) {
    nb::gil_scoped_release release;
    argmax(*current_pool(), {of<float>(logits), stride, static_cast<int64_t*>(at(out)), rows, width});
  });
  m.def("copy_job", [](Address to, Address from, size_t nbytes) {
    auto job = std::make_unique<Job>();
    job->to = at(to), job->from = at(from), job->nbytes = nbytes;
    return reinterpret_cast<Address>(job.release());
  });
  nb::class_<Bell>(m, "Bell")
      .def("__init__", [](Bell* self, Address word, int threads) {
        if (word == 0 || threads < 1 || threads > 1024)
          throw std::invalid_argument("threads=" + std::to_string(threads) + " is outside 1..1024, or no word");
        new (self) Bell(static_cast<int32_t*>(at(word)), threads);
      })
      .def("add", [](Bell& self, Address job) { return self.add(std::unique_ptr<Job>(static_cast<Job*>(at(job)))); })
      .def("stop", [](Bell& self) {
        nb::gil_scoped_release release;
        self.stop();
      });
  m.def("job_function", [] { return reinterpret_cast<Address>(&run_job); });
  m.def("run_job", [](Address job) {
    nb::gil_scoped_release release;
    run_job(at(job));
  });
  nb::class_<KvView>(m, "KvView")
      .def("__init__", [](KvView* self, Address k, Address v, ptrdiff_t slot_stride, ptrdiff_t token_stride,
                          ptrdiff_t head_stride, int slots, int max_tokens) {
        new (self) KvView{at(k), at(v), slot_stride, token_stride, head_stride, slots, max_tokens};
      });
  nb::class_<Layer>(m, "Layer")
      .def("__init__",
           [](Layer* self, Address input_norm, Address post_norm, Address cos_sin, const KvView& kv, int heads,
              int kv_heads, int head_dim, int width, int ffn, float eps, float scale, int window, bool interleaved,
              int angles) {
             new (self) Layer();
             self->input_norm = at(input_norm), self->post_norm = at(post_norm);
             self->cos_sin = of<float>(cos_sin), self->kv = kv;
             self->heads = heads, self->kv_heads = kv_heads, self->head_dim = head_dim;
             self->width = width, self->ffn = ffn, self->eps = eps, self->scale = scale;
             self->window = window, self->interleaved = interleaved, self->angles = angles;
           })
      .def("set_products", [](Layer& self, Address qkv, Address qkv_bias, Address attn_out, Address attn_out_bias,
                              Address gate_up, Address gate_up_bias, Address down, Address down_bias) {
        const int q_width = self.heads * self.head_dim, kv_width = self.kv_heads * self.head_dim;
        self.qkv = layer_gemm(qkv, qkv_bias, q_width + 2 * kv_width, self.width, Epilogue::kStore);
        self.attn_out = layer_gemm(attn_out, attn_out_bias, self.width, q_width, Epilogue::kResidual);
        self.gate_up = layer_gemm(gate_up, gate_up_bias, 2 * self.ffn, self.width, Epilogue::kSiluMul);
        self.down = layer_gemm(down, down_bias, self.width, self.ffn, Epilogue::kResidual);
      });
  nb::class_<Ops>(m, "Ops")
      .def(nb::init<int, bool>())
      .def_prop_ro("isa", &Ops::isa)
      .def("pack", &Ops::pack)
      .def("gemm", &Ops::gemm)
      .def("rmsnorm", &Ops::rmsnorm)
      .def("rope_store", &Ops::rope_store)
      .def("encode_store", &Ops::encode_store)
      .def("decode_heads", &Ops::decode_heads)
      .def("encode_job", &Ops::encode_job)
      .def("decode_job", &Ops::decode_job)
      .def("draws", &Ops::draws)
      .def("build_maps", &Ops::build_maps)
      .def("attention", &Ops::attention)
      .def("silu_mul", &Ops::silu_mul)
      .def("layer", &Ops::layer);
}
