// AMX: matrix tiles of 16 rows x 64 bytes. A 32 x 32 result uses four accumulator tiles. Each step of the depth loads two
// tiles of each side and multiplies all four combinations (16 cycles each); meanwhile the vector units compute the values of
// the previous result (`between`).
#include <immintrin.h>

#include "kernels.h"

namespace turborank {
namespace {

using Int8 = int8_t;

#include "avx512.inl"

constexpr bool kTiles = true;
constexpr int kInt8Group = 4, kInt8Offset = 0, kRowsAtOnce = 14;

#include "blocks.inl"

TR_INLINE void store_int8(Int8* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

// Used instead of gcc 12's intrinsics. The loads declare no memory operand, so that vector code between them can stay in
// registers; gemm() begins with a compiler barrier instead, and nothing that it reads is written before it ends.
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
template <class Sum, int sum, int a, int b>
TR_INLINE void multiply_tiles() {
    if constexpr (same_type<Sum, float>) __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
    else __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

// The left side: its first tile, and the bytes from one row of a tile to the next, from a tile to the next along the depth,
// and to the tile 16 rows below.
struct Left {
    const void* first;
    size_t row, step, below;
};

// sums[r][0..31] = begin[0..31] (null: 0) + sum_k a[r][k] * panel[k][0..31] for r < rows <= 32, over `steps` steps of 64 bytes
// of depth; between(i) is called after each step. May read up to row 31 of `a` and write up to row 31 of `sums`.
template <class Sum, class Between>
TR_INLINE void gemm(const Left& a, int rows, const std::byte* panel, int steps, const std::byte* begin, Sum* sums, const Between& between) {
    const std::byte* x = static_cast<const std::byte*>(a.first);
    const bool tall = rows > 16;
    __asm__ volatile("" ::: "memory");
    if (begin) load_tile<0>(begin, 0), load_tile<1>(begin + 64, 0), load_tile<2>(begin, 0), load_tile<3>(begin + 64, 0);
    else zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (size_t s = 0; s < static_cast<size_t>(steps); ++s) {
        load_tile<6>(panel + s * 2048, 64);
        load_tile<4>(x + s * a.step, a.row);
        load_tile<7>(panel + s * 2048 + 1024, 64);
        multiply_tiles<Sum, 0, 4, 6>();
        multiply_tiles<Sum, 1, 4, 7>();
        if (tall) {
            load_tile<5>(x + s * a.step + a.below, a.row);
            multiply_tiles<Sum, 2, 5, 6>();
            multiply_tiles<Sum, 3, 5, 7>();
        }
        between(static_cast<int>(s));
    }
    store_tile<0>(sums, 128), store_tile<1>(sums + 16, 128);
    if (tall) store_tile<2>(sums + 512, 128), store_tile<3>(sums + 528, 128);
}
TR_INLINE Left left_side(const Int8* a, int stride) { return {a, 64, 1024, 16 * static_cast<size_t>(stride)}; }
TR_INLINE Left left_side(const bf16* a, int stride) { return {a, 2 * static_cast<size_t>(stride), 64, 32 * static_cast<size_t>(stride)}; }

// block() of blocks.inl for attention; here `step` is the distance between groups of 16 words.
template <class Op, int... r, class Start, class Finish>
    requires(same_type<Op, bf16>)
TR_INLINE void block(Indices<r...>, const bf16* a, ptrdiff_t row, ptrdiff_t step, const std::byte* right, int words, const Start& start, const Finish& finish) {
    constexpr int rows = sizeof...(r);
    alignas(64) float sums[rows * kPanel];
    const size_t bytes = 2 * static_cast<size_t>(row);
    gemm({a, bytes, 32 * static_cast<size_t>(step), 16 * bytes}, rows, right, (words + 15) / 16, nullptr, sums, Nothing{});
#pragma GCC unroll 2
    for (int i = 0; i < rows; ++i) {
        F x, y;
        start(i, x, y);
        finish(i, x + load(sums + i * kPanel), y + load(sums + i * kPanel + W));
    }
}

// words[i] = 2^even[i] and 2^odd[i] as one word of two bf16, and adds them to sums. `deep` is used by isa_avx512.cpp only.
constexpr float kDeep = 0.0f;
template <bool deep, int N>
TR_INLINE void exp2_words(const F (&even)[N], const F (&odd)[N], F (&words)[N], F (&sums)[N]) {
    for (int i = 0; i < N; ++i) {
        const F p = exp2<false>(even[i]), q = exp2<false>(odd[i]);
        words[i] = to_word<bf16>(p, q), sums[i] = sums[i] + (p + q);
    }
}

// The transposed values, [keys / 32][D][32]; keys after the last one are zero.
TR_INLINE const bf16* pair_values(const bf16* v, int n, int D, bf16* to) {
    const auto row = [=](int j, int c) { return j < n ? v + static_cast<size_t>(j) * D + c : nullptr; };
    for (int j = 0; j < n; j += kTile)
        for (int c = 0; c < D; c += 32) {
            F left[16], right[16];
            for (int i = 0; i < 16; ++i) pair_rows(row(j + 2 * i, c), row(j + 2 * i + 1, c), left[i], right[i]);
            transpose(left), transpose(right);
            for (int i = 0; i < 16; ++i) {
                float* column = reinterpret_cast<float*>(to + static_cast<size_t>(j) * D + (c + i) * kTile);
                store(column, left[i]), store(column + 16 * 16, right[i]);
            }
        }
    return to;
}

// sum_tile() of blocks.inl. The vector units compute the previous tile's values while the matrix unit computes these sums.
template <class Op, int... r, class Values>
    requires kTiled<Op>
TR_INLINE void sum_tile(Indices<r...>, const Operand<Op>& a, int row, int rows, const Linear& w, int panel, int, Number<Op>* sums,
                        const std::byte*& ahead, size_t pace, int last, const Values& values) {
    const std::byte *right = w.panel(panel), *begin = same_type<Op, Int8> ? right + w.panel_bytes - kPanel * 4 : nullptr;
    const int steps = w.depth / (16 * kWord<Op>), share = (kTile + steps - 1) / steps;
    gemm(left_side(a.rows + static_cast<size_t>(row) * a.stride, a.stride), rows, right, steps, begin, sums, [&](int i) {
        values(at_most(i * share, last), at_most((i + 1) * share, last));
        for (size_t at = 0; at < pace; at += 64) prefetch(ahead + at);
        ahead += pace;
    });
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

constexpr Kernels kInt8Bf16 = table<Int8, bf16>("tdpbssd", kBlockRows, configure_tiles, release_tiles);
constexpr Kernels kBf16Bf16 = table<bf16, bf16>("tdpbf16ps", kBlockRows, configure_tiles, release_tiles);

}  // namespace

const Kernels* amx_kernels(Precision precision, unsigned features) {
    if (precision == Precision::int8) return &kInt8Bf16;
    if (precision == Precision::bf16) return &kBf16Bf16;
    return avx512_kernels(precision, features);
}

}  // namespace turborank
