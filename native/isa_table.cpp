// Which instruction sets this build contains, and which of them this machine can run.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace turborank {
namespace {

#if defined(__x86_64__)
// Linux hands out the matrix tiles only to processes that ask (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool tiles_permitted() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

uint64_t enabled_state() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

// Intel's vdpbf16ps begins every second cycle: half the multiplications a second of its vfmadd, where AMD's has twice as many.
bool fast_bf16() {
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
}

unsigned detect() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA) || !(c & bit_F16C)) return 0;
    const uint64_t state = enabled_state();
    if ((state & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    unsigned found = 0;
    if (b & bit_AVX2) found |= kAvx2;
    constexpr unsigned base = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    if (!found || (state & 0xe6) != 0xe6 || (b & base) != base) return found;
    found |= kAvx512;
    if (c & (1u << 11)) found |= kVnni;
    const bool tiles = (d & (1u << 22)) && (d & (1u << 24)) && (d & (1u << 25)) && (state & 0x60000) == 0x60000;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5))) found |= kBf16 | (fast_bf16() ? kFastBf16 : 0u);
    if (tiles && tiles_permitted()) found |= kAmx;
    return found;
}
#else
unsigned detect() { return 0; }
#endif

}  // namespace

unsigned detect_features() {
    static const unsigned features = detect();
    return features;
}

const std::vector<IsaRow>& isa_table() {
    static const std::vector<IsaRow> table = {
#if defined(TR_X86_KERNELS)
        {"amx", kAvx2 | kAvx512 | kVnni | kBf16 | kAmx, amx_kernels},
        {"avx512vnni", kAvx2 | kAvx512 | kVnni, avx512_kernels},
        {"avx2", kAvx2, avx2_kernels},
#endif
        {"portable", 0, portable_kernels},
    };
    return table;
}

std::string feature_names(unsigned features) {
    std::string names;
    const char* const all[] = {"avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
    for (unsigned i = 0; i < 5; ++i)
        if (features & 1u << i) names += (names.empty() ? "" : " ") + std::string(all[i]);
    return names;
}

}  // namespace turborank
