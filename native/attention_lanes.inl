// Attention with one query in each lane: scores, probabilities and sums of 2 W queries are pairs of vectors, so that no
// sum runs across lanes, and a block of scores becomes probabilities before it leaves the registers. Keys are read in
// place, word by word; queries, probabilities (bf16: two keys in a word) and context are transposed:
//   queries        panel of D / word rows x 2 W of 32 columns (blocks.inl)
//   probabilities  panel of keys / word rows x 2 W of 32 columns
//   context        [D][2 W] floats, the sum of p v
//   values         [keys / word][D] words

constexpr int kLanes = 2 * W;
constexpr int kKeysAtOnce = kTiles ? kTile : kRowsAtOnce >= 8 ? 8 : 4;
template <class E> constexpr int kValueRow = kTiles ? kTile : kWord<E>;  // elements from one column of the values to the next

template <class E>
TR_INLINE float* panel_word(E* panel, int k, int vector) {
    return reinterpret_cast<float*>(panel) + (kTiles ? (k / 16 * 2 + vector) * 256 + k % 16 * 16 : k * kPanel + vector * W);
}

// Transposes W rows of D elements: take(k, column) receives word k of all rows. Returns the rows' squared norms.
template <class E, class Take>
TR_INLINE F transpose_rows(const E* rows, int D, const Take& take) {
    F squares = set(0.0f), others = squares;
    for (int k = 0; k < D / kWord<E>; k += W) {
        F m[W];
        for (int i = 0; i < W; ++i) m[i] = load(reinterpret_cast<const float*>(rows + i * D + k * kWord<E>));
        transpose(m);
        for (int i = 0; i < W; i += 2) {
            take(k + i, m[i]), take(k + i + 1, m[i + 1]);
            squares = add_squares<E>(m[i], squares), others = add_squares<E>(m[i + 1], others);
        }
    }
    return squares + others;
}

// The maximum norm of keys [from, to).
template <class E>
float longest_key(const AttendJob& job, int from, int to) {
    const E* k = static_cast<const E*>(job.k);
    F longest = set(0.0f);
    for (int j = from; j < to; j += W) {
        const F squares = transpose_rows(k + static_cast<size_t>(j) * job.D, job.D, [](int, const F&) {});
        longest = vmax(longest, keep_first(squares, to - j, 0.0f));
    }
    return __builtin_sqrtf(hmax(longest));
}

// Initial values of the scores that depend only on the distance: ALiBi's bias, or zero.
struct DistanceBias {
    const float* zero;  // zero[i - j] = -slope |i - j|
    static constexpr bool kWindow = false;
    template <class Tile>
    TR_INLINE void begin(const Tile&) {}
    template <class Tile>
    TR_INLINE float bound(const Tile& t, float query) const { return query * t.longest; }
    TR_INLINE void get(int first, int key, F& x, F& y) const { x = load(zero + (first - key)), y = load(zero + (first - key) + W); }
};

template <class E, bool exact, class Bias>
struct LaneTile {
    static constexpr int kStep = kKeysAtOnce;
    const AttendJob& job;
    const E* values;    // layout: see the top of this file
    Bias& bias;
    float longest;      // max |k|
    E *queries, *probabilities;
    float* context;
    int first, rows;
    bool online;        // subtract a running maximum
    alignas(64) float size[kLanes], top[kLanes], mass[kLanes];

    float score_bound(int r) const { return size[r] * longest * 1.001f + 0.01f; }

    // Transposes queries [first, first + 2 W); rows after the last query are computed and discarded.
    TR_INLINE void begin() {
        const E* q = static_cast<const E*>(job.q) + static_cast<size_t>(first) * job.D;
        for (int v = 0; v < 2; ++v) {
            const auto put = [&](int k, const F& column) TR_LAMBDA { store(panel_word(queries, k, v), column); };
            store(size + v * W, square_root(transpose_rows(q + v * W * job.D, job.D, put)));
        }
        store(top, set(0.0f)), store(top + W, set(0.0f));
        float largest = 0.0f;
        for (int r = 0; r < rows; ++r) largest = size[r] > largest ? size[r] : largest;
        online = !(bias.bound(*this, largest) <= kNoMaxBelow);
        bias.begin(*this);
    }

    // Scores of keys j .. j + kKeysAtOnce; take(r, left, right) is called for each key.
    template <class Take>
    TR_INLINE void scores(int j, bool shifted, const Take& take) const {
        const F t0 = load(top), t1 = load(top + W);
        block<E>(typename MakeIndices<kKeysAtOnce>::type{}, static_cast<const E*>(job.k) + static_cast<size_t>(j) * job.D, job.D, kWord<E>,
            reinterpret_cast<const std::byte*>(queries), job.D / kWord<E>,
            [&](int r, F& x, F& y) TR_LAMBDA {
                bias.get(first, j + r, x, y);
                if (shifted) x = x - t0, y = y - t1;
            }, take);
    }

    // Raises the lanes' offsets to the maximum score so far and rescales their sums.
    void raise(int lo, int hi, bool fresh) {
        F x0 = set(-3.0e38f), x1 = x0;
        for (int j = lo; j < hi; j += kKeysAtOnce)
            scores(j, false, [&](int r, const F& x, const F& y) TR_LAMBDA {
                if (j + r < hi) x0 = vmax(x0, x), x1 = vmax(x1, y);
            });
        const F found[2] = {x0, x1};
        for (int v = 0; v < 2; ++v) {
            const F old = load(top + v * W), now = fresh ? found[v] : vmax(old, found[v]);
            store(top + v * W, now);
            if (fresh) continue;
            const F factor = exp2<true>(old - now);
            store(mass + v * W, load(mass + v * W) * factor);
            for (int d = 0; d < job.D; ++d) {
                float* c = context + d * kLanes + v * W;
                store(c, load(c) * factor);
            }
        }
    }

    // Probabilities of keys j .. j + kKeysAtOnce and their sums; keys from `hi` on have probability 0. `deep`: see exp2_words.
    template <bool shifted, bool deep, bool tail>
    TR_INLINE void exponentiate(int j, int lo, int hi, F (&sums)[2]) {
        F even[2], odd[2];  // scores of two neighbouring keys
        scores(j, shifted, [&](int r, const F& x, const F& y) TR_LAMBDA {
            F (&p)[2] = r % 2 ? odd : even;
            p[0] = x, p[1] = y;
            if (tail && j + r >= hi) p[0] = p[1] = set(-200.0f);
            if (r % 2 == 0) return;
            const int k = (j + r - 1 - lo) / kWord<E>;
            if constexpr (kWord<E> == 2) {
                F words[2];
                exp2_words<deep>(even, odd, words, sums);
                for (int v = 0; v < 2; ++v) store(panel_word(probabilities, k, v), words[v]);
            } else {
                for (F* x : {even, odd}) x[0] = exp2<exact>(x[0]), x[1] = exp2<exact>(x[1]);
                for (int v = 0; v < 2; ++v) sums[v] = sums[v] + (even[v] + odd[v]);
                for (int v = 0; v < 2; ++v) store(panel_word(probabilities, k, v), even[v]), store(panel_word(probabilities, k + 1, v), odd[v]);
            }
        });
    }

    template <bool shifted, bool deep>
    void probability(int lo, int hi, bool fresh) {
        F sums[2] = {set(0.0f), set(0.0f)};
        int j = lo;
        for (; j + kKeysAtOnce <= hi; j += kKeysAtOnce) exponentiate<shifted, deep, false>(j, lo, hi, sums);
        if (j < hi) exponentiate<shifted, deep, true>(j, lo, hi, sums);
        for (int v = 0; v < 2; ++v) store(mass + v * W, fresh ? sums[v] : load(mass + v * W) + sums[v]);
    }

    void visit(int lo, int hi, bool fresh) {
        const float furthest = static_cast<float>(at_least(first + kLanes - lo, hi - first));
        if (online) {
            raise(lo, hi, fresh);
            probability<true, true>(lo, hi, fresh);
        } else if (!Bias::kWindow && kNoMaxBelow + job.slope * furthest < kDeep) {
            probability<false, false>(lo, hi, fresh);
        } else {
            probability<false, true>(lo, hi, fresh);
        }
        for (int d = 0; d < job.D; d += kKeysAtOnce) {
            float* c = context + d * kLanes;
            block<E>(typename MakeIndices<kKeysAtOnce>::type{}, values + static_cast<size_t>(lo) * job.D + d * kValueRow<E>, kValueRow<E>, job.D * kWord<E>,
                reinterpret_cast<const std::byte*>(probabilities), (hi - lo + kWord<E> - 1) / kWord<E>,
                [&](int, F& x, F& y) TR_LAMBDA { x = y = set(0.0f); },
                [&](int r, const F& x, const F& y) TR_LAMBDA {
                    float* to = c + r * kLanes;
                    if (fresh) store(to, x), store(to + W, y);
                    else store(to, x + load(to)), store(to + W, y + load(to + W));
                });
        }
    }

    TR_INLINE void end() const {
        E* out = static_cast<E*>(job.out) + static_cast<size_t>(first) * job.out_stride;
        for (int v = 0; v < 2; ++v) {
            const F inverse = set(1.0f) / load(mass + v * W);
            for (int k = 0; k < job.D / kWord<E>; k += W) {
                F m[W];
                for (int i = 0; i < W; ++i) {
                    const float* c = context + (k + i) * kWord<E> * kLanes + v * W;
                    m[i] = to_word<E>(load(c) * inverse, load(c + (kWord<E> - 1) * kLanes) * inverse);
                }
                transpose(m);
                for (int i = 0; i < W && v * W + i < rows; ++i) store(reinterpret_cast<float*>(out + (v * W + i) * job.out_stride + k * kWord<E>), m[i]);
            }
        }
    }
};

template <class E, bool exact, class Bias>
TR_INLINE void attend_tiles(const AttendJob& job, Bias bias, float longest, Scratch& s) {
    const E* values = pair_values(static_cast<const E*>(job.v), job.n, job.D, s.values.as<E>());
    for (int first = job.from; first < job.to; first += kLanes) {
        LaneTile<E, exact, Bias> t{job, values, bias, longest, s.queries.as<E>(), s.probabilities.as<E>(), s.context.as<float>(),
                                   first, at_most(kLanes, job.to - first), false, {}, {}, {}};
        t.begin();
        if constexpr (Bias::kWindow) bias.slide(t);
        else walk(t, kKeyChunk, kLanes);
        t.end();
    }
}

#include "attention_relative.inl"
#include "attention_window.inl"

// Attention of one head for queries [from, to).
template <class E, bool exact>
void attend(const AttendJob& job, Scratch& s) {
    const Lap lap(s, kAttention);
    if (job.relative.count > 0) return attend_relative<E, exact>(job, s);
    if (job.window > 0) return attend_window<E, exact>(job, s);
    const DistanceBias bias{fill_bias(s.bias.as<float>(), job.slope, round_up(job.n, kTile) + kTile)};
    attend_tiles<E, exact>(job, bias, longest_key<E>(job, 0, job.n), s);
}
