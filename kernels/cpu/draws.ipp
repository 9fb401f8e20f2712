// What is drawn from keys: words and shuffles of many labels at once, sixteen labels in the lanes of a vector.
// A label's subkey is HKDF-Expand (SHA-256, one block of output), its words are ChaCha20's key stream from block 0 with
// a nonce of 0, and a shuffle is Fisher and Yates with words that would favour a value thrown away. What
// engine/scx/keys.py does with `cryptography`, word for word. Nothing secret decides a branch or an address before the
// shuffle itself, and what stood in memory on the way is overwritten.
// Sources: RFC 5869 (HKDF), FIPS 180-4 (SHA-256), RFC 8439 (ChaCha20).

typedef uint32_t Lanes __attribute__((vector_size(64)));
constexpr int kLanes = 16;

inline Lanes all_lanes(uint32_t x) { return x - Lanes{}; }
inline Lanes turn_left(Lanes x, int n) { return (x << n) | (x >> (32 - n)); }
inline Lanes turn_right(Lanes x, int n) { return turn_left(x, 32 - n); }

alignas(64) constexpr uint32_t kShaRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};
constexpr uint32_t kShaStart[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                   0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

// One block of sixteen big-endian words into the state; the block is overwritten.
inline void sha256_block(Lanes* state, Lanes* w) {
  Lanes a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
  for (int t = 0; t < 64; ++t) {
    if (t >= 16) {
      const Lanes x = w[(t + 1) % 16], y = w[(t + 14) % 16];
      w[t % 16] += (turn_right(x, 7) ^ turn_right(x, 18) ^ (x >> 3)) + w[(t + 9) % 16] +
                   (turn_right(y, 17) ^ turn_right(y, 19) ^ (y >> 10));
    }
    const Lanes first = h + (turn_right(e, 6) ^ turn_right(e, 11) ^ turn_right(e, 25)) + ((e & f) ^ (~e & g)) +
                        kShaRounds[t] + w[t % 16];
    const Lanes second = (turn_right(a, 2) ^ turn_right(a, 13) ^ turn_right(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
  }
  state[0] += a, state[1] += b, state[2] += c, state[3] += d;
  state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

// The streams of sixteen labels.
struct KeyStreams {
  Lanes key[8];
  Lanes block[16];  // word w of label l of the block made last is block[w][l]

  ~KeyStreams() { explicit_bzero(this, sizeof *this); }
  KeyStreams(const KeyStreams&) = delete;
  KeyStreams& operator=(const KeyStreams&) = delete;

  // labels: up to sixteen of [layer, head, segment]; what is left of the lanes repeats the last.
  KeyStreams(const Draws& d, const uint32_t* labels, int count) {
    Lanes state[8], outer[8];
    begin_hmac(d.key, 0x36, state);
    begin_hmac(d.key, 0x5c, outer);
    const int length = d.info_bytes + 1, blocks = (length + 9 + 63) / 64;  // the counter 1 behind the text
    unsigned char text[kLanes][kMaxInfoBlocks * 64];
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t* label = labels + 3 * (lane < count ? lane : count - 1);
      unsigned char* const at = text[lane];
      std::memset(at, 0, static_cast<size_t>(blocks) * 64);
      std::memcpy(at, d.info, static_cast<size_t>(d.info_bytes));
      put_word(at + d.place_at, label[2]), put_word(at + d.place_at + 4, label[0]);
      put_word(at + d.place_at + 8, label[1]);
      at[d.info_bytes] = 1, at[length] = 0x80;
      put_word(at + blocks * 64 - 4, static_cast<uint32_t>(64 + length) * 8);
    }
    for (int b = 0; b < blocks; ++b) {
      for (int w = 0; w < 16; ++w)
        for (int lane = 0; lane < kLanes; ++lane) block[w][lane] = word_at(text[lane] + b * 64 + w * 4);
      sha256_block(state, block);
    }
    for (int w = 0; w < 16; ++w) block[w] = w < 8 ? state[w] : Lanes{};
    block[8] = all_lanes(0x80000000u), block[15] = all_lanes((64 + 32) * 8);
    sha256_block(outer, block);
    for (int w = 0; w < 8; ++w) {
      const Lanes x = outer[w];  // the subkey's bytes as ChaCha20 reads them
      key[w] = (x << 24) | ((x << 8) & 0xff0000u) | ((x >> 8) & 0xff00u) | (x >> 24);
    }
    explicit_bzero(state, sizeof state);
    explicit_bzero(outer, sizeof outer);
  }

  // Make one block of every stream.
  void make(uint32_t number) {
    const uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    Lanes x[16];
    for (int i = 0; i < 4; ++i) x[i] = all_lanes(constants[i]);
    for (int i = 0; i < 8; ++i) x[4 + i] = key[i];
    x[12] = all_lanes(number), x[13] = x[14] = x[15] = Lanes{};
    for (int round = 0; round < 20; round += 2) {
      quarter(x[0], x[4], x[8], x[12]), quarter(x[1], x[5], x[9], x[13]);
      quarter(x[2], x[6], x[10], x[14]), quarter(x[3], x[7], x[11], x[15]);
      quarter(x[0], x[5], x[10], x[15]), quarter(x[1], x[6], x[11], x[12]);
      quarter(x[2], x[7], x[8], x[13]), quarter(x[3], x[4], x[9], x[14]);
    }
    for (int i = 0; i < 4; ++i) block[i] = x[i] + constants[i];
    for (int i = 0; i < 8; ++i) block[4 + i] = x[4 + i] + key[i];
    for (int i = 12; i < 16; ++i) block[i] = x[i];
    block[12] += number;
  }

 private:
  static void quarter(Lanes& a, Lanes& b, Lanes& c, Lanes& d) {
    a += b, d = turn_left(d ^ a, 16), c += d, b = turn_left(b ^ c, 12);
    a += b, d = turn_left(d ^ a, 8), c += d, b = turn_left(b ^ c, 7);
  }
  static void put_word(unsigned char* at, uint32_t x) {
    for (int i = 0; i < 4; ++i) at[i] = static_cast<unsigned char>(x >> (24 - 8 * i));
  }
  static uint32_t word_at(const unsigned char* at) {
    uint32_t x;
    std::memcpy(&x, at, 4);
    return __builtin_bswap32(x);
  }
  void begin_hmac(const unsigned char* secret, unsigned char pad, Lanes* state) {
    for (int w = 0; w < 16; ++w) block[w] = all_lanes(pad * 0x01010101u ^ (w < 8 ? word_at(secret + 4 * w) : 0));
    for (int w = 0; w < 8; ++w) state[w] = all_lanes(kShaStart[w]);
    sha256_block(state, block);
  }
};

inline bool biased(uint32_t word, uint32_t count) { return word > 0xffffffffu - (0u - count) % count; }

inline void exchange(int16_t* order, int last, uint32_t word) {
  const uint32_t other = word % static_cast<uint32_t>(last + 1);
  const int16_t kept = order[other];
  order[other] = order[last];
  order[last] = kept;
}

// One lane's shuffle word by word, where one of its words was thrown away.
inline void shuffle_again(KeyStreams& streams, int lane, int size, int16_t* order) {
  for (int i = 0; i < size; ++i) order[i] = static_cast<int16_t>(i);
  uint32_t next = 0;
  for (int last = size - 1; last > 0; --last) {
    uint32_t word;
    do {
      if (next % 16 == 0) streams.make(next / 16);
      word = streams.block[next++ % 16][lane];
    } while (biased(word, static_cast<uint32_t>(last + 1)));
    exchange(order, last, word);
  }
}

inline void shuffle_lanes(KeyStreams& streams, int lanes, int size, int16_t* orders) {
  for (int lane = 0; lane < lanes; ++lane)
    for (int i = 0; i < size; ++i) orders[lane * size + i] = static_cast<int16_t>(i);
  uint32_t thrown = 0;  // a bit for each lane
  for (int step = 0; step < size - 1; ++step) {
    if (step % 16 == 0) streams.make(static_cast<uint32_t>(step / 16));
    const int last = size - 1 - step;
    const uint32_t most = 0xffffffffu - (0u - static_cast<uint32_t>(last + 1)) % static_cast<uint32_t>(last + 1);
    for (int lane = 0; lane < lanes; ++lane) {
      const uint32_t word = streams.block[step % 16][lane];
      thrown |= static_cast<uint32_t>(word > most) << lane;
      exchange(orders + lane * size, last, word);
    }
  }
  for (int lane = 0; lane < lanes; ++lane)
    if (thrown >> lane & 1) shuffle_again(streams, lane, size, orders + lane * size);
}

inline void draw_unit(const Draws& d, int first) {
  const int lanes = d.rows - first < kLanes ? d.rows - first : kLanes;
  const ptrdiff_t offset = static_cast<ptrdiff_t>(first) * d.count;
  KeyStreams streams(d, d.labels + 3 * static_cast<ptrdiff_t>(first), lanes);
  if (d.orders != nullptr) {
    shuffle_lanes(streams, lanes, d.count, d.orders + offset);
    if (d.inverses == nullptr) return;
    for (int lane = 0; lane < lanes; ++lane) {
      const ptrdiff_t row = offset + static_cast<ptrdiff_t>(lane) * d.count;
      for (int j = 0; j < d.count; ++j) d.inverses[row + d.orders[row + j]] = static_cast<int16_t>(j);
    }
    return;
  }
  for (int i = 0; i < d.count; ++i) {
    if (i % 16 == 0) streams.make(static_cast<uint32_t>(i / 16));
    for (int lane = 0; lane < lanes; ++lane) {
      const uint32_t word = streams.block[i % 16][lane];
      const int half = d.count / 2;
      if (d.words != nullptr) d.words[offset + static_cast<ptrdiff_t>(lane) * d.count + i] = word;
      else d.signs[(static_cast<ptrdiff_t>(i / half) * d.rows + first + lane) * half + i % half] = word >> 31 ? -1 : 1;
    }
  }
}

inline void run_draws(Pool& pool, const Draws& d) {
  pool.run(0, [&](Team& team) {
    team.phase(ceil_div(d.rows, kLanes), [&](int64_t unit) { draw_unit(d, static_cast<int>(unit) * kLanes); });
  });
}
