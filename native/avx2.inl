// Vector operations for 256-bit vectors of 8 floats. isa_avx2.cpp and avxvnni.inl add int8.

constexpr int W = 8;
using F = __m256;

TR_INLINE F set(float x) { return _mm256_set1_ps(x); }
TR_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
TR_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
TR_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
TR_INLINE F vmax(F a, F b) { return _mm256_max_ps(a, b); }
TR_INLINE F vmin(F a, F b) { return _mm256_min_ps(a, b); }
TR_INLINE F vabs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
TR_INLINE F square_root(F a) { return _mm256_sqrt_ps(a); }
TR_INLINE F load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
TR_INLINE F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
TR_INLINE F load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
TR_INLINE F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TR_INLINE F scale2(F p, F n) {  // p * 2^n for integral n; 2^-127 counts as zero
    const __m256i whole = _mm256_cvtps_epi32(vmin(vmax(n, set(-127.0f)), set(127.0f)));
    return p * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23));
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
#define TR_LOOKUP  // attention_relative.inl
TR_INLINE F lookup(const float* from, const int32_t* rows) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows));
    return _mm256_permutevar8x32_ps(load(from + *rows), _mm256_sub_epi32(lanes, _mm256_set1_epi32(*rows)));
}
#define TR_PICK
template <int bit>
TR_INLINE F pick(F a, F b) { return _mm256_blend_ps(a, b, bit == 1 ? 0xaa : bit == 2 ? 0xcc : 0xf0); }
TR_INLINE F load(const int32_t* p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

#include "common.inl"

using Integers = __m256i;
constexpr bool kTiles = false;
constexpr int kRowsAtOnce = 6;  // 12 sums, two words of weights, a word of activations, and one register more

TR_INLINE void dot(F& left, F& right, const float* a, F w0, F w1) {
    const F all = set(*a);
    left = fma(all, w0, left), right = fma(all, w1, right);
}

// Transposes eight rows of eight floats in place.
TR_INLINE void transpose(F (&m)[8]) {
    F a[8], b[8];
    for (int i = 0; i < 8; i += 2) a[i] = _mm256_unpacklo_ps(m[i], m[i + 1]), a[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) m[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20), m[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
}
