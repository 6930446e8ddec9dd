// Sliding-window attention (ModernBERT): each tile of queries visits only keys within `window` of its rows. Key ranges are
// counted from the tile's first query, so the result does not depend on how a pair's queries are divided into jobs.

constexpr float kOutside = -1e30f;  // finite, because exp2 splits its argument into floor and fraction

struct WindowBias {
    static constexpr bool kWindow = true;
    int window;
    const float* zero;       // zero[i - j] = 0 within the window, else kOutside
    const float* key_norms;  // maximum norm of each 32 keys

    template <class Tile>
    TR_INLINE int begins(const Tile& t) const { return at_least(0, t.first - window) / Tile::kStep * Tile::kStep; }
    template <class Tile>
    TR_INLINE int ends(const Tile& t) const { return at_most(t.job.n, t.first + t.rows + window); }
    template <class Tile>
    TR_INLINE void begin(const Tile&) {}
    template <class Tile>
    TR_INLINE float bound(const Tile& t, float query) const {
        float key = 0.0f;
        for (int b = begins(t) / kTile; b * kTile < ends(t); ++b) key = key_norms[b] > key ? key_norms[b] : key;
        return query * key;
    }
    TR_INLINE void get(int first, int key, F& x, F& y) const { x = load(zero + (first - key)), y = load(zero + (first - key) + W); }
    template <class Tile>
    TR_INLINE void slide(Tile& t) const {
        const int lo = begins(t), hi = ends(t), visits = (hi - lo + kKeyChunk - 1) / kKeyChunk;
        const int step = round_up((hi - lo + visits - 1) / visits, Tile::kStep);
        for (int j = lo; j < hi; j += step) t.visit(j, at_most(hi, j + step), j == lo);
    }
};

// The job restricted to rows [lo, hi) of its pair, the part that it reads.
template <class E>
AttendJob narrowed(AttendJob job, int lo, int hi) {
    const size_t rows = static_cast<size_t>(lo) * job.D;
    job.q = static_cast<const E*>(job.q) + rows, job.k = static_cast<const E*>(job.k) + rows, job.v = static_cast<const E*>(job.v) + rows;
    job.out = static_cast<E*>(job.out) + static_cast<size_t>(lo) * job.out_stride;
    job.n = hi - lo, job.from -= lo, job.to -= lo;
    return job;
}

template <class E, bool exact>
void attend_window(const AttendJob& whole, Scratch& s) {
    const int window = at_most(whole.window, whole.n);
    const AttendJob job = narrowed<E>(whole, at_least(0, whole.from - window) / kTile * kTile, at_most(whole.n, round_up(whole.to + window, kTile)));
    float *norms = s.key_norms.as<float>(), *table = s.bias.as<float>();
    for (int j = 0; j < job.n; j += kTile) norms[j / kTile] = longest_key<E>(job, j, at_most(job.n, j + kTile));
    const int reach = window + 2 * kTile;
    for (int x = -reach; x < reach; ++x) table[x + reach] = x < -window || x > window ? kOutside : 0.0f;
    attend_tiles<E, exact>(job, WindowBias{window, table + reach, norms}, 0.0f, s);
}
