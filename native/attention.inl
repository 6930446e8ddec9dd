// Attention, what all instruction sets share: the walk of one tile of queries along the keys, and where it may stop.
// A Tile (attention_lanes.inl) has: job, first, rows; per row `top` and `mass`, the log2 offset
// and the sum of 2^(score - top) so far; score_bound(r), an upper bound of row r's scores before ALiBi;
// visit(lo, hi, fresh), which adds keys [lo, hi), lo a multiple of kStep.

constexpr float kNoMaxBelow = 100.0f;  // log2: scores within +-100 neither overflow nor lose mass without a max

// bias[x] = -slope |x| for |x| < reach; the result points at x = 0.
TR_INLINE const float* fill_bias(float* table, float slope, int reach) {
    for (int x = -reach; x < reach; ++x) table[x + reach] = -slope * static_cast<float>(x < 0 ? -x : x);
    return table + reach;
}

// At most log2(x), and less than 0.09 below it: log2(1 + f) >= f.
TR_INLINE float log2_below(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<float>(bits) * (1.0f / (1 << 23)) - 127.0f;
}

// How far a row must look: keys at a distance >= d on one side may be skipped if
//   2^bound * sum_{k>=d} 2^(-slope k)  <=  1e-6 * (mass the row has found so far).
struct Fade {
    float steps;  // keys a factor of 2: 1 / slope
    float tail;   // log2(1e6 * sum_{k>=0} 2^(-slope k))

    explicit Fade(float slope) : steps(1.0f / slope), tail(-kSkipLog2 - __builtin_log2f(1.0f - __builtin_exp2f(-slope))) {}
    TR_INLINE float distance(float bound, float log2_mass) const { return (bound + tail - log2_mass) * steps + 1.0f; }
};

// Widens [lo, hi) to the keys that can matter to a tile, given the mass its rows have found so far.
template <class Tile>
void reach(const Tile& t, const Fade& fade, int* lo, int* hi) {
    const float n = static_cast<float>(t.job.n);
    int left = t.first, right = t.first;
    for (int r = 0; r < t.rows; ++r) {
        float distance = fade.distance(t.score_bound(r), log2_below(t.mass[r]) + t.top[r]);
        distance = distance < 1.0f ? 1.0f : distance < n ? distance : n;  // also where it is no number
        left = at_most(left, t.first + r - static_cast<int>(distance) + 1);
        right = at_least(right, t.first + r + static_cast<int>(distance));
    }
    *lo = at_most(*lo, at_least(0, left) / Tile::kStep * Tile::kStep);
    *hi = at_least(*hi, at_most(t.job.n, round_up(right, Tile::kStep)));
}

// All keys that matter, at most `chunk` at a time: those around the tile first, then outward.
template <class Tile>
TR_INLINE void walk(Tile& t, int chunk, int queries) {
    const int n = t.job.n;
    if (n <= chunk) return t.visit(0, n, true);
    if (!t.job.alibi || !(t.job.slope > 0.0f)) {
        for (int j = 0; j < n; j += chunk) t.visit(j, at_most(n, j + chunk), j == 0);
        return;
    }
    // No more on each side than a mass of 1 would need, so that steep heads begin with a smaller chunk.
    const Fade fade(t.job.slope);
    const int most = (chunk - queries) / 2 / Tile::kStep * Tile::kStep;
    const float needed = fade.distance(t.score_bound(0), 0.0f);
    const int side = needed < static_cast<float>(most) ? round_up(static_cast<int>(needed), Tile::kStep) : most;
    const int near_lo = at_least(0, t.first - side), near_hi = at_most(n, t.first + queries + side);
    t.visit(near_lo, near_hi, true);
    int lo = near_lo, hi = near_hi, far_lo = lo, far_hi = hi;  // seen so far, and what must be seen
    const auto widen = [&](int to_lo, int to_hi) TR_LAMBDA {
        for (; lo > to_lo; lo = at_least(to_lo, lo - chunk)) t.visit(at_least(to_lo, lo - chunk), lo, false);
        for (; hi < to_hi; hi = at_most(to_hi, hi + chunk)) t.visit(hi, at_most(to_hi, hi + chunk), false);
    };
    reach(t, fade, &far_lo, &far_hi);
    if (far_hi - far_lo > hi - lo + 4 * chunk) {  // half of it may show that the rest matters less
        widen(lo - (lo - far_lo) / (2 * chunk) * chunk, hi + (far_hi - hi) / (2 * chunk) * chunk);
        far_lo = lo, far_hi = hi;
        reach(t, fade, &far_lo, &far_hi);
    }
    widen(far_lo, far_hi);
}
