// AVX2: activations are widened to 16 bits when they are quantised, weights when they are read, because the byte product of
// this instruction set (vpmaddubsw) saturates. vpmaddwd does not, so the integer sums equal those of the other rows.
#include <immintrin.h>

#include "kernels.h"

namespace turborank {
namespace {

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

constexpr int kBlockRows = 96;
void nothing() {}
constexpr Kernels kInt8 = table<Int8, float>("vpmaddwd", kBlockRows, nothing, nothing);
constexpr Kernels kFloat = table<float, float>("vfmadd ymm", kBlockRows, nothing, nothing);

}  // namespace

const Kernels* avx2_kernels(Precision precision, unsigned) {
    return precision == Precision::int8 ? &kInt8 : precision == Precision::fp32 ? &kFloat : nullptr;
}

}  // namespace turborank
