// AVX2. The byte product of this instruction set, vpmaddubsw, adds two products in 16 bits and saturates, so there are two ways:
// `wide` widens activations to 16 bits when they are quantised and weights when they are read; vpmaddwd is exact, so the integer
// sums equal those of the other rows. `seven` has activations of 7 bits and weights of which four of one sign never add up to
// more than 258 (native_weights.py): four products fit, 127 * 258 is 32,766. Three multiplications then form 64 products instead of
// four, with half the additions. native.py chooses it for the models whose heads are served by two-term rows.
#include <immintrin.h>

#include "kernels.h"

namespace turborank {
namespace {

constexpr int kBlockRows = 96;
void nothing() {}

namespace wide {
using Int8 = int16_t;
constexpr int kInt8Group = 2, kInt8Offset = 0;

#include "avx2.inl"

TR_INLINE void store_int8(Int8* p, F x) {
    const __m256i n = _mm256_cvtps_epi32(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1)));
}

template <class Op>
TR_INLINE auto load_right(const std::byte* p) {
    if constexpr (same_type<Op, Int8>) return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    else return load(reinterpret_cast<const float*>(p));
}

// In assembly, because gcc 12 keeps many products in registers at once and spills the sums.
TR_INLINE void dot(__m256i& left, __m256i& right, const Int8* a, __m256i w0, __m256i w1) {
    __m256i all, product;
    __asm__("vpbroadcastd %4, %2\n\tvpmaddwd %5, %2, %3\n\tvpaddd %3, %0, %0\n\tvpmaddwd %6, %2, %2\n\tvpaddd %2, %1, %1"
            : "+x"(left), "+x"(right), "=&x"(all), "=&x"(product)
            : "m"(*reinterpret_cast<const int32_t*>(a)), "x"(w0), "x"(w1));
}

#include "blocks.inl"
#include "float_words.inl"
#include "attention.inl"
#include "attention_lanes.inl"
#include "kernels.inl"
constexpr Kernels kInt8 = table<Int8, float>("vpmaddwd", kBlockRows, nothing, nothing);
constexpr Kernels kFloat = table<float, float>("vfmadd ymm", kBlockRows, nothing, nothing);
}  // namespace wide

namespace seven {
using Int8 = uint8_t;
constexpr int kInt8Group = 4, kInt8Offset = 64;
#define TR_TWO_WORDS  // blocks.inl: one step of the depth multiplies two words

#include "avx2.inl"

TR_INLINE void store_int8(Int8* p, F x) {
    const __m256i n = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_add_epi8(_mm_packs_epi16(words, words), _mm_set1_epi8(64)));
}

struct TwoWords {
    __m256i first, second;
};

template <class Op>
TR_INLINE auto load_right(const std::byte* p) {
    const auto word = [](const std::byte* at) TR_LAMBDA { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); };
    if constexpr (same_type<Op, Int8>) return TwoWords{word(p), word(p + kPanel * kInt8Group)};
    else return load(reinterpret_cast<const float*>(p));
}

// In assembly, because gcc 12 keeps many products in registers at once and spills the sums.
TR_INLINE void dot(__m256i& left, __m256i& right, const Int8* a, const TwoWords& w0, const TwoWords& w1) {
    __m256i p, q, all;
    __asm__("vpbroadcastd %5, %2\n\tvpmaddubsw %7, %2, %3\n\tvpmaddubsw %9, %2, %2\n\t"
            "vpbroadcastd %6, %4\n\tvpmaddubsw %8, %4, %4\n\tvpaddw %4, %3, %3\n\t"
            "vpbroadcastd %6, %4\n\tvpmaddubsw %10, %4, %4\n\tvpaddw %4, %2, %2\n\t"
            "vpmaddwd %11, %3, %3\n\tvpmaddwd %11, %2, %2\n\tvpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"
            : "+x"(left), "+x"(right), "=&x"(p), "=&x"(q), "=&x"(all)
            : "m"(*reinterpret_cast<const int32_t*>(a)), "m"(*reinterpret_cast<const int32_t*>(a + kInt8Group)), "xm"(w0.first), "xm"(w0.second),
              "xm"(w1.first), "xm"(w1.second), "xm"(_mm256_set1_epi16(1)));
}

#include "blocks.inl"
#include "float_words.inl"
#include "attention.inl"
#include "attention_lanes.inl"
#include "kernels.inl"
#undef TR_TWO_WORDS
constexpr Kernels kInt8 = table<Int8, float>("vpmaddubsw", kBlockRows, nothing, nothing);
}  // namespace seven

}  // namespace

const Kernels* avx2_kernels(Precision precision, unsigned) {
    return precision == Precision::int8 ? &wide::kInt8 : precision == Precision::fp32 ? &wide::kFloat : nullptr;
}

const Kernels* avx2_seven_kernels(Precision precision, unsigned) { return precision == Precision::int8 ? &seven::kInt8 : nullptr; }

}  // namespace turborank
