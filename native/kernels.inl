// The kernels of the table in kernels.h, written once against the vocabulary that each isa_*.cpp defines first: the
// vector F with its operations, multiply() (blocks.inl, or the tiles of isa_amx.cpp) and attention.

// Quantised to int8: value = scale * int8, scale = max|row| / 127; or, of rows that lie above `least`, value = least +
// scale * (int8 + 128), where the sums of products begin with the 128 and the bias has the rest (pack.cpp). Padding
// columns meet weights of zero. `to` is the row's place in the operand, whose order is the instruction set's own.
template <class E>
void quantise(const E* row, const Linear& w, Int8* to, float* scale) {
    const bool centred = w.least == 0.0f;
    const float range = centred ? largest_size(row, w.in) : largest_value(row, w.in) - w.least, steps = centred ? 127.0f : 255.0f;
    const F inverse = set(range > 0.0f ? steps / range : 0.0f), start = set(centred ? 0.0f : -w.least * steps / range - 128.0f);
    *scale = range / steps;
    for (int c = 0; c < w.in; c += W) store_int8(to + int8_column(c), fma(load(row + c), inverse, start));
    for (int c = w.in; c < w.depth; c += W) store_int8(to + int8_column(c), set(0.0f));
}

// Row `r` of a product's left side made from a row of floats or bf16.
template <class Op, class E>
TR_INLINE void put_operand(const E* row, int r, const Linear& w, Scratch& s) {
    if constexpr (same_type<Op, Int8>) {
        Op* to = s.operand.as<Op>() + int8_row(r, w.depth);
        float* scale = s.row_scale.as<float>() + r;
        if constexpr (same_type<E, float>) {
            if (w.mixed) {
                mix(row, w.in, s.mixed.as<float>());
                return quantise(s.mixed.as<float>(), w, to, scale);
            }
        }
        quantise(row, w, to, scale);
    } else {
        Op* to = s.operand.as<Op>() + static_cast<size_t>(r) * w.depth;
        for (int c = 0; c < w.in; c += W) store(to + c, load(row + c));
    }
}

template <class Op>
TR_INLINE Operand<Op> operand_of(const Linear& w, Scratch& s) {
    return {s.operand.as<Op>(), w.depth, s.row_scale.as<float>()};
}

// The whole left side.
template <class Op, class E>
Operand<Op> put_operands(const E* rows, int stride, int count, const Linear& w, Scratch& s) {
    const Lap lap(s, kQuantise);
    for (int r = 0; r < count; ++r) put_operand<Op>(rows + static_cast<size_t>(r) * stride, r, w, s);
    return operand_of<Op>(w, s);
}

// Likewise, but rows that already have the operand's type are used where they lie. A tile may be higher than what is
// left, so nobody may be writing the rows behind them.
template <class Op, class E>
Operand<Op> make_operand(const E* rows, int stride, int count, const Linear& w, Scratch& s) {
    if constexpr (same_type<Op, E>) return {rows, stride, nullptr};
    else return put_operands<Op>(rows, stride, count, w, s);
}

void normalise(float* row, int C, const Norm& norm, float eps) {
    const auto total = [&](const auto& term) TR_LAMBDA {  // two sums, which do not wait for each other
        F even = set(0.0f), odd = even;
        for (int c = 0; c < C; c += 2 * W) even = term(load(row + c), even), odd = term(load(row + c + W), odd);
        return hsum(add(even, odd)) / static_cast<float>(C);
    };
    const F mean = set(total([](const F& x, const F& sum) TR_LAMBDA { return add(sum, x); }));
    const float variance = total([&](const F& x, const F& sum) TR_LAMBDA {
        const F d = sub(x, mean);
        return fma(d, d, sum);
    });
    const F inverse = set(1.0f / __builtin_sqrtf(variance + eps));
    for (int c = 0; c < C; c += W)
        store(row + c, fma(mul(sub(load(row + c), mean), inverse), load(norm.weight + c), load(norm.bias + c)));
}

TR_INLINE F load_word(const Table& t, int id, int C, int c) {
    const size_t at = static_cast<size_t>(id) * C + c;
    if (t.stored == Stored::i8) return mul(load(static_cast<const int8_t*>(t.data) + at), set(t.scale[id]));
    if (t.stored == Stored::f16) return load_half(static_cast<const uint16_t*>(t.data) + at);
    if (t.stored == Stored::bf16) return load(static_cast<const bf16*>(t.data) + at);
    return load(static_cast<const float*>(t.data) + at);
}

void embed(const Weights& w, const int32_t* ids, const int32_t* types, const int32_t* positions, int rows, float* x, Scratch& s) {
    const Lap lap(s, kEmbed);
    const int C = w.shape.C;
    const size_t row_bytes = (w.words.stored == Stored::i8 ? 1 : w.words.stored == Stored::f32 ? 4 : 2) * static_cast<size_t>(C);
    const std::byte* words = static_cast<const std::byte*>(w.words.data);
    for (int r = 0; r < rows; ++r) {
        // Rows of the table are anywhere in memory: the one after the next is fetched meanwhile.
        for (size_t at = 0; r + 2 < rows && at < row_bytes; at += 64) prefetch(words + static_cast<size_t>(ids[r + 2]) * row_bytes + at);
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
void project_heads(const Shape& shape, const Layer& layer, const float* x, int rows, const Heads& heads, int at, Scratch& s) {
    const auto a = put_operands<Op>(x, shape.C, rows, layer.qkv, s);
    const Lap lap(s, kQkv);
    const int C = shape.C, D = shape.D;
    multiply<Op>(a, layer.qkv, 0, 3 * C / kPanel, rows, s, nullptr, [&](int column) {
        void* base = column < C ? heads.q : column < 2 * C ? heads.k : heads.v;
        const int c = column % C;
        E* out = static_cast<E*>(base) + (static_cast<size_t>(c / D) * heads.capacity + at) * D + c % D;
        return [=](int r, F left, F right) TR_LAMBDA { store2(out + r * D, left, right); };
    });
}

// x += a W^T + b. What is added to was last touched a phase ago: it is fetched while the sums are formed.
template <class Op>
void add_product(const Operand<Op>& a, const Linear& w, float* x, int rows, Scratch& s, const std::byte* after) {
    multiply<Op>(a, w, 0, w.out / kPanel, rows, s, after, [&](int column) {
        float* out = x + column;
        const int stride = w.out;
        return [=](int r, F left, F right) TR_LAMBDA {
            float* y = out + static_cast<size_t>(r) * stride;
            store2(y, add(load(y), left), add(load(y + W), right));
        };
    }, [&](int column, int row, int count) TR_LAMBDA {
        for (int r = row; r < row + count; ++r)
            for (int c = column; c < column + 2 * W; c += 16) prefetch(x + static_cast<size_t>(r) * w.out + c);
    });
}

// hidden = activation(y W^T + b), with the gate of GEGLU if the model has one
template <class Op, class E>
void activate(const Operand<Op>& y, const Linear& w, bool geglu, E* hidden, int F_size, int rows, Scratch& s, const std::byte* after) {
    constexpr bool exact = same_type<Op, float>;
    if (geglu) {
        multiply<Op>(y, w, 0, w.out / kPanel, rows, s, after, [&](int column) {
            E* out = hidden + column / 2;
            return [=](int r, F left, F right) TR_LAMBDA { store(out + static_cast<size_t>(r) * F_size, mul(gelu<exact>(left), right)); };
        });
        return;
    }
    multiply<Op>(y, w, 0, w.out / kPanel, rows, s, after, [&](int column) {
        E* out = hidden + column;
        return [=](int r, F left, F right) TR_LAMBDA { store2(out + static_cast<size_t>(r) * F_size, gelu<exact>(left), gelu<exact>(right)); };
    });
}

template <class Op, class E>
void finish_layer(const Shape& shape, const Layer& layer, const void* attention, float* x, int rows, Scratch& s) {
    const int C = shape.C;
    const auto a = make_operand<Op>(static_cast<const E*>(attention), C, rows, layer.out, s);
    {
        const Lap lap(s, kOut);
        add_product<Op>(a, layer.out, x, rows, s, layer.up.panels);
    }
    {
        const Lap lap(s, kNorm);
        for (int r = 0; r < rows; ++r) {
            float* row = x + static_cast<size_t>(r) * C;
            normalise(row, C, layer.norm1, shape.eps);
            put_operand<Op>(row, r, layer.up, s);
        }
    }
    E* hidden = s.hidden.as<E>();
    {
        const Lap lap(s, kUp);
        activate<Op, E>(operand_of<Op>(layer.up, s), layer.up, shape.geglu, hidden, shape.F, rows, s, layer.down.panels);
    }
    const auto h = make_operand<Op>(hidden, shape.F, rows, layer.down, s);
    {
        const Lap lap(s, kDown);
        add_product<Op>(h, layer.down, x, rows, s, nullptr);
    }
    const Lap lap(s, kNorm);
    for (int r = 0; r < rows; ++r) normalise(x + static_cast<size_t>(r) * C, C, layer.norm2, shape.eps);
}

void classify(const Weights& w, const float* first, int rows, float* logits, Scratch& s) {
    const Lap lap(s, kHead);
    const int C = w.shape.C;
    float* pooled = s.hidden.as<float>();  // (rows, C)
    multiply<float>(Operand<float>{first, C, nullptr}, w.pooler, 0, C / kPanel, rows, s, nullptr, [&](int column) {
        float* out = pooled + column;
        return [=](int r, F left, F right) TR_LAMBDA { store2(out + static_cast<size_t>(r) * C, tanh_of(left), tanh_of(right)); };
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
    const Lap lap(s, kHead);
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

#include "attention_first.inl"

template <class Op, class E>
constexpr Kernels table(const char* name, int row_tile, int lowest_tile, int block_rows, void (*enter)(), void (*leave)()) {
    constexpr bool exact = same_type<Op, float>;
    return {name, sizeof(E), kTiles, kInt8Group, kInt8Offset, W, row_tile, lowest_tile, block_rows, enter, leave, embed, project_heads<Op, E>, attend<E, exact>, attend_first<Op, E>,
            finish_layer<Op, E>, classify, cosine};
}
