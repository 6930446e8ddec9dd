// AVX-512 with VNNI: vpdpbusd multiplies unsigned by signed bytes, so activations are stored plus 128 and the initial sums
// correct for it. The integer sums equal those of the other rows.
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

// words[i] = 2^even[i] and 2^odd[i] as one word of two bf16, with a relative error of half a per cent; 0 below 2^-127. The
// bits of 2^x are 128 (x + 127), rounded, minus the difference between the line through neighbouring powers of two and the
// curve, from a table. Without `deep`, no score may be below -kDeep. The sums are products of the words with ones.
constexpr float kDeep = 380.0f;
template <bool deep, int N>
TR_INLINE void exp2_words(const F (&even)[N], const F (&odd)[N], F (&words)[N], F (&sums)[N]) {
    alignas(64) static constexpr uint16_t kAbove[64] = {
        0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5, 6, 6, 7, 7, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 10, 10, 11, 11, 11, 11, 11,
        11, 11, 11, 11, 11, 11, 11, 11, 11, 10, 10, 10, 10, 10, 9, 9, 9, 8, 8, 8, 7, 7, 6, 6, 5, 5, 4, 3, 3, 2, 1, 1};
    const __m512i low = _mm512_load_si512(kAbove), high = _mm512_load_si512(kAbove + 32);
    // The lowest 16 bits of the float x + 127 + 1.5 * 2^16 are 128 (x + 127).
    const auto bits = [](F x) __attribute__((always_inline)) {
        return _mm512_castps_si512((deep ? vmax(x, set(-kDeep)) : x) + set(127.0f + 98304.0f));
    };
    __m512i both[N];
    for (int i = 0; i < N; ++i) both[i] = _mm512_mask_blend_epi16(0xaaaaaaaau, bits(even[i]), _mm512_slli_epi32(bits(odd[i]), 16));
    for (int i = 0; i < N; ++i) {
        const __m512i above = _mm512_permutex2var_epi16(low, _mm512_srli_epi16(both[i], 1), high);
        words[i] = _mm512_castsi512_ps(_mm512_max_epi16(_mm512_sub_epi16(both[i], above), _mm512_setzero_si512()));
        dot_bf16(sums[i], words[i], _mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80)));
    }
}

// The values as words of two keys, [keys / 2][D].
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
