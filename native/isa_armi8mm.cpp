// 64-bit Arm with int8 matrix products and bf16 (Apple M2, Neoverse V1 and N2, and later). smmla multiplies two rows of eight
// bytes by two columns of eight, so the rows of the left side are stored in pairs, and a vector of sums holds two rows by two
// columns.
#include "kernels.h"

namespace turborank {
namespace {

constexpr int kInt8Group = 8;
#define TR_ROW_PAIRS  // blocks.inl, int8_row

#include "neon.inl"

TR_INLINE int32x4_t first_halves(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
TR_INLINE int32x4_t second_halves(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

// In assembly, for the reason given in neon.inl.
TR_INLINE void add_square(int32x4_t& sum, int8x16_t rows, int8x16_t columns) {
    __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(rows), "w"(columns));
}

// One word of the depth: each pair of rows of `left` by four pairs of columns.
template <int... p>
TR_INLINE void add_squares_of(Indices<p...>, int32x4_t (*sums)[4], const Int8* const* left, ptrdiff_t at, const std::byte* right) {
    const int8x16_t rows[] = {load_vector(left[p] + at)...};
    const auto columns = [&](int pair) TR_LAMBDA { return vld1q_s8(reinterpret_cast<const int8_t*>(right) + 16 * pair); };
    const int8x16_t w0 = columns(0), w1 = columns(1), w2 = columns(2), w3 = columns(3);
    (add_square(sums[p][0], rows[p], w0), ...);
    (add_square(sums[p][1], rows[p], w1), ...);
    (add_square(sums[p][2], rows[p], w2), ...);
    (add_square(sums[p][3], rows[p], w3), ...);
}

// block() of blocks.inl for int8, for an even number of rows, or for one row, whose partner's sums are discarded.
template <class Op, int... r, class Start, class Finish, class Each = Nothing>
    requires(same_type<Op, Int8>)
TR_INLINE void block(Indices<r...>, const Int8* a, ptrdiff_t row, ptrdiff_t step, const std::byte* right, int words, const Start& start,
                     const Finish& finish, const Each& each = {}) {
    constexpr int count = sizeof...(r), pairs = (count + 1) / 2;
    using Pairs = typename MakeIndices<pairs>::type;
    int32x4_t x[2 * pairs] = {}, y[2 * pairs] = {}, sums[pairs][4];
    const Int8* left[pairs];
    (start(r, x[r], y[r]), ...);
    for (int p = 0; p < pairs; ++p) {
        left[p] = a + 2 * p * row;
        sums[p][0] = first_halves(x[2 * p], x[2 * p + 1]), sums[p][1] = second_halves(x[2 * p], x[2 * p + 1]);
        sums[p][2] = first_halves(y[2 * p], y[2 * p + 1]), sums[p][3] = second_halves(y[2 * p], y[2 * p + 1]);
    }
    for (int k = 0; k < words; k += 2, right += 2 * kRightRow<Int8>) {
        each(k, 2);
        add_squares_of(Pairs{}, sums, left, 2 * k * step, right);
        add_squares_of(Pairs{}, sums, left, 2 * (k + 1) * step, right + kRightRow<Int8>);
    }
    for (int p = 0; p < pairs; ++p) {
        x[2 * p] = first_halves(sums[p][0], sums[p][1]), x[2 * p + 1] = second_halves(sums[p][0], sums[p][1]);
        y[2 * p] = first_halves(sums[p][2], sums[p][3]), y[2 * p + 1] = second_halves(sums[p][2], sums[p][3]);
    }
    (finish(r, x[r], y[r]), ...);
}

TR_INLINE uint16x4_t to_bf16(F x) { return vreinterpret_u16_bf16(vcvt_bf16_f32(x)); }
TR_INLINE void store(bf16* p, F x) { vst1_u16(&p->bits, to_bf16(x)); }
TR_INLINE void store2(bf16* p, F a, F b) { vst1q_u16(&p->bits, vcombine_u16(to_bf16(a), to_bf16(b))); }

// One word of attention: one float, or two bf16.
template <class E>
TR_INLINE F to_word(F even, F odd) {
    if constexpr (same_type<E, float>) return odd;
    else return vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(to_bf16(even), to_bf16(odd)), vzip2_u16(to_bf16(even), to_bf16(odd))));
}
template <class E>
TR_INLINE F add_squares(F words, F sum) {
    if constexpr (same_type<E, float>) return fma(words, words, sum);
    else return vbfdotq_f32(sum, vreinterpretq_bf16_f32(words), vreinterpretq_bf16_f32(words));
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

// The values as words of two keys, [keys / 2][D]; a key after the last one is zero.
TR_INLINE const bf16* pair_values(const bf16* v, int n, int D, bf16* to) {
    for (int j = 0; j < n; j += 2)
        for (int c = 0; c < D; c += 8) {
            const uint16x8_t even = vld1q_u16(&v[j * D + c].bits), odd = j + 1 < n ? vld1q_u16(&v[(j + 1) * D + c].bits) : vdupq_n_u16(0);
            vst1q_u16(&to[j * D + 2 * c].bits, vzip1q_u16(even, odd)), vst1q_u16(&to[j * D + 2 * c + 8].bits, vzip2q_u16(even, odd));
        }
    return to;
}

#include "attention.inl"
#include "attention_lanes.inl"
#include "kernels.inl"

constexpr int kBlockRows = 128;  // whose hidden rows are 0.4 MB in bf16
constexpr Kernels kInt8Bf16 = table<Int8, bf16>("smmla", kBlockRows, nothing, nothing);
constexpr Kernels kBf16Bf16 = table<bf16, bf16>("bfdot", kBlockRows, nothing, nothing);

}  // namespace

const Kernels* armi8mm_kernels(Precision precision, unsigned features) {
    if (precision == Precision::int8) return &kInt8Bf16;
    if (precision == Precision::bf16) return &kBf16Bf16;
    return armdot_kernels(precision, features);
}

}  // namespace turborank
