// The portable row: plain C++ loops over 8 floats, which the compiler may vectorise.
#include "kernels.h"

namespace turborank {
namespace {

constexpr int W = 8;
struct F {
    float v[W];
};
using Int8 = int8_t;

#define TR_EACH(expression)               \
    F r;                                  \
    for (int i = 0; i < W; ++i) r.v[i] = (expression); \
    return r

TR_INLINE F set(float x) { TR_EACH(x); }
TR_INLINE F load(const float* p) { TR_EACH(p[i]); }
TR_INLINE void store(float* p, F x) { for (int i = 0; i < W; ++i) p[i] = x.v[i]; }
TR_INLINE F operator+(F a, F b) { TR_EACH(a.v[i] + b.v[i]); }
TR_INLINE F operator-(F a, F b) { TR_EACH(a.v[i] - b.v[i]); }
TR_INLINE F operator*(F a, F b) { TR_EACH(a.v[i] * b.v[i]); }
TR_INLINE F operator/(F a, F b) { TR_EACH(a.v[i] / b.v[i]); }
TR_INLINE F fma(F a, F b, F c) { TR_EACH(a.v[i] * b.v[i] + c.v[i]); }
TR_INLINE F vmax(F a, F b) { TR_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
TR_INLINE F vmin(F a, F b) { TR_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
TR_INLINE F vabs(F a) { TR_EACH(a.v[i] < 0.0f ? -a.v[i] : a.v[i]); }
TR_INLINE F square_root(F a) { TR_EACH(__builtin_sqrtf(a.v[i])); }
TR_INLINE F load(const int8_t* p) { TR_EACH(static_cast<float>(p[i])); }
TR_INLINE F keep_first(F a, int n, float other) { TR_EACH(i < n ? a.v[i] : other); }
// Rounds to the nearest integer, ties to even, for |x| < 2^22. Must not be compiled with -ffast-math, which reorders it.
TR_INLINE F round(F a) { TR_EACH((a.v[i] + 12582912.0f) - 12582912.0f); }
TR_INLINE float hsum(F a) {
    return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
}
TR_INLINE float hmax(F a) {
    float top = a.v[0];
    for (int i = 1; i < W; ++i) top = a.v[i] > top ? a.v[i] : top;
    return top;
}

TR_INLINE F scale2(F p, F n) {  // p * 2^n for integral n; 2^-127 counts as zero
    const F whole = vmin(vmax(n, set(-127.0f)), set(127.0f));
    TR_EACH(p.v[i] * __builtin_bit_cast(float, static_cast<uint32_t>(static_cast<int32_t>(whole.v[i]) + 127) << 23));
}
TR_INLINE float half_to_float(uint16_t h) {
    const uint32_t rest = h & 0x7fffu, bits = (rest << 13) + (rest < 0x7c00u ? 0x38000000u : 0x70000000u);
    const float size = rest < 0x0400u ? static_cast<float>(rest) * 0x1p-24f : __builtin_bit_cast(float, bits);  // the first: subnormal
    return h & 0x8000u ? -size : size;
}
TR_INLINE F load(const bf16* p) { TR_EACH(__builtin_bit_cast(float, static_cast<uint32_t>(p[i].bits) << 16)); }
TR_INLINE F load_half(const uint16_t* p) { TR_EACH(half_to_float(p[i])); }
TR_INLINE void store_int8(Int8* p, F x) {
    const F n = round(x);
    for (int i = 0; i < W; ++i) p[i] = static_cast<Int8>(static_cast<int32_t>(n.v[i]));
}

#include "common.inl"

struct Integers {
    int32_t v[W];
};
struct Bytes {
    const int8_t* p;  // W columns of four
};
constexpr bool kTiles = false;
constexpr int kInt8Group = 4, kInt8Offset = 0, kRowsAtOnce = 4;

template <class Op>
TR_INLINE auto load_right(const std::byte* p) {
    if constexpr (same_type<Op, Int8>) return Bytes{reinterpret_cast<const int8_t*>(p)};
    else return load(reinterpret_cast<const float*>(p));
}
TR_INLINE F load(const int32_t* p) { TR_EACH(static_cast<float>(p[i])); }

TR_INLINE void dot(F& left, F& right, const float* a, const F& w0, const F& w1) {
    for (int i = 0; i < W; ++i) left.v[i] += *a * w0.v[i], right.v[i] += *a * w1.v[i];
}
TR_INLINE void dot(Integers& sum, const Int8* a, Bytes w) {
    for (int i = 0; i < W; ++i) sum.v[i] += a[0] * w.p[4 * i] + a[1] * w.p[4 * i + 1] + a[2] * w.p[4 * i + 2] + a[3] * w.p[4 * i + 3];
}
TR_INLINE void dot(Integers& left, Integers& right, const Int8* a, Bytes w0, Bytes w1) { dot(left, a, w0), dot(right, a, w1); }

TR_INLINE void transpose(F (&m)[W]) {
    for (int i = 0; i < W; ++i)
        for (int j = 0; j < i; ++j) {
            const float x = m[i].v[j];
            m[i].v[j] = m[j].v[i], m[j].v[i] = x;
        }
}

#include "blocks.inl"
#include "float_words.inl"
#include "attention.inl"
#include "attention_lanes.inl"
#include "kernels.inl"

constexpr int kBlockRows = 96;
void nothing() {}
constexpr Kernels kInt8 = table<Int8, float>("int8 multiply-add", kBlockRows, nothing, nothing);
constexpr Kernels kFloat = table<float, float>("float multiply-add", kBlockRows, nothing, nothing);

}  // namespace

const Kernels* portable_kernels(Precision precision, unsigned) {
    return precision == Precision::int8 ? &kInt8 : precision == Precision::fp32 ? &kFloat : nullptr;
}

}  // namespace turborank
