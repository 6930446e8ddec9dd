// Vector operations for 128-bit vectors of 64-bit Arm: 4 floats. isa_armdot.cpp and isa_armi8mm.cpp add int8, the latter also
// bf16.
#include <arm_neon.h>

constexpr int W = 4;
using F = float32x4_t;

TR_INLINE F set(float x) { return vdupq_n_f32(x); }
TR_INLINE F load(const float* p) { return vld1q_f32(p); }
TR_INLINE void store(float* p, F x) { vst1q_f32(p, x); }
TR_INLINE F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
TR_INLINE F vmax(F a, F b) { return vmaxq_f32(a, b); }
TR_INLINE F vmin(F a, F b) { return vminq_f32(a, b); }
TR_INLINE F vabs(F a) { return vabsq_f32(a); }
TR_INLINE F square_root(F a) { return vsqrtq_f32(a); }
TR_INLINE F load(const int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }
TR_INLINE F load(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
TR_INLINE F load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
TR_INLINE F load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
TR_INLINE F round(F a) { return vrndnq_f32(a); }
TR_INLINE F scale2(F p, F n) {  // p * 2^n for integral n; 2^-127 counts as zero
    const int32x4_t whole = vcvtq_s32_f32(vmin(vmax(n, set(-127.0f)), set(127.0f)));
    return p * vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(whole, vdupq_n_s32(127)), 23));
}
TR_INLINE F keep_first(F a, int n, float other) {
    static constexpr int32_t kLane[4] = {0, 1, 2, 3};
    return vbslq_f32(vcgtq_s32(vdupq_n_s32(n), vld1q_s32(kLane)), a, set(other));
}
TR_INLINE float hsum(F a) { return vaddvq_f32(a); }
TR_INLINE float hmax(F a) { return vmaxvq_f32(a); }

#define TR_LOOKUP  // attention_relative.inl
TR_INLINE F lookup(const float* from, const int32_t* rows) {
    const uint32x4_t lanes = vreinterpretq_u32_s32(vsubq_s32(vld1q_s32(rows), vdupq_n_s32(*rows)));
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), lanes, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(load(from + *rows)), vreinterpretq_u8_u32(bytes)));
}
#define TR_PICK
template <int bit>
TR_INLINE F pick(F a, F b) {
    static constexpr uint32_t kTaken[4] = {0, bit == 1 ? ~0u : 0u, bit == 2 ? ~0u : 0u, ~0u};
    return vbslq_f32(vld1q_u32(kTaken), b, a);
}

using Int8 = int8_t;
TR_INLINE void store_int8(Int8* p, F x) {
    const int16x4_t n = vqmovn_s32(vcvtnq_s32_f32(x));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(n, n))), 0);
    std::memcpy(p, &four, 4);
}

#include "common.inl"

using Integers = int32x4_t;
constexpr bool kTiles = false;
constexpr int kInt8Offset = 0;
// Registers: 16 sums, and the words of the left and the vectors of the right side of one step; 26 of 32 with sdot, 24 with smmla.
constexpr int kRowsAtOnce = 8;

// Four words of one row, or one vector of the right side: floats, pairs of bf16, or groups of int8.
template <class Op>
TR_INLINE auto load_vector(const Op* p) {
    if constexpr (same_type<Op, Int8>) return vld1q_s8(p);
    else return vld1q_f32(reinterpret_cast<const float*>(p));
}
template <class Op>
TR_INLINE auto load_right(const std::byte* p) { return load_vector(reinterpret_cast<const Op*>(p)); }

// sum += the product of a vector with the word in one lane of `left`. In assembly, because gcc 12 copies the sums of the
// intrinsics between registers: eight copies for 64 products.
template <class Op, int lane>
TR_INLINE void add_dot(F& sum, F right, F left) {
    if constexpr (same_type<Op, float>) __asm__("fmla %0.4s, %1.4s, %2.s[%3]" : "+w"(sum) : "w"(right), "w"(left), "i"(lane));
    else __asm__("bfdot %0.4s, %1.8h, %2.2h[%3]" : "+w"(sum) : "w"(right), "w"(left), "i"(lane));
}
template <class Op, int lane>
TR_INLINE void add_dot(int32x4_t& sum, int8x16_t right, int8x16_t left) {
    __asm__("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(sum) : "w"(right), "w"(left), "i"(lane));
}

// Transposes four rows of four floats in place.
TR_INLINE void transpose(F (&m)[4]) {
    const auto low = [](F a, F b) TR_LAMBDA { return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b))); };
    const auto high = [](F a, F b) TR_LAMBDA { return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b))); };
    const F a = vtrn1q_f32(m[0], m[1]), b = vtrn2q_f32(m[0], m[1]), c = vtrn1q_f32(m[2], m[3]), d = vtrn2q_f32(m[2], m[3]);
    m[0] = low(a, c), m[1] = low(b, d), m[2] = high(a, c), m[3] = high(b, d);
}

#include "blocks.inl"

// One word of the depth, lane `lane` of each row's four words, by 2 W columns.
template <class Op, int lane, int... r, class Left>
TR_INLINE void add_dots(Indices<r...>, Sum<Op>* x, Sum<Op>* y, const Left* left, const std::byte* right) {
    const auto w0 = load_right<Op>(right), w1 = load_right<Op>(right + kRightVector<Op>);
    (add_dot<Op, lane>(x[r], w0, left[r]), ...);
    (add_dot<Op, lane>(y[r], w1, left[r]), ...);
}

// block() of blocks.inl. The multiplication can use one lane of its second factor, so words of the left side need no
// broadcast: one load reads four words of a row or, if words of consecutive rows are adjacent (attention's values), the words
// of four rows.
template <class Op>
constexpr bool kByLane = !same_type<Op, Int8> || kInt8Group == 4;

template <class Op, int... r, class Start, class Finish, class Each = Nothing>
    requires(kByLane<Op>)
TR_INLINE void block(Indices<r...> rows, const Op* a, ptrdiff_t row, ptrdiff_t step, const std::byte* right, int words, const Start& start,
                     const Finish& finish, const Each& each = {}) {
    using Left = decltype(load_vector(a));
    Sum<Op> x[sizeof...(r)], y[sizeof...(r)];
    (start(r, x[r], y[r]), ...);
    if (!same_type<Op, Int8> && row == kWord<Op>) {
        for (int k = 0; k < words; ++k, a += step, right += kRightRow<Op>) {
            each(k, 1);
            const auto w0 = load_right<Op>(right), w1 = load_right<Op>(right + kRightVector<Op>);
            Left left[(sizeof...(r) + 3) / 4];
            ((r % 4 == 0 ? void(left[r / 4] = load_vector(a + r * kWord<Op>)) : void()), ...);
            (add_dot<Op, r % 4>(x[r], w0, left[r / 4]), ...);
            (add_dot<Op, r % 4>(y[r], w1, left[r / 4]), ...);
        }
    } else {
        for (int k = 0; k < words; k += 4, a += 4 * step, right += 4 * kRightRow<Op>) {
            each(k, 4);
            const Left left[] = {load_vector(a + r * row)...};
            add_dots<Op, 0>(rows, x, y, left, right);
            add_dots<Op, 1>(rows, x, y, left, right + kRightRow<Op>);
            add_dots<Op, 2>(rows, x, y, left, right + 2 * kRightRow<Op>);
            add_dots<Op, 3>(rows, x, y, left, right + 3 * kRightRow<Op>);
        }
    }
    (finish(r, x[r], y[r]), ...);
}

void nothing() {}
