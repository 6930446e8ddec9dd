// The instruction-set row that any compiler takes: plain loops over 8 floats, which it may vectorise as it likes.
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
TR_INLINE F add(F a, F b) { TR_EACH(a.v[i] + b.v[i]); }
TR_INLINE F sub(F a, F b) { TR_EACH(a.v[i] - b.v[i]); }
TR_INLINE F mul(F a, F b) { TR_EACH(a.v[i] * b.v[i]); }
TR_INLINE F div(F a, F b) { TR_EACH(a.v[i] / b.v[i]); }
TR_INLINE F fma(F a, F b, F c) { TR_EACH(a.v[i] * b.v[i] + c.v[i]); }
TR_INLINE F vmax(F a, F b) { TR_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
TR_INLINE F vmin(F a, F b) { TR_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
TR_INLINE F vabs(F a) { TR_EACH(a.v[i] < 0.0f ? -a.v[i] : a.v[i]); }
TR_INLINE F from_sum(const int32_t* p) { TR_EACH(static_cast<float>(p[i])); }
TR_INLINE F load_int8(const int8_t* p) { TR_EACH(static_cast<float>(p[i])); }
TR_INLINE F keep_first(F a, int n, float other) { TR_EACH(i < n ? a.v[i] : other); }
// To the nearest integer, ties to even, for |x| < 2^22; the compiler must not reorder it (no -ffast-math).
TR_INLINE F round(F a) { TR_EACH((a.v[i] + 12582912.0f) - 12582912.0f); }
TR_INLINE float hsum(F a) {
    return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
}
TR_INLINE float hmax(F a) {
    float top = a.v[0];
    for (int i = 1; i < W; ++i) top = a.v[i] > top ? a.v[i] : top;
    return top;
}

// p * 2^n for integral n in [-127, 127]; 2^-127 counts as zero.
TR_INLINE F scale2(F p, F n) {
    F r;
    for (int i = 0; i < W; ++i) {
        const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
        float power;
        std::memcpy(&power, &bits, 4);
        r.v[i] = p.v[i] * power;
    }
    return r;
}

TR_INLINE F load_half(const uint16_t* p) {
    F r;
    for (int i = 0; i < W; ++i) {
        const uint32_t h = p[i], sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
        const uint32_t bits = rest >= 0x7c00u ? 0x7f800000u | (rest & 0x3ffu) << 13 : (rest << 13) + 0x38000000u;
        float value;
        std::memcpy(&value, &bits, 4);
        if (rest < 0x0400u) value = static_cast<float>(rest) * 5.9604644775390625e-08f;  // subnormal: units of 2^-24
        std::memcpy(&r.v[i], &value, 4);
        r.v[i] = sign ? -r.v[i] : r.v[i];
    }
    return r;
}

TR_INLINE void store_int8(Int8* p, F x) {
    const F n = round(x);
    for (int i = 0; i < W; ++i) p[i] = static_cast<Int8>(static_cast<int32_t>(n.v[i]));
}

template <class Between>
TR_INLINE void gemm(const Int8* a, int lda, int rows, const std::byte* panel, int depth, int32_t* c, int ldc, bool accumulate,
                    const Between& between) {
    const int8_t* b = reinterpret_cast<const int8_t*>(panel);
    for (int r = 0; r < rows; ++r) {
        int32_t* out = c + r * ldc;
        for (int j = 0; j < kPanel; ++j) out[j] = accumulate ? out[j] : 0;
        for (int k = 0; k < depth; k += 4)
            for (int half = 0; half < 2; ++half) {
                const int8_t* w = b + k / 64 * 2048 + half * 1024 + k % 64 * 16;
                for (int j = 0; j < 16; ++j) {
                    int32_t sum = 0;
                    for (int i = 0; i < 4; ++i) sum += a[r * lda + k + i] * w[4 * j + i];
                    out[16 * half + j] += sum;
                }
            }
    }
    between(0);
}

template <class Between>
TR_INLINE void gemm(const float* a, int lda, int rows, const std::byte* panel, int depth, float* c, int ldc, bool accumulate,
                    const Between& between) {
    const float* b = reinterpret_cast<const float*>(panel);
    for (int r = 0; r < rows; ++r) {
        float sum[kPanel];
        for (int j = 0; j < kPanel; ++j) sum[j] = accumulate ? c[r * ldc + j] : 0.0f;
        for (int k = 0; k < depth; ++k)
            for (int j = 0; j < kPanel; ++j) sum[j] += a[r * lda + k] * b[k * kPanel + j];
        for (int j = 0; j < kPanel; ++j) c[r * ldc + j] = sum[j];
    }
    between(0);
}

// int8 operands are row-major.
TR_INLINE size_t int8_row(int row, int depth) { return static_cast<size_t>(row) * depth; }
TR_INLINE int int8_column(int column) { return column; }

template <class Op>
constexpr int gemm_moments(int) { return 1; }

#include "attention_f32.inl"
#include "kernels.inl"

void nothing() {}
constexpr Kernels kInt8 = table<Int8, float>("int8 multiply-add", nothing, nothing);
constexpr Kernels kFloat = table<float, float>("float multiply-add", nothing, nothing);

}  // namespace

const Kernels* portable_kernels(Precision precision, unsigned) {
    return precision == Precision::int8 ? &kInt8 : precision == Precision::fp32 ? &kFloat : nullptr;
}

}  // namespace turborank
