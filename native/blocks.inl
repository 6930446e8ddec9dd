// Matrix products whose sums stay in registers from the first word of the depth to the finished value.
// Needs of the instruction set's file, for each operand type Op:
//   Sum<Op>, Right<Op>           W partial sums; W words of the right side
//   load_right<Op>(bytes)        words of one row of a panel
//   dot(left, right, a, w0, w1)  adds the product of one word of `a` with W columns each to two sums
//   first_sums<Op>(columns, start)  where sums begin; `columns`, int8 only: see Linear
//   kRowsAtOnce                  rows whose sums fit the registers, two of them a row
// A word is what the instruction takes at once of one row's depth: 4 int8, 2 bf16 (or widened int8), 1 float.

template <int... i> struct Indices {
    static constexpr int count = sizeof...(i);
};
template <int n, int... i> struct MakeIndices : MakeIndices<n - 1, n - 1, i...> {};
template <int... i> struct MakeIndices<0, i...> { using type = Indices<i...>; };

// Calls part(from, Indices<0 .. height-1>) for tiles that cover `rows` rows and at most two more. There are four
// heights, because each is compiled for itself.
constexpr int kLowestTile = (kRowsAtOnce + 3) / 4;

template <class Part>
TR_INLINE void in_tiles(int rows, const Part& part) {
    constexpr int most = kRowsAtOnce, half = most / 2, quarter = kLowestTile;
    for (int from = 0; from < rows;) {
        const int rest = rows - from;
        if (rest > half + quarter) part(from, typename MakeIndices<most>::type{}), from += most;
        else if (rest > quarter && rest != 2 * quarter) part(from, typename MakeIndices<half>::type{}), from += half;
        else if (rest > 1) part(from, typename MakeIndices<quarter>::type{}), from += quarter;
        else part(from, typename MakeIndices<1>::type{}), from += 1;
    }
}

template <class Op> constexpr int kWord = 4 / static_cast<int>(sizeof(Op));

// Bytes from one word of the depth to the next in a panel of 32 columns, and from one vector of columns to the next.
template <class Op> constexpr int kRightRow = kPanel * (same_type<Op, Int8> ? kInt8Group : 4);
template <class Op> constexpr int kRightVector = kRightRow<Op> / kPanel * W;

struct Nothing {
    template <class... A>
    TR_INLINE void operator()(A...) const {}
};

// Rows r... of `a` (row and step: elements from one to the next row and word) by 2 W columns. start(r, left, right)
// sets the sums, finish(r, left, right) takes them; each(k) is called with every word.
template <class Op, int... r, class Start, class Finish, class Each = Nothing>
TR_INLINE void block(Indices<r...>, const Op* a, ptrdiff_t row, ptrdiff_t step, const std::byte* right, int words, const Start& start,
                     const Finish& finish, const Each& each = {}) {
    Sum<Op> x[sizeof...(r)], y[sizeof...(r)];
    (start(r, x[r], y[r]), ...);
    for (int k = 0; k < words; ++k) {
        each(k);
        const std::byte* b = right + static_cast<ptrdiff_t>(k) * kRightRow<Op>;
        const Right<Op> w0 = load_right<Op>(b), w1 = load_right<Op>(b + kRightVector<Op>);
        (dot(x[r], y[r], a + r * row + k * step, w0, w1), ...);
    }
    (finish(r, x[r], y[r]), ...);
}

// Sums of a tile of a product with weights, and where they belong.
template <class Op>
struct Tile {
    const Sum<Op>* sums;  // (rows, 2)
    int column, row, rows;
};

// All panels of a W^T + b for `rows` rows; with `fine`, a.starts stand in place of b. at(column) gives a functor put(row,
// left, right) that receives values of columns column .. + W and column + W .. + 2 W of a row. The next panel (at the end:
// `after`, the first of the product that follows) is fetched meanwhile, evenly, because weights come from the outer
// caches. A tile's values are formed behind the next tile's sums, so that they wait for nothing; expect(column, row, rows)
// is called before those.
template <class Op, bool fine = false, class At, class Expect = Nothing>
TR_INLINE void multiply(const Operand<Op>& a, const Linear& w, int rows, Scratch& s, const std::byte* after, const At& at, const Expect& expect = {}) {
    const int words = w.depth / kWord<Op>, panels = w.out / kPanel;
    const size_t steps = static_cast<size_t>(words * (kPanel / (2 * W)) * ((rows + kRowsAtOnce - 1) / kRowsAtOnce));
    const size_t pace = (w.panel_bytes + steps - 1) / steps;  // bytes to fetch with each word
    Sum<Op>* const buffer = s.tiles.as<Sum<Op>>();
    Sum<Op>* sums = buffer;
    Tile<Op> done{buffer, 0, 0, 0};
    const auto values = [&]() TR_LAMBDA {
        const auto put = at(done.column);
        const float *scale = w.scale + done.column, *row_scale = a.scale + done.row, *b = w.bias + done.column;
        for (int r = 0; r < done.rows; ++r) {
            if constexpr (fine) b = a.starts[done.row + r] + done.column;
            const Sum<Op> x = done.sums[2 * r], y = done.sums[2 * r + 1];
            if constexpr (same_type<Op, Int8>)
                put(done.row + r, fma(mul(to_float(x), load(scale)), set(row_scale[r]), load(b)), fma(mul(to_float(y), load(scale + W)), set(row_scale[r]), load(b + W)));
            else
                put(done.row + r, add(x, load(b)), add(y, load(b + W)));
        }
    };
    for (int panel = 0; panel < panels; ++panel) {
        const std::byte* ahead = panel + 1 < panels ? w.panel(panel + 1) : after ? after : w.panel(panel);
        for (int column = 0; column < kPanel; column += 2 * W) {
            const std::byte* right = w.panel(panel) + column / W * kRightVector<Op>;
            Sum<Op> start[2];
            first_sums<Op>(w.panel(panel) + static_cast<size_t>(words) * kRightRow<Op> + column * 4, start);
            in_tiles(rows, [&](int row, auto indices) TR_LAMBDA {
                sums = buffer + (sums == buffer ? 2 * kRowsAtOnce : 0);
                expect(panel * kPanel + column, row, at_most(indices.count, rows - row));
                block<Op>(indices, a.rows + static_cast<size_t>(row) * a.stride, a.stride, kWord<Op>, right, words,
                    [&](int, Sum<Op>& x, Sum<Op>& y) TR_LAMBDA { x = start[0], y = start[1]; },
                    [&](int r, const Sum<Op>& x, const Sum<Op>& y) TR_LAMBDA { sums[2 * r] = x, sums[2 * r + 1] = y; },
                    [&](int) TR_LAMBDA {
                        prefetch(ahead);
                        ahead += pace;
                    });
                values();
                done = {sums, panel * kPanel + column, row, at_most(indices.count, rows - row)};
            });
        }
    }
    values();
}
