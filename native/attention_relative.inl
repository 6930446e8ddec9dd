// Disentangled attention (architectures/deberta.py, docs/kernels.md "Attention"). The two terms that depend on the row
// r = rows[i - j] of the relative position table are the initial values of a tile's scores, so the loop over keys is
// unchanged. Neither needs more than (n, count) floats:
//   given  [n][count]     queries[r] . k_j for all tiles: a product of the keys and the table
//   asked  [i - j][2 W]   q_i . keys[rows[i - j]] for one tile: a product of the table and the tile's queries, ordered by
//                         table row, from which lane l of distance d takes the row of distance d + l
// Neighbouring distances have equal or neighbouring rows, so W lanes of `given` are within W consecutive floats.

#ifndef TR_LOOKUP
// from[rows[0]], from[rows[1]], ...; rows[0] <= rows[l] < rows[0] + W
TR_INLINE F lookup(const float* from, const int32_t* rows) {
    float lanes[W];
    for (int l = 0; l < W; ++l) lanes[l] = from[rows[l]];
    return load(lanes);
}
#endif

#ifndef TR_PICK
// Takes lanes whose index has this bit from b, the others from a.
template <int bit>
TR_INLINE F pick(F a, F b) {
    float x[W], y[W];
    store(x, a), store(y, b);
    for (int l = 0; l < W; ++l) x[l] = l & bit ? y[l] : x[l];
    return load(x);
}
#endif

// Shears: rows[d][l] = rows[d + l][l] for the first W of 2 W - 1 rows, in log2(W) rounds.
template <int bit>
TR_INLINE void skew(F (&rows)[2 * W - 1]) {
    for (int d = 0; d < W - 1 + bit; ++d) rows[d] = pick<bit>(rows[d], rows[d + bit]);
    if constexpr (bit > 1) skew<bit / 2>(rows);
}

template <class E>
struct RelativeBias {
    const Relative& table;
    const float* given;
    int stride;     // floats from one key's row of `given` to the next
    float* scratch;  // (count, 2 W) products
    float* skewed;
    const float* asked = nullptr;  // asked[d * 2 W + l]

    static constexpr bool kWindow = false;
    template <class Tile>
    TR_INLINE float bound(const Tile& t, float query) const {
        return query * (t.longest + table.longest_key) + table.longest_query * t.longest;
    }

    template <class Tile>
    void begin(const Tile& t) {
        const int keys = round_up(t.job.n, kKeysAtOnce), nearest = t.first - keys + 1, D = t.job.D;  // smallest distance of the tile
        const int last = table.rows[t.first + kLanes - 1];
        for (int r = table.rows[nearest] / kKeysAtOnce * kKeysAtOnce; r <= last; r += kKeysAtOnce)
            block<E>(typename MakeIndices<kKeysAtOnce>::type{}, static_cast<const E*>(table.keys) + static_cast<size_t>(r) * D, D, kWord<E>,
                reinterpret_cast<const std::byte*>(t.queries), D / kWord<E>,
                [](int, F& x, F& y) TR_LAMBDA { x = y = set(0.0f); },
                [&](int i, const F& x, const F& y) TR_LAMBDA { store2(scratch + (r + i) * kLanes, x, y); });
        asked = skewed - static_cast<ptrdiff_t>(nearest) * kLanes;
        for (int from = 0; from < keys; from += W)
            for (int v = 0; v < 2; ++v) {
                F m[2 * W - 1];
                for (int i = 0; i < 2 * W - 1; ++i) m[i] = load(scratch + table.rows[nearest + from + v * W + i] * kLanes + v * W);
                skew<W / 2>(m);
                for (int i = 0; i < W; ++i) store(skewed + (from + i) * kLanes + v * W, m[i]);
            }
    }

    TR_INLINE void get(int first, int key, F& x, F& y) const {
        const int d = first - key;
        const float *a = asked + static_cast<ptrdiff_t>(d) * kLanes, *g = given + static_cast<size_t>(key) * stride;
        x = load(a) + lookup(g, table.rows + d), y = load(a + W) + lookup(g, table.rows + d + W);
    }
};

template <class E, bool exact>
void attend_relative(const AttendJob& job, Scratch& s) {
    const Relative& table = job.relative;
    const int D = job.D, stride = table.count + kTile;
    float* given = s.relative_queries.as<float>();
    for (int j = 0; j < job.n; j += kKeysAtOnce) {
        const int from = table.rows[job.from - j - kKeysAtOnce + 1] / kPanel, to = table.rows[job.to - 1 - j] / kPanel;
        for (int column = from * kPanel; column < (to + 1) * kPanel; column += kLanes) {
            const std::byte* panel = static_cast<const std::byte*>(table.queries) + static_cast<size_t>(column / kPanel * kPanel * D) * sizeof(E);
            block<E>(typename MakeIndices<kKeysAtOnce>::type{}, static_cast<const E*>(job.k) + static_cast<size_t>(j) * D, D, kWord<E>,
                panel + column % kPanel / W * kRightVector<E>, D / kWord<E>,
                [](int, F& x, F& y) TR_LAMBDA { x = y = set(0.0f); },
                [&](int r, const F& x, const F& y) TR_LAMBDA { store2(given + static_cast<size_t>(j + r) * stride + column, x, y); });
        }
    }
    attend_tiles<E, exact>(job, RelativeBias<E>{table, given, stride, s.relative_keys.as<float>(), s.skewed.as<float>()},
                           longest_key<E>(job, 0, job.n), s);
}
