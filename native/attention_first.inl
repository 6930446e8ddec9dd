// Attention of a pair's first row alone: all that a classifier's last layer needs. Neither keys nor values are made. With
// k_j = K x_j + b and v_j = V x_j + c a head's scores are (K^T q) . x_j, plus q . b, which softmax takes off again; its
// output is V (sum of p_j x_j) + c. So a token costs 2 H C multiplications instead of the projections' 2 C^2, in float,
// with a head in each lane. Terms are added in an order that depends on the pair alone.

constexpr int kFirstChunk = 128;                     // tokens whose rows stay in cache between scores and sums
constexpr int kChannels = kRowsAtOnce >= 8 ? 16 : 8;  // whose sums over the tokens fit the registers

template <class Op> struct HeldAs { using type = Op; };
template <> struct HeldAs<Int8> { using type = int8_t; };

// W heads; `keys` to `slopes` point at the first one's lane, the memory behind them is (rows, W).
template <class Held>
struct FirstHeads {
    int C, D;
    const Held *keys, *values;
    const float *key_scale, *value_scale, *value_bias, *slopes;
    float *query, *asked, *seen, *weights;  // D, C, C and kFirstChunk rows

    // asked = K^T query. Weights are from the outer caches: they are fetched some channels ahead.
    TR_INLINE void ask() const {
        for (int c = 0; c < C; c += 4) {
            const Held* row = keys + c * D * kHeadLanes;
            F sum[4] = {set(0.0f), set(0.0f), set(0.0f), set(0.0f)};
            for (int d = 0; d < D; ++d) {
                prefetch(reinterpret_cast<const std::byte*>(row + 8 * D * kHeadLanes) + 64 * d);
                const F q = mul(load(query + d * W), load(key_scale + d * kHeadLanes));
                for (int i = 0; i < 4; ++i) sum[i] = fma(load(row + (i * D + d) * kHeadLanes), q, sum[i]);
            }
            for (int i = 0; i < 4; ++i) store(asked + (c + i) * W, sum[i]);
        }
    }

    // weights = scores of rows x [0, n), of which the first is the pair's row `from`; returns the largest, at least `top`.
    TR_INLINE F score(const float* x, int from, int n, F top) const {
        const F slope = load(slopes);
        for (int j = 0; j < n; j += 8) {
            const float* row = x + static_cast<size_t>(j) * C;
            F sum[8];
            for (int i = 0; i < 8; ++i) sum[i] = mul(slope, set(-static_cast<float>(from + j + i)));
            for (int c = 0; c < C; ++c) {
                const F a = load(asked + c * W);
                for (int i = 0; i < 8; ++i) sum[i] = fma(set(row[i * C + c]), a, sum[i]);
            }
            for (int i = 0; i < 8; ++i) {
                store(weights + (j + i) * W, sum[i]);
                if (j + i < n) top = vmax(top, sum[i]);
            }
        }
        return top;
    }

    // weights = 2^(scores - top); returns their sum
    template <bool exact>
    TR_INLINE F weigh(int n, F top) const {
        F mass = set(0.0f);
        for (int j = 0; j < n; ++j) {
            const F p = exp2<exact>(sub(load(weights + j * W), top));
            mass = add(mass, p);
            store(weights + j * W, p);
        }
        return mass;
    }

    // seen = keep * seen + sum of weights[j] x_j
    TR_INLINE void see(const float* x, int n, F keep) const {
        for (int c = 0; c < C; c += kChannels) {
            F sum[kChannels];
            for (int i = 0; i < kChannels; ++i) sum[i] = mul(keep, load(seen + (c + i) * W));
            for (int j = 0; j < n; ++j) {
                const F p = load(weights + j * W);
                const float* row = x + static_cast<size_t>(j) * C + c;
                for (int i = 0; i < kChannels; ++i) sum[i] = fma(set(row[i]), p, sum[i]);
            }
            for (int i = 0; i < kChannels; ++i) store(seen + (c + i) * W, sum[i]);
        }
    }

    // query = V seen / mass + c, in the query's place
    TR_INLINE void answer(F mass) const {
        const F inverse = div(set(1.0f), mass);
        for (int d = 0; d < D; d += 8) {
            F sum[8];
            for (F& x : sum) x = set(0.0f);
            for (int c = 0; c < C; ++c) {
                const F y = load(seen + c * W);
                const Held* row = values + (d * C + 8 * c) * kHeadLanes;
                for (int line = 0; line < 2; ++line) prefetch(reinterpret_cast<const std::byte*>(row + 128 * kHeadLanes) + 64 * line);
                for (int i = 0; i < 8; ++i) sum[i] = fma(load(row + i * kHeadLanes), y, sum[i]);
            }
            for (int i = 0; i < 8; ++i) {
                const int at = (d + i) * kHeadLanes;
                store(query + (d + i) * W, fma(sum[i], mul(load(value_scale + at), inverse), load(value_bias + at)));
            }
        }
    }

    // query -> the heads' output, in its place. The running maximum begins low, but not at infinity (see exp2).
    template <bool exact>
    void run(const float* x, int n) const {
        ask();
        for (int c = 0; c < C; ++c) store(seen + c * W, set(0.0f));
        F top = set(-1e30f), mass = set(0.0f);
        for (int from = 0; from < n; from += kFirstChunk) {
            const float* rows = x + static_cast<size_t>(from) * C;
            const int count = at_most(kFirstChunk, n - from);
            const F old = top;
            top = score(rows, from, count, old);
            const F keep = exp2<true>(sub(old, top));
            mass = fma(mass, keep, weigh<exact>(count, top));
            see(rows, count, keep);
        }
        answer(mass);
    }
};

template <class Op, class E>
void attend_first(const Weights& w, const float* x, int n, void* out, Scratch& s) {
    const Layer& layer = w.layers.back();
    const auto a = put_operands<Op>(x, w.shape.C, 1, nullptr, layer.qkv, s);
    const Lap lap(s, kAttention);
    using Held = typename HeldAs<Op>::type;
    const int C = w.shape.C, D = w.shape.D, H = w.shape.H;
    float *q = s.hidden.as<float>(), *query = q + C, *asked = query + D * W, *seen = asked + C * W, *weights = seen + C * W;
    multiply<Op>(a, layer.qkv, 1, s, nullptr, [&](int column) {
        return [=](int, F left, F right) TR_LAMBDA { store2(q + column, left, right); };
    });
    const auto each = [&](int first, const auto& move) {  // of the lanes' elements
        for (int h = first; h < at_most(H, first + W); ++h)
            for (int d = 0; d < D; ++d) move(q[h * D + d], query[d * W + h - first]);
    };
    for (int h = 0; h < H; h += W) {
        const int lane = h % kHeadLanes, group = (h - lane) * D;
        const size_t weight = static_cast<size_t>(group) * static_cast<size_t>(C) + static_cast<size_t>(lane);
        const FirstHeads<Held> heads{C, D, static_cast<const Held*>(layer.keys.weights) + weight, static_cast<const Held*>(layer.values.weights) + weight,
                                     layer.keys.scale + group + lane, layer.values.scale + group + lane, layer.values.bias + group + lane, w.slopes + h,
                                     query, asked, seen, weights};
        clear(query, D * W);  // lanes without a head
        each(h, [](float& head, float& here) { here = head; });
        heads.template run<same_type<Op, float>>(x, n);
        each(h, [](float& head, float& here) { head = here; });
    }
    for (int c = 0; c < C; c += W) store(static_cast<E*>(out) + c, load(q + c));
}
