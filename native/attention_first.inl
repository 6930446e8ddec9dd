// Attention of a pair's first row, which is all that a classifier's last layer needs, without computing keys and values. With
// k_j = K x_j + b and v_j = V x_j + c, a head's scores are (K^T q) . x_j + q . b, where q . b is constant and cancels in the
// softmax; its output is V (sum of p_j x_j) + c. A token costs 2 H C multiplications in float instead of 2 C^2 for its
// projections. The order of summation depends only on the pair.

// to (C,) += sum of weights[i] * rows[i]
template <int count, class Held>
TR_INLINE void add_rows(const Held* rows, const float* weights, int C, float* to) {
    for (int c = 0; c < C; c += W) {
        F sum = load(to + c);
        for (int i = 0; i < count; ++i) sum = fma(load(rows + static_cast<size_t>(i) * C + c), set(weights[i]), sum);
        store(to + c, sum);
    }
}

// dots[i] = rows[i] . vector, for eight rows
template <class Held>
TR_INLINE void dot_rows(const Held* rows, const float* vector, int C, float* dots) {
    F sum[8];
    for (F& x : sum) x = set(0.0f);
    for (int c = 0; c < C; c += W)
        for (int i = 0; i < 8; ++i) sum[i] = fma(load(rows + static_cast<size_t>(i) * C + c), load(vector + c), sum[i]);
    for (int i = 0; i < 8; ++i) dots[i] = hsum(sum[i]);
}

// Replaces scores (n,) by 2^(score - maximum), padded with zeros to whole vectors; returns their sum.
template <bool exact>
float soften(float* scores, int n) {
    F top = set(-3.0e38f), mass = set(0.0f);
    for (int j = 0; j < n; j += W) top = vmax(top, keep_first(load(scores + j), n - j, -3.0e38f));
    const F largest = set(hmax(top));
    for (int j = 0; j < n; j += W) {
        const F p = keep_first(exp2<exact>(load(scores + j) - largest), n - j, 0.0f);
        mass = mass + p;
        store(scores + j, p);
    }
    return hsum(mass);
}

template <class Op, class E>
void attend_first(const Weights& w, const float* x, int n, void* out, Scratch& s) {
    const Layer& layer = w.layers.back();
    const auto a = put_operands<Op>(x, w.shape.C, 1, nullptr, layer.qkv, s);
    const Lap lap(s, kAttention);
    using Held = ForInt8<Op, int8_t, Op>;
    const Held *keys = static_cast<const Held*>(layer.keys.weights), *values = static_cast<const Held*>(layer.values.weights);
    const int C = w.shape.C, D = w.shape.D, H = w.shape.H;
    const size_t stride = static_cast<size_t>(round_up(n, kTile));
    float *q = s.hidden.as<float>(), *asked = s.asked.as<float>(), *p = s.weights.as<float>();  // (C,), (H, C), (H, stride)
    multiply<Op>(a, layer.qkv, 1, s, nullptr, [&](int column) {
        return [=](int, F left, F right) TR_LAMBDA { store2(q + column, left, right); };
    });
    clear(asked, H * C);  // K^T q
    for (int r = 0; r < C; ++r) q[r] *= layer.keys.scale[r];
    for (int r = 0; r < C; r += 8) add_rows<8>(keys + static_cast<size_t>(r) * C, q + r, C, asked + static_cast<size_t>(r / D) * C);
    for (int j = 0; j < n; j += 8)
        for (int h = 0; h < H; ++h) {
            float* scores = p + h * stride + j;
            dot_rows(x + static_cast<size_t>(j) * C, asked + h * C, C, scores);
            for (int i = 0; i < 8; ++i) scores[i] -= w.slopes[h] * static_cast<float>(j + i);
        }
    float* seen = asked;  // sum of p_j x_j
    clear(seen, H * C);
    float mass[kMostHeads];
    for (int h = 0; h < H; ++h) mass[h] = soften<same_type<Op, float>>(p + h * stride, n);
    for (int j = 0; j < n; j += 8)
        for (int h = 0; h < H; ++h) {
            const float* rows = x + static_cast<size_t>(j) * C;
            if (j + 8 <= n) add_rows<8>(rows, p + h * stride + j, C, seen + h * C);
            else for (int i = 0; i < n - j; ++i) add_rows<1>(rows + i * C, p + h * stride + j + i, C, seen + h * C);
        }
    for (int r = 0; r < C; r += 8) dot_rows(values + static_cast<size_t>(r) * C, seen + static_cast<size_t>(r / D) * C, C, q + r);
    for (int r = 0; r < C; ++r) q[r] = q[r] * layer.values.scale[r] / mass[r / D] + layer.values.bias[r];
    for (int c = 0; c < C; c += W) store(static_cast<E*>(out) + c, load(q + c));
}
