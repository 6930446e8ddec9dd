// The arithmetic of the model, written once against the small vocabulary that each isa_*.cpp defines first
// (vector F of W floats, its operations, and three matrix products). Included inside an anonymous namespace.
// No std:: templates here: see TR_INLINE in kernels.h.
//
// Vocabulary, matrix product:
//   gemm(a, lda, rows, panel, depth, c, ldc, accumulate, between)
//     c[r][0..31] (+)= sum_k a[r][k] * panel[k][0..31] for r < rows <= 32; a is Int8 (the instruction set's own
//     encoding of int8, rows placed by int8_row and int8_column), bf16 or float; c is int32 or float, rows ldc apart. It may read up to row 31 of `a` and
//     write up to row 31 of `c`. Each element is summed over k in a fixed order, so a row's result does not
//     depend on its place. `between(i)` is called with i = 0 .. gemm_moments<Op>(depth) - 1 at moments of the
//     callee's choice: vector work for it to hide behind the matrix unit.

constexpr float kLog2e = 1.44269504088896341f;

TR_INLINE int at_most(int a, int b) { return a < b ? a : b; }
TR_INLINE int at_least(int a, int b) { return a > b ? a : b; }
TR_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

template <class A, class B> constexpr bool same_type = false;
template <class A> constexpr bool same_type<A, A> = true;
template <class Op> struct Accumulator { using type = float; };
template <> struct Accumulator<Int8> { using type = int32_t; };
template <class Op> using Acc = typename Accumulator<Op>::type;

TR_INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

struct Nothing {
    TR_INLINE void operator()(int) const {}
};

template <int N>
TR_INLINE F horner(F x, const float (&c)[N]) {
    F y = set(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) y = fma(y, x, set(c[i]));
    return y;
}

TR_INLINE void store2(float* p, F a, F b) {
    store(p, a);
    store(p + W, b);
}

TR_INLINE float largest_size(const float* row, int n) {
    F top = set(0.0f);
    for (int c = 0; c < n; c += W) top = vmax(top, vabs(load(row + c)));
    return hmax(top);
}

// 2^x to 8e-5 or, if exact, 8e-8 of its value; 0 below 2^-126. The polynomials are minimax fits on [-1/2, 1/2].
template <bool exact>
TR_INLINE F exp2(F x) {
#ifdef TR_HAS_EXP2
    return native_exp2<exact>(x);
#else
    static constexpr float fast[] = {0.9999280571937561f, 0.6932609677314758f, 0.2426111400127411f, 0.0551716685295105f};
    static constexpr float fine[] = {1.0000001192092896f,   0.6931469440460205f,  0.24022120237350464f,
                                     0.05550713092088699f, 0.009675541892647743f, 0.001327647129073739f};
    x = vmin(vmax(x, set(-127.0f)), set(127.0f));
    const F n = round(x);
    const F p = exact ? horner(sub(x, n), fine) : horner(sub(x, n), fast);
    return scale2(p, n);
#endif
}

// x Phi(x). Exact: erfc by Abramowitz & Stegun 7.1.26 (1.5e-7). Fast: an odd polynomial for Phi on [-4.2, 4.2],
// 8e-5 inside and 3e-4 at |x| = 8, far below the step of an int8 hidden row or a bf16 one.
template <bool exact>
TR_INLINE F gelu(F x) {
    if constexpr (exact) {
        static constexpr float c[] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};
        const F size = vabs(x), z = mul(size, set(0.70710678118654752f));
        const F t = div(set(1.0f), fma(set(0.3275911f), z, set(1.0f)));
        const F tail = mul(mul(horner(t, c), t), exp2<true>(mul(mul(z, z), set(-kLog2e))));
        return sub(vmax(x, set(0.0f)), mul(mul(size, set(0.5f)), tail));
    } else {
        static constexpr float c[] = {0.39849400520324707f,    -0.06557483971118927f,   0.009323895908892155f,  -0.0009572598501108587f,
                                      6.778880924684927e-05f, -3.10446489493188e-06f, 8.194887612944513e-08f, -9.406471157547003e-10f};
        const F z = vmin(vmax(x, set(-4.2f)), set(4.2f));
        return mul(x, fma(z, horner(mul(z, z), c), set(0.5f)));
    }
}

TR_INLINE F tanh_of(F x) {
    const F e = exp2<true>(mul(vmin(vmax(x, set(-20.0f)), set(20.0f)), set(2 * kLog2e)));
    return sub(set(1.0f), div(set(2.0f), add(e, set(1.0f))));
}

// Quantised to int8: value = scale * int8, scale = max|row| / 127. Padding columns are zero. `to` is the row's place
// in the operand, whose order is the instruction set's own (int8_row, int8_column).
template <class E>
void quantise(const E* row, int in, int depth, Int8* to, float* scale) {
    const float largest = largest_size(row, in);
    const F inverse = set(largest > 0.0f ? 127.0f / largest : 0.0f);
    *scale = largest * (1.0f / 127.0f);
    for (int c = 0; c < in; c += W) store_int8(to + int8_column(c), mul(load(row + c), inverse));
    for (int c = in; c < depth; c += W) store_int8(to + int8_column(c), set(0.0f));
}

template <class Op>
struct Operand {
    const Op* rows;
    int stride;
    const float* scale;  // one a row, int8 only
};

// Row `r` of a product's left side made from a row of floats or bf16.
template <class Op, class E>
TR_INLINE void put_operand(const E* row, int r, const Linear& w, Scratch& s) {
    if constexpr (same_type<Op, Int8>) {
        quantise(row, w.in, w.depth, s.operand.as<Op>() + int8_row(r, w.depth), s.row_scale.as<float>() + r);
    } else {
        Op* to = s.operand.as<Op>() + static_cast<size_t>(r) * w.depth;
        for (int c = 0; c < w.in; c += W) store(to + c, load(row + c));
    }
}

template <class Op>
TR_INLINE Operand<Op> operand_of(const Linear& w, Scratch& s) {
    return {s.operand.as<Op>(), w.depth, s.row_scale.as<float>()};
}

// The whole left side; rows that already have the operand's type are used where they lie.
template <class Op, class E>
Operand<Op> make_operand(const E* rows, int stride, int count, const Linear& w, Scratch& s) {
    if constexpr (same_type<Op, E>) {
        return {rows, stride, nullptr};
    } else {
        for (int r = 0; r < count; ++r) put_operand<Op>(rows + static_cast<size_t>(r) * stride, r, w, s);
        return operand_of<Op>(w, s);
    }
}

// Raw sums of some rows of a panel as values: undoes the quantisation and adds the bias.
template <class Op>
struct Values {
    static constexpr int kVectors = kPanel / W;
    const Acc<Op>* sums;      // of row 0 of the tile
    const float* row_scale;   // likewise; int8 only
    int panel, first;         // the tile's first row in the product
    F scale[kVectors], bias[kVectors];

    TR_INLINE Values(const Linear& w, int panel, int first, const Acc<Op>* sums, const float* row_scale)
        : sums(sums), row_scale(row_scale), panel(panel), first(first) {
        for (int i = 0; i < kVectors; ++i) {
            if constexpr (same_type<Op, Int8>) scale[i] = load(w.scale + panel * kPanel + i * W);
            bias[i] = load(w.bias + panel * kPanel + i * W);
        }
    }
    // Columns i * W .. of row r of the tile.
    TR_INLINE F at(int r, int i) const {
        const Acc<Op>* p = sums + r * kPanel + i * W;
        if constexpr (same_type<Op, Int8>) return fma(mul(from_sum(p), scale[i]), set(row_scale[r]), bias[i]);
        else return add(load(p), bias[i]);
    }
};

// Panels [from, to) of a W^T for `rows` rows; put(values, r0, r1) receives rows r0 .. r1-1 of one 32 x 32 tile while
// the next tile is being computed. The next panel (at the end: the first of `after`, the product that follows) is
// fetched meanwhile, because weights come from the outer caches.
template <class Op, class Put>
TR_INLINE void multiply(const Operand<Op>& a, const Linear& w, int from, int to, int rows, Scratch& s, const std::byte* after,
                        const Put& put) {
    struct Tile { int panel, row, rows; const Acc<Op>* sums; } done{from, 0, 0, s.tiles.as<Acc<Op>>()};
    const auto drain = [&](int r0, int r1) {
        if (r0 < r1) put(Values<Op>(w, done.panel, done.row, done.sums, a.scale ? a.scale + done.row : nullptr), r0, r1);
    };
    const int moments = gemm_moments<Op>(w.depth), share = (kTile + moments - 1) / moments;
    const int tiles = (rows + kTile - 1) / kTile;
    const size_t stride = (w.panel_bytes + static_cast<size_t>(tiles * moments) - 1) / static_cast<size_t>(tiles * moments);
    int turn = 0;
    for (int panel = from; panel < to; ++panel) {
        const std::byte* next = panel + 1 < to ? w.panel(panel + 1) : after;
        for (int row = 0; row < rows; row += kTile, turn ^= 1) {
            Acc<Op>* sums = s.tiles.as<Acc<Op>>() + turn * kTile * kPanel;
            const int count = at_most(kTile, rows - row);
            gemm(a.rows + static_cast<size_t>(row) * a.stride, a.stride, count, w.panel(panel), w.depth, sums, kPanel, false, [&](int i) {
                drain(at_most(i * share, done.rows), at_most((i + 1) * share, done.rows));
                if (!next) return;
                for (size_t at = 0; at < stride; at += 64) prefetch(next + at);
                next += stride;
            });
            done = {panel, row, count, sums};
        }
    }
    drain(0, done.rows);
}

void normalise(float* row, int C, const Norm& norm, float eps) {
    F sum = set(0.0f);
    for (int c = 0; c < C; c += W) sum = add(sum, load(row + c));
    const F mean = set(hsum(sum) / static_cast<float>(C));
    F squares = set(0.0f);
    for (int c = 0; c < C; c += W) {
        const F d = sub(load(row + c), mean);
        squares = fma(d, d, squares);
    }
    const F inverse = set(1.0f / __builtin_sqrtf(hsum(squares) / static_cast<float>(C) + eps));
    for (int c = 0; c < C; c += W)
        store(row + c, fma(mul(sub(load(row + c), mean), inverse), load(norm.weight + c), load(norm.bias + c)));
}

TR_INLINE F load_word(const Table& t, int id, int C, int c) {
    const size_t at = static_cast<size_t>(id) * C + c;
    if (t.stored == Stored::i8) return mul(load_int8(static_cast<const int8_t*>(t.data) + at), set(t.scale[id]));
    if (t.stored == Stored::f16) return load_half(static_cast<const uint16_t*>(t.data) + at);
    return load(static_cast<const float*>(t.data) + at);
}

void embed(const Weights& w, const int32_t* ids, const int32_t* types, const int32_t* positions, int rows, float* x) {
    const int C = w.shape.C;
    for (int r = 0; r < rows; ++r) {
        float* row = x + static_cast<size_t>(r) * C;
        const float* type = w.types ? w.types + static_cast<size_t>(types[r]) * C : nullptr;
        const float* place = w.positions ? w.positions + static_cast<size_t>(positions[r]) * C : nullptr;
        for (int c = 0; c < C; c += W) {
            F v = load_word(w.words, ids[r], C, c);
            if (type) v = add(v, load(type + c));
            if (place) v = add(v, load(place + c));
            store(row + c, v);
        }
        normalise(row, C, w.embedding_norm, w.shape.eps);
    }
}

template <class Op, class E>
void project_heads(const Shape& shape, const Layer& layer, const float* x, int rows, int from, int to, const Heads& heads, int at,
                   Scratch& s) {
    const auto a = make_operand<Op>(x, shape.C, rows, layer.qkv, s);
    const int part = shape.C / kPanel, D = shape.D;
    multiply<Op>(a, layer.qkv, from, to, rows, s, nullptr, [&](const Values<Op>& v, int r0, int r1) {
        void* base = v.panel < part ? heads.q : v.panel < 2 * part ? heads.k : heads.v;
        const int column = v.panel % part * kPanel;
        E* out = static_cast<E*>(base) + (static_cast<size_t>(column / D) * heads.capacity + at + v.first) * D + column % D;
        for (int r = r0; r < r1; ++r)
            for (int i = 0; i < v.kVectors; i += 2) store2(out + r * D + i * W, v.at(r, i), v.at(r, i + 1));
    });
}

// x += a W^T + b
template <class Op>
void add_product(const Operand<Op>& a, const Linear& w, float* x, int rows, Scratch& s, const std::byte* after) {
    multiply<Op>(a, w, 0, w.out / kPanel, rows, s, after, [&](const Values<Op>& v, int r0, int r1) {
        float* out = x + static_cast<size_t>(v.first) * w.out + v.panel * kPanel;
        for (int r = r0; r < r1; ++r)
            for (int i = 0; i < v.kVectors; ++i) store(out + r * w.out + i * W, add(load(out + r * w.out + i * W), v.at(r, i)));
    });
}

// hidden = activation(y W^T + b), with the gate of GEGLU if the model has one
template <class Op, class E>
void activate(const Operand<Op>& y, const Linear& w, bool geglu, E* hidden, int F_size, int rows, Scratch& s, const std::byte* after) {
    constexpr bool exact = same_type<Op, float>;
    constexpr int half = Values<Op>::kVectors / 2;
    const int panels = w.out / kPanel;
    if (geglu) {
        multiply<Op>(y, w, 0, panels, rows, s, after, [&](const Values<Op>& v, int r0, int r1) {
            E* out = hidden + static_cast<size_t>(v.first) * F_size + v.panel * (kPanel / 2);
            for (int r = r0; r < r1; ++r)
                for (int i = 0; i < half; ++i) store(out + r * F_size + i * W, mul(gelu<exact>(v.at(r, i)), v.at(r, half + i)));
        });
        return;
    }
    multiply<Op>(y, w, 0, panels, rows, s, after, [&](const Values<Op>& v, int r0, int r1) {
        E* out = hidden + static_cast<size_t>(v.first) * F_size + v.panel * kPanel;
        for (int r = r0; r < r1; ++r)
            for (int i = 0; i < v.kVectors; ++i) store(out + r * F_size + i * W, gelu<exact>(v.at(r, i)));
    });
}

template <class Op, class E>
void finish_layer(const Shape& shape, const Layer& layer, const void* attention, float* x, int rows, Scratch& s) {
    const int C = shape.C;
    add_product<Op>(make_operand<Op>(static_cast<const E*>(attention), C, rows, layer.out, s), layer.out, x, rows, s, layer.up.panels);
    for (int r = 0; r < rows; ++r) {
        float* row = x + static_cast<size_t>(r) * C;
        normalise(row, C, layer.norm1, shape.eps);
        if constexpr (!same_type<Op, float>) put_operand<Op>(row, r, layer.up, s);
    }
    Operand<Op> y = operand_of<Op>(layer.up, s);
    if constexpr (same_type<Op, float>) y = {x, C, nullptr};
    E* hidden = s.hidden.as<E>();
    activate<Op, E>(y, layer.up, shape.geglu, hidden, shape.F, rows, s, layer.down.panels);
    add_product<Op>(make_operand<Op>(hidden, shape.F, rows, layer.down, s), layer.down, x, rows, s, nullptr);
    for (int r = 0; r < rows; ++r) normalise(x + static_cast<size_t>(r) * C, C, layer.norm2, shape.eps);
}

void classify(const Weights& w, const float* first, int rows, float* logits, Scratch& s) {
    const int C = w.shape.C;
    float* pooled = s.hidden.as<float>();  // (rows, C)
    multiply<float>(Operand<float>{first, C, nullptr}, w.pooler, 0, C / kPanel, rows, s, nullptr, [&](const Values<float>& v, int r0, int r1) {
        float* out = pooled + static_cast<size_t>(v.first) * C + v.panel * kPanel;
        for (int r = r0; r < r1; ++r)
            for (int i = 0; i < v.kVectors; ++i) store(out + r * C + i * W, tanh_of(v.at(r, i)));
    });
    for (int r = 0; r < rows; ++r) {
        F sum = set(0.0f);
        for (int c = 0; c < C; c += W) sum = fma(load(pooled + static_cast<size_t>(r) * C + c), load(w.classifier + c), sum);
        logits[r] = hsum(sum) + w.classifier_bias;
    }
}

TR_INLINE void clear(float* row, int C) {
    for (int c = 0; c < C; c += W) store(row + c, set(0.0f));
}

// to = keep * to + weight * row
TR_INLINE void accumulate(float* to, float keep, const float* row, float weight, int C) {
    for (int c = 0; c < C; c += W) store(to + c, fma(set(weight), load(row + c), mul(set(keep), load(to + c))));
}

float cosine_of(const float* a, const float* b, int C) {
    F ab = set(0.0f), aa = ab, bb = ab;
    for (int c = 0; c < C; c += W) {
        const F x = load(a + c), y = load(b + c);
        ab = fma(x, y, ab), aa = fma(x, x, aa), bb = fma(y, y, bb);
    }
    const float norms = __builtin_sqrtf(hsum(aa)) * __builtin_sqrtf(hsum(bb));
    return hsum(ab) / (norms > 1e-12f ? norms : 1e-12f);
}

// scale * cos(sum of the rows of type 0, sum of the rows of type 1) + bias; both types are present. With the head
// "focus", passages of the second sum weigh 2^(focus * log2(e) * their own cosine), kept relative to the largest so far.
float cosine(const Weights& w, const float* x, const int32_t* types, int n, Scratch& s) {
    const int C = w.shape.C, size = w.shape.passage > 0 ? w.shape.passage : n;
    float *query = s.hidden.as<float>(), *document = query + C, *passage = document + C;
    clear(query, 3 * C);
    for (int t = 0; t < n; ++t)
        if (types[t] == 0) accumulate(query, 1.0f, x + static_cast<size_t>(t) * C, 1.0f, C);
    int last = n - 1, held = 0;
    while (types[last] == 0) --last;
    float top = -1e30f;  // not infinity: the power of two is made from its floor and fraction
    for (int t = 0; t <= last; ++t) {
        if (types[t] == 0) continue;
        accumulate(passage, 1.0f, x + static_cast<size_t>(t) * C, 1.0f, C);
        if (++held < size && t < last) continue;
        const float score = w.shape.passage > 0 ? w.cosine_focus * kLog2e * cosine_of(query, passage, C) : 0.0f;
        const float old = top;
        top = score > top ? score : top;
        accumulate(document, hmax(exp2<true>(set(old - top))), passage, hmax(exp2<true>(set(score - top))), C);
        clear(passage, C);
        held = 0;
    }
    return w.cosine_scale * cosine_of(query, document, C) + w.cosine_bias;
}

// ---------------------------------------------------------------------------------------------- attention

constexpr int kScoreStride = kKeyChunk + 16, kProbabilityStride = kKeyChunk + 32;  // elements; not a power of two
constexpr float kNoMaxBelow = 100.0f;  // log2: scores within +-100 neither overflow nor lose mass without a max

// Keys as panels of 32 (the right side of q k^T, depth D) and the largest |k|; values as panels of 32 columns
// (the right side of p v, depth = keys). Rows behind the pair's end are zero.
template <class E>
struct Memory {
    E *keys, *values;
    int padded;     // n rounded up to 32
    float longest;  // max |k|
};

template <class E>
Memory<E> pack_memory(const AttendJob& job, Scratch& s) {
    const int D = job.D, padded = round_up(job.n, kTile);
    Memory<E> m{s.keys.as<E>(), s.values.as<E>(), padded, 0.0f};
    const E *k = static_cast<const E*>(job.k), *v = static_cast<const E*>(job.v);
    F longest = set(0.0f);
    for (int j = 0; j < padded; j += kTile) {
        E* panel = m.keys + static_cast<size_t>(j) * D;
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
template <class E>
struct QueryTile {
    const AttendJob& job;
    const Memory<E>& memory;
    const E* q;
    int first, rows;
    const float* bias;  // bias[j - i] = -slope |i - j|
    float* scores;
    E* probabilities;
    float* context;     // (32, D): sum of p v
    bool online;        // subtract a running maximum
    float top[kTile], mass[kTile];  // log2 offset and sum of 2^(score - top) of each row

    // Visits keys [lo, hi), both multiples of 32, at most kKeyChunk of them.
    template <bool exact>
    void visit(int lo, int hi, bool fresh) {
        for (int j = lo; j < hi; j += kPanel)
            gemm(q, job.D, rows, reinterpret_cast<const std::byte*>(memory.keys + static_cast<size_t>(j) * job.D), job.D,
                 scores + (j - lo), kScoreStride, false, Nothing{});
        const int real = at_most(hi, job.n) - lo;
        for (int r = 0; r < rows; ++r) {
            const float* row_bias = bias + (lo - first - r);
            if (online) shift(r, row_bias, real, fresh);
            const float sum = online ? exponentiate<exact, true>(r, row_bias, real, hi - lo) : exponentiate<exact, false>(r, row_bias, real, hi - lo);
            mass[r] = fresh ? sum : mass[r] + sum;
        }
        for (int c = 0; c < job.D; c += kPanel) {
            const E* panel = memory.values + static_cast<size_t>(c) * memory.padded + static_cast<size_t>(lo) * kPanel;
            gemm(probabilities, kProbabilityStride, rows, reinterpret_cast<const std::byte*>(panel), hi - lo, context + c, job.D,
                 !fresh, Nothing{});
        }
    }

    // Scores of one row to probabilities; returns their sum. Without `shifted` the row's offset is 0.
    template <bool exact, bool shifted>
    TR_INLINE float exponentiate(int r, const float* row_bias, int real, int padded) {
        const float* row = scores + r * kScoreStride;
        E* to = probabilities + r * kProbabilityStride;
        const F offset = set(top[r]);
        const auto probability = [&](int j) {
            const F score = add(load(row + j), load(row_bias + j));
            return exp2<exact>(shifted ? sub(score, offset) : score);
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

// The keys that can matter to a tile, given the mass its rows have found so far. Row i may skip every key at a
// distance >= d on one side if  2^bound_i * sum_{k>=d} 2^(-slope k)  <=  1e-6 * mass_i 2^top_i.
template <class E>
void reach(const QueryTile<E>& t, int* lo, int* hi) {
    const float slope = t.job.slope;
    const float series = -__builtin_log2f(1.0f - __builtin_exp2f(-slope));
    for (int r = 0; r < t.rows; ++r) {
        const float gap = t.score_bound(r) + series - kSkipLog2 - __builtin_log2f(t.mass[r]) - t.top[r];
        const float steps = gap / slope;
        const int distance = steps < 1.0f ? 1 : steps < static_cast<float>(t.job.n) ? static_cast<int>(steps) + 1 : t.job.n;
        *lo = at_most(*lo, at_least(0, t.first + r - distance + 1) / kTile * kTile);
        *hi = at_least(*hi, at_most(t.memory.padded, round_up(t.first + r + distance, kTile)));
    }
}

// ALiBi attention of one head, queries [from, to): tiles of 32 queries, each walking outward from its own place.
template <class E, bool exact>
void attend(const AttendJob& job, Scratch& s) {
    const Memory<E> memory = pack_memory<E>(job, s);
    float* bias = s.bias.as<float>() + memory.padded + kTile;
    for (int x = -memory.padded - kTile; x < memory.padded + kTile; ++x) bias[x] = -job.slope * static_cast<float>(x < 0 ? -x : x);
    const bool skips = job.alibi && job.slope > 0.0f;

    for (int first = job.from; first < job.to; first += kTile) {
        QueryTile<E> t{job, memory, static_cast<const E*>(job.q) + static_cast<size_t>(first) * job.D, first,
                       at_most(kTile, job.to - first), bias, s.scores.as<float>(), s.probabilities.as<E>(), s.context.as<float>(),
                       false, {}, {}};
        t.online = !(t.query_bound() * memory.longest <= kNoMaxBelow);
        int lo = 0, hi = memory.padded, near_lo = 0, near_hi = memory.padded;
        if (memory.padded > kKeyChunk) {
            const int aside = (kKeyChunk - kTile) / 2 / kTile * kTile;
            near_lo = at_least(0, first - aside), near_hi = at_most(memory.padded, first + kTile + aside);
        }
        t.template visit<exact>(near_lo, near_hi, true);
        if (skips && memory.padded > kKeyChunk) {
            lo = near_lo, hi = near_hi;
            reach(t, &lo, &hi);
        }
        for (int j = near_lo; j > lo; j -= kKeyChunk) t.template visit<exact>(at_least(lo, j - kKeyChunk), j, false);
        for (int j = near_hi; j < hi; j += kKeyChunk) t.template visit<exact>(j, at_most(hi, j + kKeyChunk), false);

        for (int r = 0; r < t.rows; ++r) {
            E* out = static_cast<E*>(job.out) + static_cast<size_t>(first + r) * job.out_stride;
            const F inverse = set(1.0f / t.mass[r]);
            for (int c = 0; c < job.D; c += W) store(out + c, mul(load(t.context + r * job.D + c), inverse));
        }
    }
}

// The first query alone: one row of scores, in float.
template <class E, bool exact>
void attend_first(const AttendJob& job, Scratch& s) {
    const E *q = static_cast<const E*>(job.q), *k = static_cast<const E*>(job.k), *v = static_cast<const E*>(job.v);
    float* scores = s.bias.as<float>();
    float top = -3.0e38f;
    for (int j = 0; j < job.n; ++j) {
        F dot = set(0.0f);
        for (int c = 0; c < job.D; c += W) dot = fma(load(q + c), load(k + static_cast<size_t>(j) * job.D + c), dot);
        scores[j] = hsum(dot) - job.slope * static_cast<float>(j);
        top = scores[j] > top ? scores[j] : top;
    }
    F sum = set(0.0f);
    for (int j = 0; j < job.n; j += W) {
        const F p = keep_first(exp2<exact>(sub(load(scores + j), set(top))), job.n - j, 0.0f);
        sum = add(sum, p);
        store(scores + j, p);
    }
    const F inverse = set(1.0f / hsum(sum));
    for (int c = 0; c < job.D; c += W) {
        F total = set(0.0f);
        for (int j = 0; j < job.n; ++j) total = fma(set(scores[j]), load(v + static_cast<size_t>(j) * job.D + c), total);
        store(static_cast<E*>(job.out) + c, mul(total, inverse));
    }
}

template <class Op, class E>
constexpr Kernels table(const char* name, void (*enter)(), void (*leave)()) {
    constexpr bool exact = same_type<Op, float>;
    return {name, sizeof(E), enter, leave, embed, project_heads<Op, E>, attend<E, exact>, attend_first<E, exact>,
            finish_layer<Op, E>, classify, cosine};
}
