// The kernels of the table in kernels.h, written once against the vocabulary that each isa_*.cpp defines first: the
// vector F with its operations, multiply() (blocks.inl, or the tiles of isa_amx.cpp) and attention.

// Rounded to int8: value = scale * int8, scale = max|row| / 127; or, of a row that is not `centred` but lies above `least`,
// value = least + scale * (int8 + 128), where the sums of products begin with the 128 and the bias has `least` (pack.cpp).
// Padding columns meet weights of zero. `to` is the row's place in the operand, whose order is the instruction set's own.
// `rest`, with `keep`, receives what rounding left; of a row that is not centred that is never negative.
template <bool keep, class E>
void quantise(const E* row, const Linear& w, bool centred, float least, Int8* to, float* scale, float* rest) {
    const float range = centred ? largest_size(row, w.in) : largest_value(row, w.in) - least, steps = centred ? 127.0f : 255.0f;
    const F inverse = set(range > 0.0f ? steps / range : 0.0f);
    const F start = set(centred ? 0.0f : -least * steps / range - (keep ? 128.5f : 128.0f));
    *scale = range / steps;
    const F step = set(*scale), zero = set(centred ? 0.0f : least + 128.0f * *scale);  // with `keep` only
    for (int c = 0; c < w.in; c += W) {
        const F x = load(row + c), n = fma(x, inverse, start);
        store_int8(to + int8_column(c), n);
        if constexpr (keep) store(rest + c, sub(sub(x, zero), mul(round(n), step)));
    }
    for (int c = w.in; c < w.depth; c += W) store_int8(to + int8_column(c), set(0.0f));
}

// multiply() where some rows are fine. Compiled apart, because the others are not to wait for what these need.
template <class Op, class At, class Expect>
__attribute__((noinline)) void multiply_fine(Operand<Op> a, const Linear& w, int rows, Scratch& s, const std::byte* after, At at, Expect expect) {
    const Operand<Op> rest{a.rows + static_cast<size_t>(a.rest) * a.stride, a.stride, a.scale + a.rest};
    multiply<Op>(rest, w, a.fine, s, w.panels, [low = s.low.as<float>(), stride = static_cast<size_t>(w.out)](int column) TR_LAMBDA {
        return [=, out = low + column](int r, F left, F right) TR_LAMBDA { store2(out + r * stride, left, right); };
    });
    multiply<Op, true>(a, w, rows, s, after, at, expect);
}

template <class Op, class At, class Expect = Nothing>
TR_INLINE void multiply_all(const Operand<Op>& a, const Linear& w, int rows, Scratch& s, const std::byte* after, const At& at, const Expect& expect = {}) {
    if (same_type<Op, Int8> && a.fine) [[unlikely]] multiply_fine(a, w, rows, s, after, at, expect);
    else multiply<Op>(a, w, rows, s, after, at, expect);
}

// The left side of a product, made row by row from floats or bf16. Rows of type 0, where `types` are given, are fine: the
// head reads those few by themselves, and nothing averages their errors. What rounding left of one is rounded again, as
// a row behind all others, whose product is where the row's own begins.
template <class Op>
class LeftSide {
public:
    TR_INLINE LeftSide(const Linear& w, int rows, const int32_t* types, Scratch& s) : w_(w), s_(s), types_(types), rest_(round_up(rows, kTile)) {}

    template <class E>
    TR_INLINE void put(const E* row, int r) {
        if constexpr (same_type<Op, Int8>) {
            if (const float* mixed = mixed_row(row)) round_row(mixed, r);
            else round_row(row, r);
        } else {
            Op* to = s_.operand.as<Op>() + static_cast<size_t>(r) * w_.depth;
            for (int c = 0; c < w_.in; c += W) store(to + c, load(row + c));
        }
    }

    TR_INLINE Operand<Op> operand() const {
        Operand<Op> a{s_.operand.as<Op>(), w_.depth, s_.row_scale.as<float>()};
        if (fine_) a.starts = s_.starts.as<const float*>(), a.fine = fine_, a.rest = rest_;
        return a;
    }

private:
    TR_INLINE const float* mixed_row(const bf16*) const { return nullptr; }
    TR_INLINE const float* mixed_row(const float* row) const {
        if (w_.mixed) mix(row, w_.in, s_.mixed.as<float>());
        return w_.mixed ? s_.mixed.as<float>() : nullptr;
    }

    template <class E>
    TR_INLINE void round_row(const E* row, int r) {
        if (types_) s_.starts.as<const float*>()[r] = w_.bias;
        if (!types_ || types_[r] != 0) return round_to<false>(row, w_.least, r);
        s_.starts.as<const float*>()[r] = s_.low.as<float>() + static_cast<size_t>(fine_) * w_.out;
        round_to<true>(row, w_.least, r);
        round_to<false>(s_.mixed.as<float>(), 0.0f, rest_ + fine_++);
    }
    template <bool keep, class E>
    TR_INLINE void round_to(const E* row, float least, int r) {
        quantise<keep>(row, w_, w_.least == 0.0f, least, s_.operand.as<Op>() + int8_row(r, w_.depth), s_.row_scale.as<float>() + r, s_.mixed.as<float>());
    }

    const Linear& w_;
    Scratch& s_;
    const int32_t* const types_;
    const int rest_;
    int fine_ = 0;
};

// The whole left side.
template <class Op, class E>
Operand<Op> put_operands(const E* rows, int stride, int count, const int32_t* types, const Linear& w, Scratch& s) {
    const Lap lap(s, kQuantise);
    LeftSide<Op> left(w, count, types, s);
    for (int r = 0; r < count; ++r) left.put(rows + static_cast<size_t>(r) * stride, r);
    return left.operand();
}

// Likewise, but rows that already have the operand's type are used where they lie. A tile may be higher than what is
// left, so nobody may be writing the rows behind them.
template <class Op, class E>
Operand<Op> make_operand(const E* rows, int stride, int count, const int32_t* types, const Linear& w, Scratch& s) {
    if constexpr (same_type<Op, E>) return {rows, stride, nullptr};
    else return put_operands<Op>(rows, stride, count, types, w, s);
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
void project_heads(const Shape& shape, const Layer& layer, const float* x, const int32_t* types, int rows, Heads heads, int at, Scratch& s) {
    const auto a = put_operands<Op>(x, shape.C, rows, types, layer.qkv, s);
    const Lap lap(s, kQkv);
    const int C = shape.C, D = shape.D;
    multiply_all<Op>(a, layer.qkv, rows, s, nullptr, [=](int column) TR_LAMBDA {
        void* base = column < C ? heads.q : column < 2 * C ? heads.k : heads.v;
        const int c = column % C;
        E* out = static_cast<E*>(base) + (static_cast<size_t>(c / D) * heads.capacity + at) * D + c % D;
        return [=](int r, F left, F right) TR_LAMBDA { store2(out + r * D, left, right); };
    });
}

// x += a W^T + b. What is added to was last touched a phase ago: it is fetched while the sums are formed.
template <class Op>
void add_product(const Operand<Op>& a, const Linear& w, float* x, int rows, Scratch& s, const std::byte* after) {
    const int stride = w.out;
    multiply_all<Op>(a, w, rows, s, after, [=](int column) TR_LAMBDA {
        float* out = x + column;
        return [=](int r, F left, F right) TR_LAMBDA {
            float* y = out + static_cast<size_t>(r) * stride;
            store2(y, add(load(y), left), add(load(y + W), right));
        };
    }, [=](int column, int row, int count) TR_LAMBDA {
        for (int r = row; r < row + count; ++r)
            for (int c = column; c < column + 2 * W; c += 16) prefetch(x + static_cast<size_t>(r) * stride + c);
    });
}

// hidden = activation(y W^T + b), with the gate of GEGLU if the model has one
template <class Op, class E>
void activate(const Operand<Op>& y, const Linear& w, bool geglu, E* hidden, int F_size, int rows, Scratch& s, const std::byte* after) {
    constexpr bool exact = same_type<Op, float>;
    if (geglu) {
        multiply_all<Op>(y, w, rows, s, after, [=](int column) TR_LAMBDA {
            E* out = hidden + column / 2;
            return [=](int r, F left, F right) TR_LAMBDA { store(out + static_cast<size_t>(r) * F_size, mul(gelu<exact>(left), right)); };
        });
        return;
    }
    multiply_all<Op>(y, w, rows, s, after, [=](int column) TR_LAMBDA {
        E* out = hidden + column;
        return [=](int r, F left, F right) TR_LAMBDA { store2(out + static_cast<size_t>(r) * F_size, gelu<exact>(left), gelu<exact>(right)); };
    });
}

template <class Op, class E>
void finish_layer(const Shape& shape, const Layer& layer, const void* attention, float* x, const int32_t* types, int rows, Scratch& s) {
    const int C = shape.C;
    const auto a = make_operand<Op>(static_cast<const E*>(attention), C, rows, types, layer.out, s);
    {
        const Lap lap(s, kOut);
        add_product<Op>(a, layer.out, x, rows, s, layer.up.panels);
    }
    LeftSide<Op> normed(layer.up, rows, types, s);
    {
        const Lap lap(s, kNorm);
        for (int r = 0; r < rows; ++r) {
            float* row = x + static_cast<size_t>(r) * C;
            normalise(row, C, layer.norm1, shape.eps);
            normed.put(row, r);
        }
    }
    E* hidden = s.hidden.as<E>();
    {
        const Lap lap(s, kUp);
        activate<Op, E>(normed.operand(), layer.up, shape.geglu, hidden, shape.F, rows, s, layer.down.panels);
    }
    const auto h = make_operand<Op>(hidden, shape.F, rows, types, layer.down, s);
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
    multiply<float>(Operand<float>{first, C, nullptr}, w.pooler, rows, s, nullptr, [&](int column) {
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
    return {same_type<Op, Int8> ? Precision::int8 : exact ? Precision::fp32 : Precision::bf16, name, sizeof(E), kTiles, kInt8Group, kInt8Offset, W, row_tile, lowest_tile, block_rows, enter, leave, embed, project_heads<Op, E>, attend<E, exact>, attend_first<Op, E>,
            finish_layer<Op, E>, classify, cosine};
}
