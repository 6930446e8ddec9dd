// Vector operations for 512-bit vectors of 16 floats, float and bf16 products. isa_avx512.cpp and isa_amx.cpp add int8.

constexpr int W = 16;
using F = __m512;

TR_INLINE F set(float x) { return _mm512_set1_ps(x); }
TR_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
TR_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
TR_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
TR_INLINE F vmax(F a, F b) { return _mm512_max_ps(a, b); }
TR_INLINE F vmin(F a, F b) { return _mm512_min_ps(a, b); }
TR_INLINE F vabs(F a) { return _mm512_abs_ps(a); }
TR_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#define TR_FRACTION
TR_INLINE F fraction(F x) { return _mm512_reduce_ps(x, 0x09); }
TR_INLINE F scale2(F p, F n) { return _mm512_scalef_ps(p, n); }  // p * 2^floor(n)
TR_INLINE F square_root(F a) { return _mm512_sqrt_ps(a); }
TR_INLINE F load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
TR_INLINE F load(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
TR_INLINE F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
TR_INLINE F keep_first(F a, int n, float other) {
    const auto mask = static_cast<__mmask16>(n >= W ? 0xffff : (1u << n) - 1);
    return _mm512_mask_blend_ps(mask, set(other), a);
}
TR_INLINE float hsum(F a) { return _mm512_reduce_add_ps(a); }
TR_INLINE float hmax(F a) { return _mm512_reduce_max_ps(a); }

#define TR_LOOKUP  // attention_relative.inl
TR_INLINE F lookup(const float* from, const int32_t* rows) {
    return _mm512_permutexvar_ps(_mm512_sub_epi32(_mm512_loadu_si512(rows), _mm512_set1_epi32(*rows)), load(from + *rows));
}
#define TR_PICK
template <int bit>
TR_INLINE F pick(F a, F b) {
    constexpr __mmask16 lanes = bit == 1 ? 0xaaaa : bit == 2 ? 0xcccc : bit == 4 ? 0xf0f0 : 0xff00;
    return _mm512_mask_blend_ps(lanes, a, b);
}

TR_INLINE F load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
TR_INLINE void store(bf16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// Stores one whole cache line, so that a later load is forwarded from one store.
TR_INLINE void store2(bf16* p, F a, F b) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a))); }

// largest() of common.inl. Bits of non-negative bf16 are ordered like integers; negative ones are negative as int16.
template <bool sizes>
float largest(const bf16* row, int n) {
    __m512i top = _mm512_setzero_si512();
    for (int c = 0; c < n; c += 32) {
        const __m512i x = _mm512_loadu_si512(row + c);
        top = _mm512_max_epi16(top, sizes ? _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)) : x);
    }
    const __m512i high = _mm512_and_si512(top, _mm512_set1_epi32(static_cast<int>(0xffff0000))), low = _mm512_slli_epi32(top, 16);
    return hmax(vmax(_mm512_castsi512_ps(high), _mm512_castsi512_ps(low)));
}

#include "common.inl"

// The dot products are written in assembly because gcc 12 copies and spills the sums of these intrinsics.
TR_INLINE void dot_bf16(F& sum, F a, F b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

using Integers = __m512i;
template <class Op>
TR_INLINE F load_right(const std::byte* p) { return _mm512_loadu_ps(p); }
TR_INLINE void dot(F& left, F& right, const float* a, F w0, F w1) {
    const F all = set(*a);
    left = fma(all, w0, left), right = fma(all, w1, right);
}
TR_INLINE void dot(F& left, F& right, const bf16* a, F w0, F w1) {
    float pair;
    std::memcpy(&pair, a, 4);
    dot_bf16(left, set(pair), w0), dot_bf16(right, set(pair), w1);
}

// One word of attention: one float, or two bf16.
template <class E>
TR_INLINE F to_word(F even, F odd) {
    if constexpr (same_type<E, float>) return odd;
    alignas(64) static constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both));
}

template <class E>
TR_INLINE F add_squares(F words, F sum) {
    if constexpr (same_type<E, float>) return fma(words, words, sum);
    dot_bf16(sum, words, words);
    return sum;
}

// Transposes 16 rows of 16 words of 32 bits in place, by exchanging blocks of 1, 2, 4 and 8 words.
TR_INLINE void transpose(F (&m)[16]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const auto round = [&](int bit) __attribute__((always_inline)) {
        const auto upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit));
        // Indices into two rows: + 16 selects the second row.
        const __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - bit));
        const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(bit)), upper, lane, _mm512_set1_epi32(16));
        for (int i = 0; i < 16; ++i)
            if (!(i & bit)) {
                const F a = m[i], b = m[i + bit];
                m[i] = _mm512_permutex2var_ps(a, low, b);
                m[i + bit] = _mm512_permutex2var_ps(a, high, b);
            }
    };
    round(1), round(2), round(4), round(8);
}

// Interleaves 32 columns of two rows (null: zeros) to words of two: columns 0 to 15 and 16 to 31.
TR_INLINE void pair_rows(const bf16* even, const bf16* odd, F& left, F& right) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = even ? _mm512_loadu_si512(even) : _mm512_setzero_si512(), b = odd ? _mm512_loadu_si512(odd) : _mm512_setzero_si512();
    left = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, low, b)), right = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, high, b));
}
