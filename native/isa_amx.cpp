// AMX: matrix tiles of 16 rows x 64 bytes. A 32 x 32 result takes four accumulator tiles; each step of the depth
// loads two tiles of either side and multiplies them four ways (16 cycles each), and the vector work of the previous
// result (`between`) runs meanwhile on the vector units.
#include <immintrin.h>

#include "kernels.h"

namespace turborank {
namespace {

using Int8 = int8_t;

#include "avx512.inl"

template <class Op> using Sum = F;  // of the float product, which has no tiles
template <class Op> using Right = F;
constexpr bool kTiles = true;
constexpr int kInt8Group = 4, kInt8Offset = 0, kRowsAtOnce = 14;

template <class Op>
TR_INLINE F load_right(const std::byte* p) { return _mm512_loadu_ps(p); }
template <class Op>
TR_INLINE void first_sums(const std::byte*, F (&start)[2]) { start[0] = start[1] = set(0.0f); }

#include "blocks.inl"

TR_INLINE void store_int8(Int8* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

// In place of gcc 12's intrinsics. Loads do not name the memory they read, so that the vector code between them may
// stay in registers; tile_gemm begins with a barrier instead, and nothing it reads is written before it ends.
template <int tile>
TR_INLINE void load_tile(const void* from, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile));
}
template <int tile>
TR_INLINE void store_tile(void* to, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
TR_INLINE void zero_tile() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile)); }
struct Integer {
    template <int sum, int a, int b>
    static TR_INLINE void multiply() { __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b)); }
};
struct Brain {
    template <int sum, int a, int b>
    static TR_INLINE void multiply() { __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b)); }
};

// The left side: its first tile, the bytes between a tile's rows, from a tile to the next of the depth, and to the
// tile 16 rows below.
struct Left {
    const void* first;
    size_t row, step, below;
};

// sums[r][0..31] = sum_k a[r][k] * panel[k][0..31] for r < rows <= 32, over `steps` of 64 bytes of depth; between(i) is
// called after each. It may read up to row 31 of `a` and write up to row 31 of `sums`.
template <class Kind, class Sum, class Between>
TR_INLINE void gemm(const Left& a, int rows, const std::byte* panel, int steps, Sum* sums, const Between& between) {
    const std::byte* x = static_cast<const std::byte*>(a.first);
    const bool tall = rows > 16;
    __asm__ volatile("" ::: "memory");
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (size_t s = 0; s < static_cast<size_t>(steps); ++s) {
        load_tile<6>(panel + s * 2048, 64);
        load_tile<4>(x + s * a.step, a.row);
        load_tile<7>(panel + s * 2048 + 1024, 64);
        Kind::template multiply<0, 4, 6>();
        Kind::template multiply<1, 4, 7>();
        if (tall) {
            load_tile<5>(x + s * a.step + a.below, a.row);
            Kind::template multiply<2, 5, 6>();
            Kind::template multiply<3, 5, 7>();
        }
        between(static_cast<int>(s));
    }
    store_tile<0>(sums, 128), store_tile<1>(sums + 16, 128);
    if (tall) store_tile<2>(sums + 512, 128), store_tile<3>(sums + 528, 128);
}
TR_INLINE Left left_side(const Int8* a, int stride) { return {a, 64, 1024, 16 * static_cast<size_t>(stride)}; }
TR_INLINE Left left_side(const bf16* a, int stride) { return {a, 2 * static_cast<size_t>(stride), 64, 32 * static_cast<size_t>(stride)}; }

// block() of blocks.inl for attention, where `step` counts from 16 words to the next 16.
template <class Op, int... r, class Start, class Finish>
    requires(same_type<Op, bf16>)
TR_INLINE void block(Indices<r...>, const bf16* a, ptrdiff_t row, ptrdiff_t step, const std::byte* right, int words, const Start& start, const Finish& finish) {
    constexpr int rows = sizeof...(r);
    alignas(64) float sums[rows * kPanel];
    const size_t bytes = 2 * static_cast<size_t>(row);
    gemm<Brain>({a, bytes, 32 * static_cast<size_t>(step), 16 * bytes}, rows, right, (words + 15) / 16, sums, Nothing{});
#pragma GCC unroll 2
    for (int i = 0; i < rows; ++i) {
        F x, y;
        start(i, x, y);
        finish(i, add(x, load(sums + i * kPanel)), add(y, load(sums + i * kPanel + W)));
    }
}

// The values' transpose, [keys / 32][D][32]; keys behind the last one are zero.
TR_INLINE const bf16* pair_values(const bf16* v, int n, int D, bf16* to) {
    const auto row = [=](int j) { return j < n ? v + static_cast<size_t>(j) * D : nullptr; };
    for (int j = 0; j < n; j += kTile)
        for (int c = 0; c < D; c += 32) {
            F left[16], right[16];
            for (int i = 0; i < 16; ++i) pair_rows(row(j + 2 * i) ? row(j + 2 * i) + c : nullptr, row(j + 2 * i + 1) ? row(j + 2 * i + 1) + c : nullptr, left[i], right[i]);
            transpose(left), transpose(right);
            for (int i = 0; i < 16; ++i) {
                float* column = reinterpret_cast<float*>(to + static_cast<size_t>(j) * D + (c + i) * kTile);
                store(column, left[i]), store(column + 16 * 16, right[i]);
            }
        }
    return to;
}

// int8 operands lie tile by tile, 16 rows x 64 bytes each: neighbouring cache lines load faster than distant ones.
TR_INLINE size_t int8_row(int row, int depth) { return static_cast<size_t>(row / 16) * 16 * depth + static_cast<size_t>(row % 16) * 64; }
TR_INLINE int int8_column(int column) { return column / 64 * 1024 + column % 64; }

template <class Op> struct Raw { using type = float; using kind = Brain; };
template <> struct Raw<Int8> { using type = int32_t; using kind = Integer; };

// multiply() of blocks.inl for int8 and bf16. The vector units turn one 32 x 32 tile's raw sums into values while the
// next tile is being computed.
template <class Op, bool fine = false, class At, class Expect = Nothing>
    requires(!same_type<Op, float>)
TR_INLINE void multiply(const Operand<Op>& a, const Linear& w, int rows, Scratch& s, const std::byte* after, const At& at, const Expect& expect = {}) {
    using Sums = typename Raw<Op>::type;
    struct Done { int panel, row, rows; const Sums* sums; } done{0, 0, 0, s.tiles.as<Sums>()};
    const auto drain = [&](int r0, int r1) TR_LAMBDA {
        if (r0 >= r1) return;
        const auto put = at(done.panel * kPanel);
        const float *scale = w.scale + done.panel * kPanel, *b = w.bias + done.panel * kPanel;
        const std::byte* start = w.panel(done.panel) + w.panel_bytes - kPanel * 4;  // int8 only
        for (int r = r0; r < r1; ++r) {
            const Sums* sums = done.sums + r * kPanel;
            if constexpr (fine) b = a.starts[done.row + r] + done.panel * kPanel;
            if constexpr (same_type<Op, Int8>) {
                const F row_scale = set(a.scale[done.row + r]);
                const auto scaled = [&](int c) TR_LAMBDA {
                    const F sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_loadu_si512(sums + c), _mm512_loadu_si512(start + 4 * c)));
                    return fma(mul(sum, load(scale + c)), row_scale, load(b + c));
                };
                put(done.row + r, scaled(0), scaled(W));
            } else {
                put(done.row + r, add(load(sums), load(b)), add(load(sums + W), load(b + W)));
            }
        }
    };
    const int moments = w.depth * static_cast<int>(sizeof(Op)) / 64, share = (kTile + moments - 1) / moments;
    const int tiles = (rows + kTile - 1) / kTile, panels = w.out / kPanel;
    const size_t stride = (w.panel_bytes + static_cast<size_t>(tiles * moments) - 1) / static_cast<size_t>(tiles * moments);
    int turn = 0;
    for (int panel = 0; panel < panels; ++panel) {
        const std::byte* next = panel + 1 < panels ? w.panel(panel + 1) : after;
        for (int row = 0; row < rows; row += kTile, turn ^= 1) {
            Sums* sums = s.tiles.as<Sums>() + turn * kTile * kPanel;
            const int count = at_most(kTile, rows - row);
            expect(panel * kPanel, row, count);
            gemm<typename Raw<Op>::kind>(left_side(a.rows + static_cast<size_t>(row) * a.stride, a.stride), count, w.panel(panel), moments, sums, [&](int i) {
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

#include "attention.inl"
#include "attention_lanes.inl"
#include "kernels.inl"

void configure_tiles() {
    struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    __asm__ volatile("ldtilecfg %0" ::"m"(configuration));
}
constexpr int kBlockRows = 512;
void release_tiles() { _tile_release(); }

constexpr Kernels kInt8Bf16 = table<Int8, bf16>("tdpbssd", kTile, kTile, kBlockRows, configure_tiles, release_tiles);
constexpr Kernels kBf16Bf16 = table<bf16, bf16>("tdpbf16ps", kTile, kTile, kBlockRows, configure_tiles, release_tiles);

}  // namespace

const Kernels* amx_kernels(Precision precision, unsigned features) {
    if (precision == Precision::int8) return &kInt8Bf16;
    if (precision == Precision::bf16) return &kBf16Bf16;
    return avx512_kernels(precision, features);
}

}  // namespace turborank
