// AVX-512 with VNNI: vpdpbusd multiplies unsigned by signed bytes, so activations are stored plus 128 and the sum of
// each column's weights (behind every panel) takes 128 times itself back: the same integers as everywhere.
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

TR_INLINE void dot_int8(__m512i& sum, __m512i a, __m512i b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

void int8_product(const Int8* a, int lda, int rows, const std::byte* panel, int depth, int32_t* c, int ldc) {
    const std::byte* sums = panel + static_cast<size_t>(depth) * kPanel;
    const __m512i start0 = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(sums)), 7);
    const __m512i start1 = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(sums + 64)), 7);
    in_parts<kRowsAtOnce>(rows, [&]<int... r>(int from, Indices<r...>) __attribute__((always_inline)) {
        const Int8* x = a + static_cast<size_t>(from) * lda;
        int32_t* y = c + from * ldc;
        __m512i left[sizeof...(r)], right[sizeof...(r)];
        ((left[r] = start0, right[r] = start1), ...);
        for (int k = 0; k < depth; k += 4) {
            const std::byte* w = panel + k / 64 * 2048 + k % 64 * 16;
            const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 1024);
            const auto row = [&](int i) __attribute__((always_inline)) {
                int32_t quad;
                std::memcpy(&quad, x + i * lda + k, 4);
                const __m512i all = _mm512_set1_epi32(quad);
                dot_int8(left[i], all, w0);
                dot_int8(right[i], all, w1);
            };
            (row(r), ...);
        }
        ((_mm512_storeu_si512(y + r * ldc, left[r]), _mm512_storeu_si512(y + r * ldc + 16, right[r])), ...);
    });
}

template <class Between>
TR_INLINE void gemm(const Int8* a, int lda, int rows, const std::byte* panel, int depth, int32_t* c, int ldc, bool, const Between& between) {
    int8_product(a, lda, rows, panel, depth, c, ldc);
    between(0);
}

template <class Between>
TR_INLINE void gemm(const bf16* a, int lda, int rows, const std::byte* panel, int depth, float* c, int ldc, bool accumulate,
                    const Between& between) {
    bf16_product(a, lda, rows, panel, depth, c, ldc, accumulate);
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
constexpr Kernels kInt8Bf16 = table<Int8, bf16>("vpdpbusd", nothing, nothing);
constexpr Kernels kInt8 = table<Int8, float>("vpdpbusd", nothing, nothing);
constexpr Kernels kBf16Bf16 = table<bf16, bf16>("vdpbf16ps", nothing, nothing);
constexpr Kernels kFloat = table<float, float>("vfmadd zmm", nothing, nothing);

}  // namespace

const Kernels* avx512_kernels(Precision precision, unsigned features) {
    const bool has_bf16 = features & kBf16;
    if (precision == Precision::int8) return has_bf16 ? &kInt8Bf16 : &kInt8;
    if (precision == Precision::bf16) return has_bf16 ? &kBf16Bf16 : nullptr;
    return &kFloat;
}

}  // namespace turborank
