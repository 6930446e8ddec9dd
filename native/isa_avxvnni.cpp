// AVX-VNNI (Intel's 12th generation and later; AMD's Zen 5): vpdpbusd of 256 bits without AVX-512. Compiled up to three times:
// in the encoding of AVX-VNNI; in that of AVX-512, for processors with AVX-512 VNNI but without AVX-VNNI; and with TR_STAND_IN
// (the checks without Python) with a replacement of the instruction, for processors that have neither.
#include <immintrin.h>

#include "kernels.h"

namespace turborank {
namespace {

namespace vex {
#define TR_VPDPBUSD "%{vex%} vpdpbusd"
#include "avxvnni.inl"
#undef TR_VPDPBUSD
constexpr Kernels kInt8 = table<Int8, float>("vpdpbusd ymm", kBlockRows, nothing, nothing);
}  // namespace vex

namespace evex {
#define TR_VPDPBUSD "%{evex%} vpdpbusd"
#include "avxvnni.inl"
#undef TR_VPDPBUSD
constexpr Kernels kInt8 = table<Int8, float>("vpdpbusd ymm, EVEX", kBlockRows, nothing, nothing);
}  // namespace evex

#if defined(TR_STAND_IN)
namespace stand_in {
#include "avxvnni.inl"
constexpr Kernels kInt8 = table<Int8, float>("vpmaddwd for vpdpbusd", kBlockRows, nothing, nothing);
}  // namespace stand_in
#endif

}  // namespace

const Kernels* avxvnni_kernels(Precision precision, unsigned features) {
    if (precision == Precision::int8) return features & kAvxVnni ? &vex::kInt8 : &evex::kInt8;
    return avx2_kernels(precision, features);
}

#if defined(TR_STAND_IN)
const Kernels* evex_kernels(Precision precision, unsigned) { return precision == Precision::int8 ? &evex::kInt8 : nullptr; }
const Kernels* stand_in_kernels(Precision precision, unsigned) { return precision == Precision::int8 ? &stand_in::kInt8 : nullptr; }
#endif

}  // namespace turborank
