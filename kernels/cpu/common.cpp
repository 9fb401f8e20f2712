// Operations that need no particular instruction set: index checks, row gather and argmax.
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.hpp"

namespace tessera {
namespace {

[[noreturn]] void refuse(const char* name, int64_t index, int64_t value, int64_t low, int64_t high) {
  throw std::out_of_range(std::string(name) + "[" + std::to_string(index) + "]=" + std::to_string(value) +
                          " is outside " + std::to_string(low) + ".." + std::to_string(high));
}

inline void within(const char* name, int64_t index, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) refuse(name, index, value, low, high);
}

int64_t id_at(const Embed& a, int row) {
  return a.wide_ids ? static_cast<const int64_t*>(a.ids)[row] : static_cast<const int32_t*>(a.ids)[row];
}

}  // namespace

void check(const RopeStore& a) {
  const int positions = a.angles < a.kv.max_tokens ? a.angles : a.kv.max_tokens;
  for (int t = 0; t < a.tokens; ++t) {
    within("positions", t, a.positions[t], 0, positions - 1);
    within("slots_of_token", t, a.slots[t], 0, a.kv.slots - 1);
  }
}

void check(const HeadMaps& a, int tokens) {
  for (int t = 0; t < tokens; ++t) within("tables", t, a.tables[t], 0, a.rows - 1);
}

void check(const Draws& d) {
  within("info_bytes", 0, d.info_bytes, d.place_at + 12, kMaxInfoBlocks * 64 - 10);
  within("count", 0, d.count, d.orders != nullptr ? 2 : 1, d.orders != nullptr ? 1 << 15 : 1 << 28);
}

void check(const BuildMaps& b) {
  within("dim", 0, b.dim, 16, 256);
  within("dim & (dim - 1)", 0, b.dim & (b.dim - 1), 0, 0);
  const int rows = b.stretched ? 20 : 8;
  for (int row = 0; row < rows; ++row) {
    if (row % (rows / 2) % 4 >= 2 || row % (rows / 2) >= 8) continue;  // signs and halves of floats, not orders
    const int64_t count = static_cast<int64_t>(b.labels) * b.dim;
    for (int64_t i = 0; i < count; ++i) within("order", i, b.drawn[row * count + i], 0, b.dim - 1);
  }
}

void check(const Attention& a) {
  within("q_starts", 0, a.q_starts[0], 0, 0);
  within("q_starts", a.sequences, a.q_starts[a.sequences], a.tokens, a.tokens);
  for (int b = 0; b < a.sequences; ++b) {
    within("q_starts", b + 1, a.q_starts[b + 1], a.q_starts[b], a.tokens);
    within("kv_lens", b, a.kv_lens[b], a.q_starts[b + 1] - a.q_starts[b], a.kv.max_tokens);
    within("slots", b, a.slots[b], 0, a.kv.slots - 1);
  }
}

void check(const Embed& a) {
  for (int row = 0; row < a.rows; ++row) within("ids", row, id_at(a, row), 0, a.vocab - 1);
}

namespace {

// In pieces of 1 MiB, shared where there are several: one thread's memcpy is a fraction of what memory gives.
void copy_bytes(const Job& job, Pool& pool) {
  constexpr size_t kPiece = size_t{1} << 20;
  const auto piece = [&](int64_t unit) {
    const size_t first = static_cast<size_t>(unit) * kPiece;
    const size_t count = job.nbytes - first < kPiece ? job.nbytes - first : kPiece;
    char* const to = static_cast<char*>(job.to) + first;
    if (job.from != nullptr) std::memcpy(to, static_cast<const char*>(job.from) + first, count);
    else std::memset(to, 0, count);
  };
  const int64_t pieces = static_cast<int64_t>((job.nbytes + kPiece - 1) / kPiece);
  if (pieces == 1) piece(0);
  else pool.run(0, [&](Team& team) { team.phase(pieces, piece); });
}

}  // namespace

void do_job(const Job& job, Pool& pool) {
  switch (job.kind) {
    case Job::Kind::kEncode: job.kernels->encode_store(pool, job.encode); break;
    case Job::Kind::kDecode: job.kernels->decode_heads(pool, job.decode); break;
    case Job::Kind::kCopy: copy_bytes(job, pool);
  }
}

void run_job(void* given) {
  Job* const job = static_cast<Job*>(given);
  do_job(*job, *current_pool());
  if (job->once) delete job;
}

void embed(Pool& pool, const Embed& a) {
  constexpr int kRows = 32;
  pool.run(0, [&](Team& team) {
    team.phase((a.rows + kRows - 1) / kRows, [&](int64_t unit) {
      const int first = static_cast<int>(unit) * kRows;
      for (int row = first; row < first + kRows && row < a.rows; ++row) {
        std::memcpy(static_cast<char*>(a.out) + static_cast<size_t>(row) * a.row_bytes,
                    static_cast<const char*>(a.table) + static_cast<size_t>(id_at(a, row)) * a.row_bytes,
                    a.row_bytes);
      }
    });
  });
}

namespace {

// The lowest index of the largest value; a NaN counts as largest, as in torch.
int64_t argmax_row(const float* x, int width) {
  constexpr int kLanes = 32;
  float best[kLanes];
  for (int j = 0; j < kLanes; ++j) best[j] = -__builtin_inff();
  int nan = 0, i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
      nan |= x[i + j] != x[i + j];
    }
  }
  float top = -__builtin_inff();
  for (int j = 0; j < kLanes; ++j) top = best[j] > top ? best[j] : top;
  for (; i < width; ++i) {
    top = x[i] > top ? x[i] : top;
    nan |= x[i] != x[i];
  }
  for (int k = 0; k < width; ++k)
    if (nan ? x[k] != x[k] : x[k] == top) return k;
  return 0;
}

}  // namespace

void argmax(Pool& pool, const Argmax& a) {
  pool.run(0, [&](Team& team) {
    team.phase(a.rows, [&](int64_t row) { a.out[row] = argmax_row(a.logits + row * a.stride, a.width); });
  });
}

}  // namespace tessera
