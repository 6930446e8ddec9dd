// Attention with matrix tiles: one query a row, scores of up to kKeyChunk keys at once in memory, because tiles can be
// added to only there. Keys and values are packed as the right sides of q k^T and p v.

constexpr int kScoreStride = kKeyChunk + 16, kProbabilityStride = kKeyChunk + 32;  // elements; not a power of two

TR_INLINE void pack_keys(const bf16* k, int D, int rows, bf16* panel) {
    for (int c = 0; c < D; c += 32)
        for (int half = 0; half < 2; ++half) {
            F m[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j)
                m[j] = 16 * half + j < rows ? _mm512_loadu_ps(k + (16 * half + j) * D + c) : set(0.0f);
            transpose(m);
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) _mm512_storeu_ps(panel + c * kPanel + half * 512 + j * 32, m[j]);
        }
}

TR_INLINE void pack_values(const bf16* v, int stride, int rows, bf16* panel) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    const __m512i left = _mm512_load_si512(order), right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
    for (int j = 0; j < kTile; j += 2) {
        const __m512i even = j < rows ? _mm512_loadu_si512(v + j * stride) : _mm512_setzero_si512();
        const __m512i odd = j + 1 < rows ? _mm512_loadu_si512(v + (j + 1) * stride) : _mm512_setzero_si512();
        _mm512_storeu_si512(panel + j * 16, _mm512_permutex2var_epi16(even, left, odd));
        _mm512_storeu_si512(panel + 512 + j * 16, _mm512_permutex2var_epi16(even, right, odd));
    }
}

TR_INLINE F key_squares(const bf16* panel, int D) {
    F largest = set(0.0f);
    for (int half = 0; half < 2; ++half) {
        F sum = set(0.0f);
        for (int c = 0; c < D; c += 2) {
            const F pair = _mm512_loadu_ps(panel + c / 32 * 1024 + half * 512 + c % 32 * 16);
            dot_bf16(sum, pair, pair);
        }
        largest = vmax(largest, sum);
    }
    return largest;
}

// Keys as panels of 32 (depth D) and the largest |k|; values as panels of 32 columns (depth = keys). Rows behind the
// pair's end are zero.
struct Memory {
    bf16 *keys, *values;
    int padded;     // n rounded up to 32
    float longest;  // max |k|
};

Memory pack_memory(const AttendJob& job, Scratch& s) {
    const int D = job.D, padded = round_up(job.n, kTile);
    Memory m{s.keys.as<bf16>(), s.values.as<bf16>(), padded, 0.0f};
    const bf16 *k = static_cast<const bf16*>(job.k), *v = static_cast<const bf16*>(job.v);
    F longest = set(0.0f);
    for (int j = 0; j < padded; j += kTile) {
        bf16* panel = m.keys + static_cast<size_t>(j) * D;
        const int rows = at_most(kTile, job.n - j);
        pack_keys(k + static_cast<size_t>(j) * D, D, rows, panel);
        longest = vmax(longest, key_squares(panel, D));
        for (int c = 0; c < D; c += kPanel)
            pack_values(v + static_cast<size_t>(j) * D + c, D, rows, m.values + static_cast<size_t>(c) * padded + static_cast<size_t>(j) * kPanel);
    }
    m.longest = __builtin_sqrtf(hmax(longest));
    return m;
}

// Scores, probabilities, and the running sums of one tile of up to 32 queries.
struct QueryTile {
    static constexpr int kStep = kTile;
    const AttendJob& job;
    const Memory& memory;
    const bf16* q;
    int first, rows;
    const float* bias;  // bias[j - i] = -slope |i - j|
    float* scores;
    bf16* probabilities;
    float* context;     // (32, D): sum of p v
    bool online;        // subtract a running maximum
    float top[kTile], mass[kTile];  // log2 offset and sum of 2^(score - top) of each row

    // Adds keys [lo, hi), at most kKeyChunk of them; lo a multiple of 32.
    void visit(int lo, int hi, bool fresh) {
        const int real = hi - lo, padded = round_up(real, kTile);
        for (int j = lo; j < hi; j += kPanel)
            gemm(q, job.D, rows, reinterpret_cast<const std::byte*>(memory.keys + static_cast<size_t>(j) * job.D), job.D,
                 scores + (j - lo), kScoreStride, false, Nothing{});
        for (int r = 0; r < rows; ++r) {
            const float* row_bias = bias + (lo - first - r);
            if (online) shift(r, row_bias, real, fresh);
            const float sum = online ? exponentiate<true>(r, row_bias, real, padded) : exponentiate<false>(r, row_bias, real, padded);
            mass[r] = fresh ? sum : mass[r] + sum;
        }
        for (int c = 0; c < job.D; c += kPanel) {
            const bf16* panel = memory.values + static_cast<size_t>(c) * memory.padded + static_cast<size_t>(lo) * kPanel;
            gemm(probabilities, kProbabilityStride, rows, reinterpret_cast<const std::byte*>(panel), padded, context + c, job.D, !fresh, Nothing{});
        }
    }

    // Scores of one row to probabilities; returns their sum. Without `shifted` the row's offset is 0.
    template <bool shifted>
    TR_INLINE float exponentiate(int r, const float* row_bias, int real, int padded) {
        const float* row = scores + r * kScoreStride;
        bf16* to = probabilities + r * kProbabilityStride;
        const F offset = set(top[r]);
        const auto probability = [&](int j) {
            const F score = add(load(row + j), load(row_bias + j));
            return exp2<false>(shifted ? sub(score, offset) : score);
        };
        F sum = set(0.0f), other = sum;
        int j = 0;
        for (; j + 2 * W <= real; j += 2 * W) {
            const F p = probability(j), q = probability(j + W);
            sum = add(sum, p), other = add(other, q);
            store2(to + j, p, q);
        }
        for (; j < real; j += W) {
            const F p = keep_first(probability(j), real - j, 0.0f);
            sum = add(sum, p);
            store(to + j, p);
        }
        for (; j < padded; j += W) store(to + j, set(0.0f));
        return hsum(add(sum, other));
    }

    // Raises the row's offset to its largest score so far.
    void shift(int r, const float* row_bias, int real, bool fresh) {
        const float* row = scores + r * kScoreStride;
        F largest = set(-3.0e38f);
        int j = 0;
        for (; j + W <= real; j += W) largest = vmax(largest, add(load(row + j), load(row_bias + j)));
        if (j < real) largest = vmax(largest, keep_first(add(load(row + j), load(row_bias + j)), real - j, -3.0e38f));
        const float found = hmax(largest);
        if (fresh) {
            top[r] = found;
        } else if (found > top[r]) {
            float factor[W];
            store(factor, exp2<true>(set(top[r] - found)));
            top[r] = found;
            mass[r] *= factor[0];
            for (int c = 0; c < job.D; c += W) store(context + r * job.D + c, mul(load(context + r * job.D + c), set(factor[0])));
        }
    }

    // An upper bound of |q| over the tile's rows: the norm of the element-wise largest.
    float query_bound() const {
        F total = set(0.0f);
        for (int c = 0; c < job.D; c += W) {
            F largest = set(0.0f);
            for (int r = 0; r < rows; ++r) largest = vmax(largest, vabs(load(q + r * job.D + c)));
            total = fma(largest, largest, total);
        }
        return __builtin_sqrtf(hsum(total));
    }

    float score_bound(int r) const {
        F total = set(0.0f);
        for (int c = 0; c < job.D; c += W) total = fma(load(q + r * job.D + c), load(q + r * job.D + c), total);
        return __builtin_sqrtf(hsum(total)) * memory.longest * 1.001f + 0.01f;
    }
};

// ALiBi attention of one head, queries [from, to).
template <class E, bool exact>
void attend(const AttendJob& job, Scratch& s) {
    const Lap lap(s, kAttention);
    const Memory memory = pack_memory(job, s);
    const float* bias = fill_bias(s.bias.as<float>(), job.slope, memory.padded + kTile);
    for (int first = job.from; first < job.to; first += kTile) {
        QueryTile t{job, memory, static_cast<const bf16*>(job.q) + static_cast<size_t>(first) * job.D, first, at_most(kTile, job.to - first),
                    bias, s.scores.as<float>(), s.probabilities.as<bf16>(), s.context.as<float>(), false, {}, {}};
        t.online = !(t.query_bound() * memory.longest <= kNoMaxBelow);
        walk(t, kKeyChunk, kTile);
        for (int r = 0; r < t.rows; ++r) {
            bf16* out = static_cast<bf16*>(job.out) + static_cast<size_t>(first + r) * job.out_stride;
            const F inverse = set(1.0f / t.mass[r]);
            for (int c = 0; c < job.D; c += W) store(out + c, mul(load(t.context + r * job.D + c), inverse));
        }
    }
}
