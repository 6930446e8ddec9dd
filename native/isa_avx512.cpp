// AVX-512 with VNNI: vpdpbusd multiplies unsigned by signed bytes, so activations are stored plus 128, and where the
// sums begin takes that back: the same integers as everywhere.
#include <immintrin.h>

#include "kernels.h"

namespace turborank {
namespace {

using Int8 = uint8_t;

#include "avx512.inl"

TR_INLINE void store_int8(Int8* p, F x) {
    const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
}

constexpr bool kTiles = false;
constexpr int kInt8Group = 4, kInt8Offset = 128, kRowsAtOnce = 14;  // 28 sums, two words of weights, one of activations: 31 registers

TR_INLINE void dot_int8(__m512i& sum, F a, F b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
TR_INLINE void dot(__m512i& left, __m512i& right, const Int8* a, F w0, F w1) {
    float quad;
    std::memcpy(&quad, a, 4);
    dot_int8(left, set(quad), w0), dot_int8(right, set(quad), w1);
}

#include "blocks.inl"

// [pairs of keys][D] words of two.
TR_INLINE const bf16* pair_values(const bf16* v, int n, int D, bf16* to) {
    for (int j = 0; j < n; j += 2)
        for (int c = 0; c < D; c += 32) {
            F left, right;
            pair_rows(v + j * D + c, j + 1 < n ? v + (j + 1) * D + c : nullptr, left, right);
            store2(reinterpret_cast<float*>(to + j * D + 2 * c), left, right);
        }
    return to;
}
TR_INLINE const float* pair_values(const float* v, int, int, float*) { return v; }

#include "attention.inl"
#include "attention_lanes.inl"
#include "kernels.inl"

constexpr int kBlockRows = 126;
void nothing() {}
constexpr Kernels kInt8Bf16 = table<Int8, bf16>("vpdpbusd", kBlockRows, nothing, nothing);
constexpr Kernels kInt8 = table<Int8, float>("vpdpbusd", kBlockRows, nothing, nothing);
constexpr Kernels kBf16Bf16 = table<bf16, bf16>("vdpbf16ps", kBlockRows, nothing, nothing);
constexpr Kernels kFloat = table<float, float>("vfmadd zmm", kBlockRows, nothing, nothing);

}  // namespace

const Kernels* avx512_kernels(Precision precision, unsigned features) {
    if (precision == Precision::int8) return features & kFastBf16 ? &kInt8Bf16 : &kInt8;
    if (precision == Precision::bf16) return features & kBf16 ? &kBf16Bf16 : nullptr;
    return &kFloat;
}

}  // namespace turborank
