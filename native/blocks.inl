// Matrix products whose sums stay in registers for the whole depth.
// The instruction set's file defines, for each operand type Op:
//   Integers                     vector of W sums of int8 products
//   load_right<Op>(bytes)        loads W words of one row of a panel
//   dot(left, right, a, w0, w1)  adds the products of one word of `a` with the words w0 and w1 of W columns to two sums
//   kRowsAtOnce                  rows of a tile: as many as have two sums each in registers
// A word is the part of a row's depth that one instruction multiplies: 4 int8 (8 with smmla), 2 bf16 or 1 float. With
// TR_TWO_WORDS (AVX2) it is what one step multiplies, two of int8; load_right() and dot() take both.

template <class Op> using Sum = ForInt8<Op, Integers, F>;
template <class Op> using Number = ForInt8<Op, int32_t, float>;  // type of a sum in memory

template <int... i> struct Indices {
    static constexpr int count = sizeof...(i);
};
template <int n, int... i> struct MakeIndices : MakeIndices<n - 1, n - 1, i...> {};
template <int... i> struct MakeIndices<0, i...> { using type = Indices<i...>; };

template <class Op> constexpr bool kTiled = kTiles && !same_type<Op, float>;  // uses matrix tiles, isa_amx.cpp

// Calls part(from, Indices<0 .. height-1>) for tiles that cover `rows` rows and at most two more (matrix tiles: 31). Each of
// the four heights is compiled separately.
constexpr int kLowestTile = (kRowsAtOnce + 3) / 4;

template <class Op, class Part>
TR_INLINE void in_tiles(int rows, const Part& part) {
    constexpr int most = kTiled<Op> ? kTile : kRowsAtOnce, half = most / 2, quarter = kLowestTile;
    for (int from = 0; from < rows;) {
        const int rest = rows - from;
        if (kTiled<Op> || rest > half + quarter) part(from, typename MakeIndices<most>::type{}), from += most;
        else if (rest > quarter && (rest != 2 * quarter || rest == half)) part(from, typename MakeIndices<half>::type{}), from += half;
        else if (rest > 1) part(from, typename MakeIndices<quarter>::type{}), from += quarter;
        else part(from, typename MakeIndices<1>::type{}), from += 1;
    }
}

#ifdef TR_TWO_WORDS
constexpr int kInt8Words = 2;
#else
constexpr int kInt8Words = 1;
#endif
template <class Op> constexpr int kWord = same_type<Op, Int8> ? kInt8Words * kInt8Group : 4 / static_cast<int>(sizeof(Op));

// Bytes from one word of the depth to the next in a panel of 32 columns, and from one vector of columns to the next.
template <class Op> constexpr int kRightRow = kPanel * (same_type<Op, Int8> ? kInt8Words * kInt8Group : 4);
template <class Op> constexpr int kRightVector = W * (same_type<Op, Int8> ? kInt8Group : 4);

struct Nothing {
    template <class... A>
    TR_INLINE void operator()(A...) const {}
};

// Product of rows r... of `a` with 2 W columns. `row` and `step`: elements from one row and word to the next. start(r, left,
// right) initialises the sums, finish(r, left, right) receives them, each(k, words) is called for every word or few words.
template <class Op, int... r, class Start, class Finish, class Each = Nothing>
TR_INLINE void block(Indices<r...>, const Op* a, ptrdiff_t row, ptrdiff_t step, const std::byte* right, int words, const Start& start,
                     const Finish& finish, const Each& each = {}) {
    Sum<Op> x[sizeof...(r)], y[sizeof...(r)];
    (start(r, x[r], y[r]), ...);
    for (int k = 0; k < words; ++k) {
        each(k, 1);
        const std::byte* b = right + static_cast<ptrdiff_t>(k) * kRightRow<Op>;
        const auto w0 = load_right<Op>(b), w1 = load_right<Op>(b + kRightVector<Op>);
        (dot(x[r], y[r], a + r * row + k * step, w0, w1), ...);
    }
    (finish(r, x[r], y[r]), ...);
}

// Offsets of an int8 operand's rows and columns: row-major; for matrix tiles in blocks of 16 rows x 64 bytes, because
// consecutive cache lines load faster than distant ones; with TR_ROW_PAIRS the words of two rows alternate, because one
// instruction multiplies both.
#ifdef TR_ROW_PAIRS
constexpr int kRowsTogether = 2, kTogether = 8;
#else
constexpr int kRowsTogether = kTiles ? 16 : 1, kTogether = 64;
#endif
TR_INLINE size_t int8_row(size_t row, size_t depth) { return row / kRowsTogether * kRowsTogether * depth + row % kRowsTogether * kTogether; }
TR_INLINE int int8_column(int column) { return column / kTogether * kTogether * kRowsTogether + column % kTogether; }

// Writes the sums of one tile to `sums` (rows, 2 W). Each step of the depth prefetches `pace` bytes from `ahead`. Must call
// values(from, to) for ranges that cover the previous tile's `last` rows.
template <class Op, int... r, class Values>
TR_INLINE void sum_tile(Indices<r...> indices, const Operand<Op>& a, int row, int, const Linear& w, int panel, int column, Number<Op>* sums,
                        const std::byte*& ahead, size_t pace, int last, const Values& values) {
    const int words = w.depth / kWord<Op>;
    auto* const vectors = reinterpret_cast<Sum<Op>*>(sums);
    Sum<Op> begin[2] = {};
    if constexpr (same_type<Op, Int8>) {
        const auto* first = reinterpret_cast<const Integers*>(w.panel(panel) + static_cast<size_t>(words) * kRightRow<Op> + column * 4);
        begin[0] = first[0], begin[1] = first[1];
    }
    block<Op>(indices, a.rows + static_cast<size_t>(row) * a.stride, a.stride, kWord<Op>, w.panel(panel) + column / W * kRightVector<Op>, words,
        [&](int, Sum<Op>& x, Sum<Op>& y) TR_LAMBDA { x = begin[0], y = begin[1]; },
        [&](int i, const Sum<Op>& x, const Sum<Op>& y) TR_LAMBDA { vectors[2 * i] = x, vectors[2 * i + 1] = y; },
        [&](int, int steps) TR_LAMBDA {
            prefetch(ahead);
            ahead += pace * static_cast<size_t>(steps);
        });
    values(0, last);
}

// All panels of a W^T + b for `rows` rows; with `fine`, a.starts replace b where they are not null. at(column) returns a
// functor put(row, left, right) that receives a row's values of columns column .. + W and column + W .. + 2 W. The next panel
// (after the last one: `after`, the first panel of the following product) is prefetched at an even pace, because weights come
// from the outer caches. The values of a tile are computed after or (matrix tiles) during the next tile's sums, so that they
// do not wait for their own; expect(column, row, rows) is called before a tile's sums.
template <class Op, bool fine = false, class At, class Expect = Nothing>
TR_INLINE void multiply(const Operand<Op>& a, const Linear& w, int rows, Scratch& s, const std::byte* after, const At& at, const Expect& expect = {}) {
    Number<Op>* const buffer = s.tiles.as<Number<Op>>();
    struct { const Number<Op>* sums; int column, row, rows; } done{buffer, 0, 0, 0};
    const auto values = [&](int from, int to) TR_LAMBDA {
        if (from >= to) return;
        const auto put = at(done.column);
        const float *scale = w.scale + done.column, *row_scale = a.scale + done.row, *b = w.bias + done.column;
        for (int r = from; r < to; ++r) {
            if constexpr (fine) b = a.starts[done.row + r] ? a.starts[done.row + r] + done.column : w.bias + done.column;
            const F x = load(done.sums + 2 * W * r), y = load(done.sums + 2 * W * r + W);
            if constexpr (same_type<Op, Int8>)
                put(done.row + r, fma(x * load(scale), set(row_scale[r]), load(b)), fma(y * load(scale + W), set(row_scale[r]), load(b + W)));
            else
                put(done.row + r, x + load(b), y + load(b + W));
        }
    };
    constexpr int height = kTiled<Op> ? kTile : kRowsAtOnce, words = kTiled<Op> ? 16 : 1;  // rows of a tile, words of a step
    const int panels = w.out / kPanel, tiles = (rows + height - 1) / height;
    const size_t steps = static_cast<size_t>(w.depth / kWord<Op> / words * (kPanel / (2 * W)) * tiles), pace = (w.panel_bytes + steps - 1) / steps;
    for (int panel = 0; panel < panels; ++panel) {
        const std::byte* ahead = panel + 1 < panels ? w.panel(panel + 1) : after ? after : w.panel(panel);
        for (int column = 0; column < kPanel; column += 2 * W)
            in_tiles<Op>(rows, [&](int row, auto indices) TR_LAMBDA {
                Number<Op>* const sums = buffer + (done.sums == buffer ? height * 2 * W : 0);
                const int count = at_most(indices.count, rows - row);
                expect(panel * kPanel + column, row, count);
                sum_tile(indices, a, row, count, w, panel, column, sums, ahead, pace, done.rows, values);
                done = {sums, panel * kPanel + column, row, count};
            });
    }
    values(0, done.rows);
}
