// The loop of one tile of queries over the keys, and the skip bound that ends it (docs/kernels.md, "Attention").
// A Tile (attention_lanes.inl) has: job, first, rows; for each row `top` and `mass`, the log2 offset and the sum of
// 2^(score - top) so far; score_bound(r), an upper bound of row r's scores without ALiBi; visit(lo, hi, fresh), which adds
// keys [lo, hi), lo a multiple of kStep.

constexpr float kNoMaxBelow = 100.0f;  // log2: scores within +-100 need no maximum subtracted to avoid overflow or underflow

// bias[x] = -slope |x| for |x| < reach; the result points at x = 0.
TR_INLINE const float* fill_bias(float* table, float slope, int reach) {
    for (int x = -reach; x < reach; ++x) table[x + reach] = -slope * static_cast<float>(x < 0 ? -x : x);
    return table + reach;
}

// A lower bound of log2(x), less than 0.09 below it: log2(1 + f) >= f.
TR_INLINE float log2_below(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<float>(bits) * (1.0f / (1 << 23)) - 127.0f;
}

// The skip bound: keys at a distance >= d on one side may be skipped if
//   2^bound * sum_{k>=d} 2^(-slope k)  <=  1e-6 * (the row's sum so far).
struct Fade {
    float steps;  // keys over which ALiBi halves a weight: 1 / slope
    float tail;   // log2(1e6 * sum_{k>=0} 2^(-slope k))

    explicit Fade(float slope) : steps(1.0f / slope), tail(-kSkipLog2 - __builtin_log2f(1.0f - __builtin_exp2f(-slope))) {}
    TR_INLINE float distance(float bound, float log2_mass) const { return (bound + tail - log2_mass) * steps + 1.0f; }
};

// Extends [lo, hi) to the keys that the skip bound requires for a tile, given its rows' sums so far.
template <class Tile>
void reach(const Tile& t, const Fade& fade, int* lo, int* hi) {
    const float n = static_cast<float>(t.job.n);
    int left = t.first, right = t.first;
    for (int r = 0; r < t.rows; ++r) {
        float distance = fade.distance(t.score_bound(r), log2_below(t.mass[r]) + t.top[r]);
        distance = distance < 1.0f ? 1.0f : distance < n ? distance : n;  // n also if it is NaN
        left = at_most(left, t.first + r - static_cast<int>(distance) + 1);
        right = at_least(right, t.first + r + static_cast<int>(distance));
    }
    *lo = at_most(*lo, at_least(0, left) / Tile::kStep * Tile::kStep);
    *hi = at_least(*hi, at_most(t.job.n, round_up(right, Tile::kStep)));
}

// Visits all keys that the skip bound requires, at most `chunk` at a time: first those around the tile, then outward.
template <class Tile>
TR_INLINE void walk(Tile& t, int chunk, int queries) {
    const int n = t.job.n;
    if (n <= chunk) return t.visit(0, n, true);
    if (!t.job.alibi || !(t.job.slope > 0.0f)) {
        for (int j = 0; j < n; j += chunk) t.visit(j, at_most(n, j + chunk), j == 0);
        return;
    }
    // The first chunk has at most the keys that a sum of 1 would require, so that steep slopes begin with fewer keys.
    const Fade fade(t.job.slope);
    const int most = (chunk - queries) / 2 / Tile::kStep * Tile::kStep;
    const float needed = fade.distance(t.score_bound(0), 0.0f);
    const int side = needed < static_cast<float>(most) ? round_up(static_cast<int>(needed), Tile::kStep) : most;
    const int near_lo = at_least(0, t.first - side), near_hi = at_most(n, t.first + queries + side);
    t.visit(near_lo, near_hi, true);
    int lo = near_lo, hi = near_hi, far_lo = lo, far_hi = hi;  // visited so far, required
    const auto widen = [&](int to_lo, int to_hi) TR_LAMBDA {
        for (; lo > to_lo; lo = at_least(to_lo, lo - chunk)) t.visit(at_least(to_lo, lo - chunk), lo, false);
        for (; hi < to_hi; hi = at_most(to_hi, hi + chunk)) t.visit(hi, at_most(to_hi, hi + chunk), false);
    };
    reach(t, fade, &far_lo, &far_hi);
    if (far_hi - far_lo > hi - lo + 4 * chunk) {  // visit half of it, then apply the bound again with the larger sums
        widen(lo - (lo - far_lo) / (2 * chunk) * chunk, hi + (far_hi - hi) / (2 * chunk) * chunk);
        far_lo = lo, far_hi = hi;
        reach(t, fade, &far_lo, &far_hi);
    }
    widen(far_lo, far_hi);
}
