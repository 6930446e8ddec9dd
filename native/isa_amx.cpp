// AMX: matrix tiles of 16 rows x 64 bytes. A 32 x 32 result takes four accumulator tiles; each step of the depth
// loads two tiles of either side and multiplies them four ways (16 cycles each), and the vector work of the previous
// result (`between`) runs meanwhile on the vector units.
#include <immintrin.h>

#include "kernels.h"

namespace turborank {
namespace {

using Int8 = int8_t;

#include "avx512.inl"

TR_INLINE void store_int8(Int8* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

// In place of gcc 12's intrinsics. Loads do not name the memory they read, so that the vector code between them may
// stay in registers; tile_gemm begins with a barrier instead, and nothing it reads is written before it ends.
template <int tile>
TR_INLINE void load_tile(const void* from, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile));
}
template <int tile>
TR_INLINE void store_tile(void* to, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
TR_INLINE void start_tile(bool accumulate, const void* from, size_t stride) {
    if (accumulate) load_tile<tile>(from, stride);
    else __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
struct Integer {
    template <int sum, int a, int b>
    static TR_INLINE void multiply() { __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b)); }
};
struct Brain {
    template <int sum, int a, int b>
    static TR_INLINE void multiply() { __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b)); }
};

// The left side: its first tile, the bytes between a tile's rows, from a tile to the next of the depth, and to the
// tile 16 rows below.
struct Left {
    const void* first;
    size_t row, step, below;
};

// `steps` of 64 bytes of depth; ldc in bytes.
template <class Kind, class Between>
TR_INLINE void tile_gemm(const Left& a, int rows, const std::byte* panel, int steps, void* c, size_t ldc, bool accumulate,
                         const Between& between) {
    const std::byte* x = static_cast<const std::byte*>(a.first);
    std::byte* y = static_cast<std::byte*>(c);
    const bool tall = rows > 16;
    __asm__ volatile("" ::: "memory");
    start_tile<0>(accumulate, y, ldc);
    start_tile<1>(accumulate, y + 64, ldc);
    if (tall) {
        start_tile<2>(accumulate, y + 16 * ldc, ldc);
        start_tile<3>(accumulate, y + 16 * ldc + 64, ldc);
    }
    for (size_t s = 0; s < static_cast<size_t>(steps); ++s) {
        load_tile<6>(panel + s * 2048, 64);
        load_tile<4>(x + s * a.step, a.row);
        load_tile<7>(panel + s * 2048 + 1024, 64);
        Kind::template multiply<0, 4, 6>();
        Kind::template multiply<1, 4, 7>();
        if (tall) {
            load_tile<5>(x + s * a.step + a.below, a.row);
            Kind::template multiply<2, 5, 6>();
            Kind::template multiply<3, 5, 7>();
        }
        between(static_cast<int>(s));
    }
    store_tile<0>(y, ldc);
    store_tile<1>(y + 64, ldc);
    if (tall) {
        store_tile<2>(y + 16 * ldc, ldc);
        store_tile<3>(y + 16 * ldc + 64, ldc);
    }
}

template <class Between>
TR_INLINE void gemm(const Int8* a, int lda, int rows, const std::byte* panel, int depth, int32_t* c, int ldc, bool accumulate,
                    const Between& between) {
    tile_gemm<Integer>({a, 64, 1024, 16 * static_cast<size_t>(lda)}, rows, panel, depth / 64, c, static_cast<size_t>(ldc) * 4, accumulate, between);
}

template <class Between>
TR_INLINE void gemm(const bf16* a, int lda, int rows, const std::byte* panel, int depth, float* c, int ldc, bool accumulate,
                    const Between& between) {
    const size_t row = static_cast<size_t>(lda) * 2;
    tile_gemm<Brain>({a, row, 64, 16 * row}, rows, panel, depth / 32, c, static_cast<size_t>(ldc) * 4, accumulate, between);
}

// int8 operands lie tile by tile, 16 rows x 64 bytes each: neighbouring cache lines load faster than distant ones.
TR_INLINE size_t int8_row(int row, int depth) { return static_cast<size_t>(row / 16) * 16 * depth + static_cast<size_t>(row % 16) * 64; }
TR_INLINE int int8_column(int column) { return column / 64 * 1024 + column % 64; }

// The tile products pause after every step of the depth; the float product, from avx512.inl, only at its end.
template <class Op>
constexpr int gemm_moments(int depth) { return sizeof(Op) == 4 ? 1 : depth * static_cast<int>(sizeof(Op)) / 64; }

#include "attention_f32.inl"
#include "kernels.inl"

void configure_tiles() {
    struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    __asm__ volatile("ldtilecfg %0" ::"m"(configuration));
}
void release_tiles() { _tile_release(); }

constexpr Kernels kInt8Bf16 = table<Int8, bf16>("tdpbssd", configure_tiles, release_tiles);
constexpr Kernels kBf16Bf16 = table<bf16, bf16>("tdpbf16ps", configure_tiles, release_tiles);

}  // namespace

const Kernels* amx_kernels(Precision precision, unsigned features) {
    if (precision == Precision::int8) return &kInt8Bf16;
    if (precision == Precision::bf16) return &kBf16Bf16;
    return avx512_kernels(precision, features);
}

}  // namespace turborank
