// AVX2: activations are widened to 16 bits when they are quantised and weights when they are read, because the byte
// product of this instruction set (vpmaddubsw) saturates. vpmaddwd does not: the same integers as everywhere.
#include <immintrin.h>

#include "kernels.h"

namespace turborank {
namespace {

constexpr int W = 8;
using F = __m256;
using Int8 = int16_t;

TR_INLINE F set(float x) { return _mm256_set1_ps(x); }
TR_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
TR_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
TR_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
TR_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
TR_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
TR_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
TR_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
TR_INLINE F vmax(F a, F b) { return _mm256_max_ps(a, b); }
TR_INLINE F vmin(F a, F b) { return _mm256_min_ps(a, b); }
TR_INLINE F vabs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
TR_INLINE F from_sum(const int32_t* p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
TR_INLINE F load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
TR_INLINE F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
TR_INLINE F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TR_INLINE F scale2(F p, F n) {  // p * 2^n for integral n in [-127, 127]; 2^-127 counts as zero
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return mul(p, _mm256_castsi256_ps(power));
}
TR_INLINE F keep_first(F a, int n, float other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_blendv_ps(set(other), a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
}
TR_INLINE float hsum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
TR_INLINE float hmax(F a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
TR_INLINE void store_int8(Int8* p, F x) {
    const __m256i n = _mm256_cvtps_epi32(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1)));
}

#include "parts.inl"

constexpr int kRowsAtOnce = 6;  // two columns of accumulators: 12 of the 16 registers

void float_product(const float* a, int lda, int rows, const std::byte* panel, int depth, float* c, int ldc, bool accumulate) {
    for (int column = 0; column < kPanel; column += 16)
        in_parts<kRowsAtOnce>(rows, [&]<int... r>(int from, Indices<r...>) __attribute__((always_inline)) {
            const float *x = a + static_cast<size_t>(from) * lda, *b = reinterpret_cast<const float*>(panel) + column;
            float* y = c + from * ldc + column;
            F left[sizeof...(r)], right[sizeof...(r)];
            ((left[r] = accumulate ? load(y + r * ldc) : set(0.0f), right[r] = accumulate ? load(y + r * ldc + 8) : set(0.0f)), ...);
            for (int k = 0; k < depth; ++k) {
                const F w0 = load(b + k * kPanel), w1 = load(b + k * kPanel + 8);
                ((left[r] = fma(set(x[r * lda + k]), w0, left[r]), right[r] = fma(set(x[r * lda + k]), w1, right[r])), ...);
            }
            ((store(y + r * ldc, left[r]), store(y + r * ldc + 8, right[r])), ...);
        });
}

// In assembly, because gcc 12 holds many products at once and spills the sums.
TR_INLINE void dot_int8(__m256i& sum, __m256i a, __m256i b) {
    __m256i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "x"(b));
}

// Eight columns at a time. A register of weights is 4 columns x 4 of the depth, so each column's sum lies in two
// neighbouring accumulators until the end.
void int8_product(const Int8* a, int lda, int rows, const std::byte* panel, int depth, int32_t* c, int ldc) {
    for (int column = 0; column < kPanel; column += 8)
        in_parts<kRowsAtOnce>(rows, [&]<int... r>(int from, Indices<r...>) __attribute__((always_inline)) {
            const Int8* x = a + static_cast<size_t>(from) * lda;
            const std::byte* b = panel + column / 16 * 1024 + column % 16 * 4;
            int32_t* y = c + from * ldc + column;
            __m256i left[sizeof...(r)], right[sizeof...(r)];
            ((left[r] = _mm256_setzero_si256(), right[r] = _mm256_setzero_si256()), ...);
            for (int k = 0; k < depth; k += 4) {
                const __m128i* w = reinterpret_cast<const __m128i*>(b + k / 64 * 2048 + k % 64 * 16);
                const __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(w)), w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(w + 1));
                const auto row = [&](int i) __attribute__((always_inline)) {
                    int64_t quad;
                    std::memcpy(&quad, x + i * lda + k, 8);
                    const __m256i all = _mm256_set1_epi64x(quad);
                    dot_int8(left[i], all, w0);
                    dot_int8(right[i], all, w1);
                };
                (row(r), ...);
            }
            const auto put = [&](int i) __attribute__((always_inline)) {
                const __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(left[i], right[i]), 0xd8);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i * ldc), sums);
            };
            (put(r), ...);
        });
}

template <class Between>
TR_INLINE void gemm(const float* a, int lda, int rows, const std::byte* panel, int depth, float* c, int ldc, bool accumulate,
                    const Between& between) {
    float_product(a, lda, rows, panel, depth, c, ldc, accumulate);
    between(0);
}

template <class Between>
TR_INLINE void gemm(const Int8* a, int lda, int rows, const std::byte* panel, int depth, int32_t* c, int ldc, bool, const Between& between) {
    int8_product(a, lda, rows, panel, depth, c, ldc);
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
constexpr Kernels kInt8 = table<Int8, float>("vpmaddwd", nothing, nothing);
constexpr Kernels kFloat = table<float, float>("vfmadd ymm", nothing, nothing);

}  // namespace

const Kernels* avx2_kernels(Precision precision, unsigned) {
    return precision == Precision::int8 ? &kInt8 : precision == Precision::fp32 ? &kFloat : nullptr;
}

}  // namespace turborank
