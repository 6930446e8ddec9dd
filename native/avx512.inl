// Vocabulary of kernels.inl for 512-bit vectors: 16 floats, float and bf16 matrix products, bf16 keys and values.
// Included by isa_avx512.cpp and isa_amx.cpp, which add the int8 product.

constexpr int W = 16;
using F = __m512;

TR_INLINE F set(float x) { return _mm512_set1_ps(x); }
TR_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
TR_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
TR_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
TR_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
TR_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
TR_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
TR_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
TR_INLINE F vmax(F a, F b) { return _mm512_max_ps(a, b); }
TR_INLINE F vmin(F a, F b) { return _mm512_min_ps(a, b); }
TR_INLINE F vabs(F a) { return _mm512_abs_ps(a); }
TR_INLINE F from_sum(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
TR_INLINE F load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
TR_INLINE F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
TR_INLINE F keep_first(F a, int n, float other) {
    const auto mask = static_cast<__mmask16>(n >= W ? 0xffff : (1u << n) - 1);
    return _mm512_mask_blend_ps(mask, set(other), a);
}
TR_INLINE float hsum(F a) { return _mm512_reduce_add_ps(a); }
TR_INLINE float hmax(F a) { return _mm512_reduce_max_ps(a); }

TR_INLINE F load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
TR_INLINE void store(bf16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// One whole cache line: a tile load that follows finds it in one piece.
TR_INLINE void store2(bf16* p, F a, F b) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a))); }

// The largest |x| of a row: without its sign, a bf16 is ordered as an integer.
[[maybe_unused]] float largest_size(const bf16* row, int n) {
    __m512i top = _mm512_setzero_si512();
    for (int c = 0; c < n; c += 32) top = _mm512_max_epu16(top, _mm512_and_si512(_mm512_loadu_si512(row + c), _mm512_set1_epi16(0x7fff)));
    const __m512i high = _mm512_and_si512(top, _mm512_set1_epi32(static_cast<int>(0xffff0000))), low = _mm512_slli_epi32(top, 16);
    return hmax(vmax(_mm512_castsi512_ps(high), _mm512_castsi512_ps(low)));
}

// 2^x by its floor and fraction, one instruction each; the polynomials are minimax fits on [0, 1).
#define TR_HAS_EXP2
template <int N>
TR_INLINE F polynomial(F x, const float (&c)[N]) {
    F y = set(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) y = fma(y, x, set(c[i]));
    return y;
}
template <bool exact>
TR_INLINE F native_exp2(F x) {
    static constexpr float fast[] = {0.9999251961708069f, 0.6958335041999817f, 0.2260671705007553f, 0.07802452147006989f};
    static constexpr float fine[] = {0.9999999403953552f,  0.6931530833244324f,   0.24015361070632935f,
                                     0.05582631751894951f, 0.008989340625703335f, 0.0018775766948238015f};
    const F fraction = _mm512_reduce_ps(x, 0x09);
    return _mm512_scalef_ps(exact ? polynomial(fraction, fine) : polynomial(fraction, fast), x);
}

#include "parts.inl"

// With two columns of accumulators, 12 rows fill 24 of the 32 registers.
constexpr int kRowsAtOnce = 12;

void float_product(const float* a, int lda, int rows, const std::byte* panel, int depth, float* c, int ldc, bool accumulate) {
    const float* b = reinterpret_cast<const float*>(panel);
    in_parts<kRowsAtOnce>(rows, [&]<int... r>(int from, Indices<r...>) __attribute__((always_inline)) {
        const float* x = a + static_cast<size_t>(from) * lda;
        float* y = c + from * ldc;
        F left[sizeof...(r)], right[sizeof...(r)];
        ((left[r] = accumulate ? load(y + r * ldc) : set(0.0f), right[r] = accumulate ? load(y + r * ldc + 16) : set(0.0f)), ...);
        for (int k = 0; k < depth; ++k) {
            const F w0 = load(b + k * kPanel), w1 = load(b + k * kPanel + 16);
            ((left[r] = fma(set(x[r * lda + k]), w0, left[r]), right[r] = fma(set(x[r * lda + k]), w1, right[r])), ...);
        }
        ((store(y + r * ldc, left[r]), store(y + r * ldc + 16, right[r])), ...);
    });
}

// The products below are written in assembly because gcc 12 copies and spills accumulators of these intrinsics.
TR_INLINE void dot_bf16(F& sum, __m512i a, __m512i b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

[[maybe_unused]] void bf16_product(const bf16* a, int lda, int rows, const std::byte* panel, int depth, float* c, int ldc, bool accumulate) {
    in_parts<kRowsAtOnce>(rows, [&]<int... r>(int from, Indices<r...>) __attribute__((always_inline)) {
        const bf16* x = a + static_cast<size_t>(from) * lda;
        float* y = c + from * ldc;
        F left[sizeof...(r)], right[sizeof...(r)];
        ((left[r] = accumulate ? load(y + r * ldc) : set(0.0f), right[r] = accumulate ? load(y + r * ldc + 16) : set(0.0f)), ...);
        for (int k = 0; k < depth; k += 2) {
            const std::byte* w = panel + k / 32 * 2048 + k % 32 * 32;
            const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 1024);
            const auto row = [&](int i) __attribute__((always_inline)) {
                int32_t pair;
                std::memcpy(&pair, x + i * lda + k, 4);
                const __m512i both = _mm512_set1_epi32(pair);
                dot_bf16(left[i], both, w0);
                dot_bf16(right[i], both, w1);
            };
            (row(r), ...);
        }
        ((store(y + r * ldc, left[r]), store(y + r * ldc + 16, right[r])), ...);
    });
}

template <class Between>
TR_INLINE void gemm(const float* a, int lda, int rows, const std::byte* panel, int depth, float* c, int ldc, bool accumulate,
                    const Between& between) {
    float_product(a, lda, rows, panel, depth, c, ldc, accumulate);
    between(0);
}

// 16 rows of 16 words of 32 bits, transposed in place: four rounds of exchanging blocks of 1, 2, 4, 8.
TR_INLINE void transpose(__m512i (&m)[16]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto round = [&](int bit) __attribute__((always_inline)) {
        const auto upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
        // Lanes of two rows: index + 16 means the second row.
        const __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - bit));
        const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(bit)), upper, lane, _mm512_set1_epi32(16));
        for (int i = 0; i < 16; ++i)
            if (!(i & bit)) {
                const __m512i a = m[i], b = m[i + bit];
                m[i] = _mm512_permutex2var_epi32(a, low, b);
                m[i + bit] = _mm512_permutex2var_epi32(a, high, b);
            }
    };
    round(1), round(2), round(4), round(8);
}

TR_INLINE void pack_keys(const bf16* k, int D, int rows, bf16* panel) {
    for (int c = 0; c < D; c += 32)
        for (int half = 0; half < 2; ++half) {
            __m512i m[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j)
                m[j] = 16 * half + j < rows ? _mm512_loadu_si512(k + (16 * half + j) * D + c) : _mm512_setzero_si512();
            transpose(m);
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) _mm512_storeu_si512(panel + c * kPanel + half * 512 + j * 32, m[j]);
        }
}

TR_INLINE void pack_values(const bf16* v, int stride, int rows, bf16* panel) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    const __m512i left = _mm512_load_si512(order), right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
    for (int j = 0; j < kTile; j += 2) {
        const __m512i even = j < rows ? _mm512_loadu_si512(v + j * stride) : _mm512_setzero_si512();
        const __m512i odd = j + 1 < rows ? _mm512_loadu_si512(v + (j + 1) * stride) : _mm512_setzero_si512();
        _mm512_storeu_si512(panel + j * 16, _mm512_permutex2var_epi16(even, left, odd));
        _mm512_storeu_si512(panel + 512 + j * 16, _mm512_permutex2var_epi16(even, right, odd));
    }
}

TR_INLINE F key_squares(const bf16* panel, int D) {
    F largest = set(0.0f);
    for (int half = 0; half < 2; ++half) {
        F sum = set(0.0f);
        for (int c = 0; c < D; c += 2) {
            const __m512i pair = _mm512_loadu_si512(panel + c / 32 * 1024 + half * 512 + c % 32 * 16);
            dot_bf16(sum, pair, pair);
        }
        largest = vmax(largest, sum);
    }
    return largest;
}
