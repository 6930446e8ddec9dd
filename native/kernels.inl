// The kernels of the table in kernels.h, written once against the names that each isa_*.cpp defines first: the vector F
// with its operations, multiply() (blocks.inl, or the tiles of isa_amx.cpp) and attention.

constexpr float kHalf = kInt8Offset == 64 ? 64.0f : 128.0f;  // int8 activations are between -kHalf and kHalf - 1

// Quantises a row (w.in,) to int8 as row r of the operand. Symmetric: value = scale * int8, scale = max|row| / 127. If the
// operand has a lower bound (w.least), this row's bound is `least` and value = least + scale * (int8 + 128); the initial sums
// account for the 128 and the bias for w.least (native_weights.py). With activations of 7 bits (isa_avx2.cpp, `seven`) 127 is 63 and
// 128 is 64. Padding columns are multiplied by zero weights. With `keep`, the residual of the rounding is written to s.mixed,
// which may be the row itself; with a bound it is never negative.
template <bool keep, class E>
void quantise(const E* row, const Linear& w, float least, int r, Scratch& s) {
    const bool centred = w.least == 0.0f;
    const float range = centred ? largest<true>(row, w.in) : largest<false>(row, w.in) - least, steps = centred ? kHalf - 1 : 2 * kHalf - 1;
    const float scale = s.row_scale.as<float>()[r] = range / steps;
    const F inverse = set(range > 0.0f ? steps / range : 0.0f), start = set(centred ? 0.0f : -least * steps / range - (keep ? kHalf + 0.5f : kHalf));
    const F step = set(scale), zero = set(centred ? 0.0f : least + kHalf * scale);  // used with `keep` only
    Int8* to = s.operand.as<Int8>() + int8_row(r, w.depth);
    float* rest = s.mixed.as<float>();
    for (int c = 0; c < w.in; c += W) {
        const F x = load(row + c), n = fma(x, inverse, start);
        store_int8(to + int8_column(c), n);
        if constexpr (keep) store(rest + c, x - zero - round(n) * step);
    }
    for (int c = w.in; c < w.depth; c += W) store_int8(to + int8_column(c), set(0.0f));
}

TR_INLINE void normalise(const float* row, float* to, int C, const Norm& norm, float eps) {
    const auto total = [&](const auto& term) TR_LAMBDA {  // two independent sums
        F even = set(0.0f), odd = even;
        for (int c = 0; c < C; c += 2 * W) even = even + term(load(row + c)), odd = odd + term(load(row + c + W));
        return hsum(even + odd) / static_cast<float>(C);
    };
    const F mean = set(total([](const F& x) TR_LAMBDA { return x; }));
    const float variance = total([&](const F& x) TR_LAMBDA { return (x - mean) * (x - mean); });
    const F inverse = set(1.0f / __builtin_sqrtf(variance + eps));
    for (int c = 0; c < C; c += W) store(to + c, fma((load(row + c) - mean) * inverse, load(norm.weight + c), load(norm.bias + c)));
}

void normalise_rows(float* x, int rows, int C, const Norm& norm, float eps, Scratch& s) {
    const Lap lap(s, kNorm);
    for (int r = 0; r < rows; ++r) normalise(x + static_cast<size_t>(r) * C, x + static_cast<size_t>(r) * C, C, norm, eps);
}

// Converts rows of float or bf16 to the left side of a product, after a norm if one is given. With int8 and `types`, rows of
// type 0 (query-token rows, which the cosine heads average over few tokens) use two-term int8: the residual is quantised as
// an extra row after all others, and its product initialises the accumulator of the row.
template <class Op, class E>
Operand<Op> put_operands(const E* rows, int stride, int count, const int32_t* types, const Linear& w, Scratch& s, Norm norm = {}, float eps = 0.0f) {
    const Lap lap(s, kQuantise);
    Operand<Op> a{s.operand.as<Op>(), w.depth, s.row_scale.as<float>(), s.starts.as<const float*>(), 0, round_up(count, kTile)};
    for (int r = 0; r < count; ++r) {
        const E* row = rows + static_cast<size_t>(r) * stride;
        if constexpr (same_type<E, float>)
            if (norm.weight) {
                normalise(row, s.normed.as<float>(), w.in, norm, eps);
                row = s.normed.as<float>();
            }
        if constexpr (!same_type<Op, Int8>) {
            for (int c = 0; c < w.in; c += W) store(s.operand.as<Op>() + static_cast<size_t>(r) * w.depth + c, load(row + c));
        } else {
            const bool fine = types && types[r] == 0;
            if (types) s.starts.as<const float*>()[r] = fine ? s.low.as<float>() + static_cast<size_t>(a.fine) * kPanel : nullptr;
            const auto put = [&](const auto* from) TR_LAMBDA {
                if (!fine) return quantise<false>(from, w, w.least, r, s);
                quantise<true>(from, w, w.least, r, s);
                quantise<false>(s.mixed.as<float>(), w, 0.0f, a.rest + a.fine++, s);
            };
            if constexpr (same_type<E, float>) if (w.mixed) mix(row, w.in, s.mixed.as<float>());
            w.mixed ? put(s.mixed.as<float>()) : put(row);
        }
    }
    return a;
}

// Like put_operands(), but rows that already have the operand's type are used in place. A tile may read beyond the last
// row, so no other thread may write the rows after it.
template <class Op, class E>
Operand<Op> make_operand(const E* rows, int stride, int count, const int32_t* types, const Linear& w, Scratch& s) {
    if constexpr (same_type<Op, E>) return {rows, stride};
    else return put_operands<Op>(rows, stride, count, types, w, s);
}

// multiply() for operands with two-term rows, panel by panel. A separate function, so that the usual case is compiled
// without the additional code.
template <class Op, class At, class Expect>
__attribute__((noinline)) void multiply_fine(Operand<Op> a, const Linear& w, int rows, Scratch& s, const std::byte* after, At at, Expect expect) {
    const Operand<Op> rest{a.rows + static_cast<size_t>(a.rest) * a.stride, a.stride, a.scale + a.rest};
    for (int first = 0; first < w.out; first += kPanel) {
        Linear one = w;
        one.out = kPanel, one.panels = w.panel(first / kPanel), one.scale += first, one.bias += first;
        multiply<Op>(rest, one, a.fine, s, one.panels, [low = s.low.as<float>()](int column) TR_LAMBDA {
            return [=](int r, F left, F right) TR_LAMBDA { store2(low + r * kPanel + column, left, right); };
        });
        multiply<Op, true>(a, one, rows, s, first + kPanel < w.out ? w.panel(first / kPanel + 1) : after,
            [=](int column) TR_LAMBDA { return at(first + column); },
            [=](int column, int row, int count) TR_LAMBDA { expect(first + column, row, count); });
    }
}

template <class Op, class At, class Expect = Nothing>
TR_INLINE void multiply_all(const Operand<Op>& a, const Linear& w, int rows, Scratch& s, const std::byte* after, const At& at, const Expect& expect = {}) {
    if (same_type<Op, Int8> && a.fine) [[unlikely]] multiply_fine(a, w, rows, s, after, at, expect);
    else multiply<Op>(a, w, rows, s, after, at, expect);
}

TR_INLINE F load_word(const Weights& w, int id, int c) {
    const size_t at = static_cast<size_t>(id) * w.shape.C + c;
    if (w.shape.stored == Stored::i8) return load(reinterpret_cast<const int8_t*>(w.words) + at) * set(w.word_scale[id]);
    if (w.shape.stored == Stored::f16) return load_half(reinterpret_cast<const uint16_t*>(w.words) + at);
    if (w.shape.stored == Stored::bf16) return load(reinterpret_cast<const bf16*>(w.words) + at);
    return load(reinterpret_cast<const float*>(w.words) + at);
}

void embed(const Weights& w, const int32_t* ids, const int32_t* types, const int32_t* positions, int rows, float* x, Scratch& s) {
    const Lap lap(s, kEmbed);
    const int C = w.shape.C;
    const size_t row_bytes = (w.shape.stored == Stored::i8 ? 1 : w.shape.stored == Stored::f32 ? 4 : 2) * static_cast<size_t>(C);
    for (int r = 0; r < rows; ++r) {
        // Rows of the table are scattered in memory, so the row after the next is prefetched.
        for (size_t at = 0; r + 2 < rows && at < row_bytes; at += 64) prefetch(w.words + static_cast<size_t>(ids[r + 2]) * row_bytes + at);
        float* row = x + static_cast<size_t>(r) * C;
        const float* type = w.types ? w.types + static_cast<size_t>(types[r]) * C : nullptr;
        const float* place = w.positions ? w.positions + static_cast<size_t>(positions[r]) * C : nullptr;
        for (int c = 0; c < C; c += W) {
            F v = load_word(w, ids[r], c);
            if (type) v = v + load(type + c);
            if (place) v = v + load(place + c);
            store(row + c, v);
        }
        normalise(row, row, C, w.embedding_norm, w.shape.eps);
    }
}

// The product of project_heads(). `turned`: RoPE rotates q and k; each position and pair of columns has its own angle.
template <bool turned, class Op, class E>
__attribute__((noinline)) void project(const Operand<Op>& a, const Shape& shape, const Layer& layer, Columns columns, const int32_t* positions, int rows,
                                       Heads heads, int at, Scratch& s) {
    const Lap lap(s, kQkv);
    const int C = shape.C, D = shape.D, skipped = columns == Columns::keys_and_values ? C : 0;
    Linear w = layer.qkv;
    w.out = columns == Columns::all ? 3 * C : columns == Columns::queries ? C : 2 * C;
    w.panels = w.panel(skipped / kPanel), w.scale += skipped, w.bias += skipped;
    multiply_all<Op>(a, w, rows, s, nullptr, [=](int from) TR_LAMBDA {
        const int column = from + skipped;
        void* base = column < C ? heads.q : column < 2 * C ? heads.k : heads.v;
        const int c = column % C;
        E* out = static_cast<E*>(base) + (static_cast<size_t>(c / D) * heads.capacity + at) * D + c % D;
        const float* angles = turned && column < 2 * C ? layer.rope + c % D / 2 : nullptr;
        return [=](int r, F left, F right) TR_LAMBDA {
            if (turned && angles) {
                const float* turn = angles + static_cast<size_t>(positions[r]) * D;
                const F cosine = load(turn), sine = load(turn + D / 2);
                store2(out + r * D, left * cosine - right * sine, right * cosine + left * sine);
            } else {
                store2(out + r * D, left, right);
            }
        };
    });
}

template <class Op, class E>
void project_heads(const Shape& shape, const Layer& layer, Columns columns, const float* x, const int32_t* types, const int32_t* positions, int rows,
                   Heads heads, int at, Scratch& s) {
    const auto a = put_operands<Op>(x, shape.C, rows, types, layer.qkv, s, shape.prenorm ? layer.norm1 : Norm{}, shape.eps);
    if (layer.rope) project<true, Op, E>(a, shape, layer, columns, positions, rows, heads, at, s);
    else project<false, Op, E>(a, shape, layer, columns, positions, rows, heads, at, s);
}

// x += a W^T + b. x was last used a phase ago, so it is prefetched while the sums are computed.
template <class Op>
void add_product(Part part, const Operand<Op>& a, const Linear& w, float* x, int rows, Scratch& s, const std::byte* after) {
    const Lap lap(s, part);
    const int stride = w.out;
    multiply_all<Op>(a, w, rows, s, after, [=](int column) TR_LAMBDA {
        float* out = x + column;
        return [=](int r, F left, F right) TR_LAMBDA {
            float* y = out + static_cast<size_t>(r) * stride;
            store2(y, load(y) + left, load(y + W) + right);
        };
    }, [=](int column, int row, int count) TR_LAMBDA {
        for (int r = row; r < row + count; ++r)
            for (int c = column; c < column + 2 * W; c += 16) prefetch(x + static_cast<size_t>(r) * stride + c);
    });
}

// hidden = activation(y W^T + b), with GEGLU's gate if the model has one. Not inlined: inside finish_layer() gcc 12 spills
// the sums.
template <class Op, bool geglu, class E>
__attribute__((noinline)) void activate(const Operand<Op>& y, const Linear& w, E* hidden, int F_size, int rows, Scratch& s, const std::byte* after) {
    const Lap lap(s, kUp);
    constexpr bool exact = same_type<Op, float>;
    multiply_all<Op>(y, w, rows, s, after, [=](int column) TR_LAMBDA {
        E* out = hidden + (geglu ? column / 2 : column);
        return [=](int r, F left, F right) TR_LAMBDA {
            if constexpr (geglu) store(out + static_cast<size_t>(r) * F_size, gelu<exact>(left) * right);
            else store2(out + static_cast<size_t>(r) * F_size, gelu<exact>(left), gelu<exact>(right));
        };
    });
}

template <class Op, class E>
void finish_layer(const Shape& shape, const Layer& layer, const void* attention, float* x, const int32_t* types, int rows, Scratch& s) {
    const int C = shape.C;
    E* hidden = s.hidden.as<E>();
    add_product<Op>(kOut, make_operand<Op>(static_cast<const E*>(attention), C, rows, types, layer.out, s), layer.out, x, rows, s, layer.up.panels);
    if (!shape.prenorm) normalise_rows(x, rows, C, layer.norm1, shape.eps, s);
    const auto y = put_operands<Op>(x, C, rows, types, layer.up, s, shape.prenorm ? layer.norm2 : Norm{}, shape.eps);
    if (shape.geglu) activate<Op, true>(y, layer.up, hidden, shape.F, rows, s, layer.down.panels);
    else activate<Op, false>(y, layer.up, hidden, shape.F, rows, s, layer.down.panels);
    add_product<Op>(kDown, make_operand<Op>(hidden, shape.F, rows, types, layer.down, s), layer.down, x, rows, s, nullptr);
    if (!shape.prenorm) normalise_rows(x, rows, C, layer.norm2, shape.eps, s);
}

TR_INLINE void clear(float* row, int C) {
    for (int c = 0; c < C; c += W) store(row + c, set(0.0f));
}

// to = keep * to + weight * row
TR_INLINE void accumulate(float* to, float keep, const float* row, float weight, int C) {
    for (int c = 0; c < C; c += W) store(to + c, fma(set(weight), load(row + c), set(keep) * load(to + c)));
}

void average(const Weights& w, const float* x, int n, float* out, Scratch& s) {
    const Lap lap(s, kHead);
    const int C = w.shape.C;
    float* row = s.normed.as<float>();
    clear(out, C);
    for (int t = 0; t < n; ++t) {
        normalise(x + static_cast<size_t>(t) * C, row, C, w.final_norm, w.shape.eps);
        accumulate(out, 1.0f, row, 1.0f, C);
    }
    accumulate(out, 1.0f / static_cast<float>(n), row, 0.0f, C);
}

void classify(const Weights& w, const float* first, int rows, float* logits, Scratch& s) {
    const Lap lap(s, kHead);
    const int C = w.shape.C;
    float* pooled = s.hidden.as<float>();  // (rows, C)
    const bool gelu_head = w.shape.gelu_head;
    if (w.final_norm.weight && !w.shape.mean) {
        float* normed = s.operand.as<float>();
        for (int r = 0; r < rows; ++r) normalise(first + static_cast<size_t>(r) * C, normed + static_cast<size_t>(r) * C, C, w.final_norm, w.shape.eps);
        first = normed;
    }
    multiply<float>(Operand<float>{first, C}, w.pooler, rows, s, nullptr, [&](int column) {
        float* out = pooled + column;
        return [=](int r, F left, F right) TR_LAMBDA {
            float* y = out + static_cast<size_t>(r) * C;
            if (gelu_head) store2(y, gelu<true>(left), gelu<true>(right));
            else store2(y, tanh_of(left), tanh_of(right));
        };
    });
    if (w.head_norm.weight) normalise_rows(pooled, rows, C, w.head_norm, w.shape.eps, s);
    for (int r = 0; r < rows; ++r) {
        F sum = set(0.0f);
        for (int c = 0; c < C; c += W) sum = fma(load(pooled + static_cast<size_t>(r) * C + c), load(w.head + c), sum);
        logits[r] = hsum(sum) + w.head[C];
    }
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

// scale * cos(sum of the rows of type 0, sum of the rows of type 1) + bias; both types are present. In the "focus" head
// each passage of the second sum has the weight 2^(focus * log2(e) * its cosine), relative to the maximum so far.
float cosine(const Weights& w, const float* x, const int32_t* types, int n, Scratch& s) {
    const Lap lap(s, kHead);
    const int C = w.shape.C, size = w.shape.passage > 0 ? w.shape.passage : n;
    float *query = s.hidden.as<float>(), *document = query + C, *passage = document + C;
    clear(query, 3 * C);
    for (int t = 0; t < n; ++t)
        if (types[t] == 0) accumulate(query, 1.0f, x + static_cast<size_t>(t) * C, 1.0f, C);
    int last = n - 1, held = 0;
    while (types[last] == 0) --last;
    float top = -1e30f;  // finite, because exp2 splits its argument into floor and fraction
    for (int t = 0; t <= last; ++t) {
        if (types[t] == 0) continue;
        accumulate(passage, 1.0f, x + static_cast<size_t>(t) * C, 1.0f, C);
        if (++held < size && t < last) continue;
        const float score = w.shape.passage > 0 ? w.similarity[2] * kLog2e * cosine_of(query, passage, C) : 0.0f;
        const float old = top;
        top = score > top ? score : top;
        accumulate(document, hmax(exp2<true>(set(old - top))), passage, hmax(exp2<true>(set(score - top))), C);
        clear(passage, C);
        held = 0;
    }
    return w.similarity[0] * cosine_of(query, document, C) + w.similarity[1];
}

#include "attention_first.inl"

template <class Op, class E>
constexpr Kernels table(const char* name, int block_rows, void (*enter)(), void (*leave)()) {
    constexpr bool exact = same_type<Op, float>;
    constexpr Precision precision = same_type<Op, Int8> ? Precision::int8 : exact ? Precision::fp32 : Precision::bf16;
    return {precision, name, sizeof(E), kTiles, kInt8Group, kInt8Offset, W, kTiled<Op> ? kTile : kRowsAtOnce, kTiled<Op> ? kTile : kLowestTile,
            block_rows, enter, leave, embed, project_heads<Op, E>, attend<E, exact>, attend_first<Op, E>, finish_layer<Op, E>, average, classify, cosine};
}
