// int8 with vpdpbusd of 256 bits in the encoding TR_VPDPBUSD; all else is that of AVX2. As with AVX-512, activations are
// stored plus 128 and the initial sums correct for it.

using Int8 = uint8_t;
constexpr int kInt8Group = 4, kInt8Offset = 128;

#include "avx2.inl"

TR_INLINE void store_int8(Int8* p, F x) {
    const __m256i n = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_xor_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(-128)));
}

template <class Op>
TR_INLINE auto load_right(const std::byte* p) {
    if constexpr (same_type<Op, Int8>) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    else return load(reinterpret_cast<const float*>(p));
}

#if defined(TR_VPDPBUSD)
TR_INLINE void dot(__m256i& left, __m256i& right, const Int8* a, __m256i w0, __m256i w1) {
    __m256i all;
    __asm__("vpbroadcastd %3, %2\n\t" TR_VPDPBUSD " %4, %2, %0\n\t" TR_VPDPBUSD " %5, %2, %1"
            : "+x"(left), "+x"(right), "=&x"(all)
            : "m"(*reinterpret_cast<const int32_t*>(a)), "x"(w0), "x"(w1));
}
#else
// The stand-in for vpdpbusd: multiplies even and odd bytes separately, by two instructions whose sums are exact.
TR_INLINE void dot(__m256i& left, __m256i& right, const Int8* a, __m256i w0, __m256i w1) {
    int32_t word;
    std::memcpy(&word, a, 4);
    const __m256i all = _mm256_set1_epi32(word), even = _mm256_and_si256(all, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(all, 8);
    const auto add = [&](__m256i sum, __m256i w) TR_LAMBDA {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8)));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, _mm256_srai_epi16(w, 8)));
    };
    left = add(left, w0), right = add(right, w1);
}
#endif

#include "blocks.inl"
#include "float_words.inl"
#include "attention.inl"
#include "attention_lanes.inl"
#include "kernels.inl"

constexpr int kBlockRows = 96;
void nothing() {}
