// The table of instruction sets in this build, and detection of those that this machine supports.
#include "kernels.h"

#if defined(TR_X86_KERNELS)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace turborank {
namespace {

#if defined(TR_X86_KERNELS)
// Linux allows matrix tiles only to processes that request them (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool tiles_permitted() {
#if defined(__linux__)
    constexpr unsigned kBf16TileInt8 = 1u << 22 | 1u << 24 | 1u << 25;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16TileInt8) == kBf16TileInt8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

// The builtin checks that the processor has the feature and that the operating system saves its registers.
unsigned detect() {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    for (const bool has : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512dq") != 0, __builtin_cpu_supports("avx512bw") != 0,
                           __builtin_cpu_supports("avx512vl") != 0, __builtin_cpu_supports("avx512vnni") != 0})
        if (!has) return kAvx2;
    if (!__builtin_cpu_supports("avx512bf16")) return kAvx2 | kVnni;
    // Intel issues a vdpbf16ps every second cycle, which is half the multiplications of its vfmadd; AMD's has twice those of vfmadd.
    return kAvx2 | kVnni | kBf16 | (__builtin_cpu_is("amd") ? kFastBf16 : 0u) | (tiles_permitted() ? kAmx : 0u);
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
        {"amx", kAmx, amx_kernels},
        {"avx512vnni", kVnni, avx512_kernels},
        {"avx2", kAvx2, avx2_kernels},
#endif
        {"portable", 0, portable_kernels},
    };
    return table;
}

}  // namespace turborank
