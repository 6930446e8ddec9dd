// The table of instruction sets in this build, and detection of those that this machine supports.
#include "kernels.h"

#if defined(TR_X86_KERNELS)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
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

// Features of the processor, and the registers that the operating system saves. Read with CPUID, because
// __builtin_cpu_supports needs a compiler library that clang does not link on Windows.
struct Cpu {
    unsigned a = 0, b = 0, c = 0, d = 0;
    Cpu(unsigned leaf, unsigned part) {
        if (!__get_cpuid_count(leaf, part, &a, &b, &c, &d)) a = b = c = d = 0;
    }
};

bool all(unsigned bits, unsigned of) { return (bits & of) == of; }

unsigned saved_registers() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

unsigned detect() {
    constexpr unsigned kFma = 1u << 12, kXsave = 1u << 27, kF16c = 1u << 29, kYmm = 6, kZmm = 0xe6;
    constexpr unsigned kHasAvx2 = 1u << 5, kFDqBwVl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31, kHasVnni = 1u << 11;
    constexpr unsigned kHasAvxVnni = 1u << 4, kHasBf16 = 1u << 5, kAuth = 0x68747541;  // of "AuthenticAMD"
    const Cpu first(1, 0), more(7, 0), most(7, 1);
    if (!all(first.c, kFma | kXsave | kF16c) || !all(saved_registers(), kYmm) || !all(more.b, kHasAvx2)) return 0;
    const unsigned ymm = kAvx2 | (most.a & kHasAvxVnni ? kVnni256 | kAvxVnni : 0u);
#if defined(__APPLE__)
    constexpr bool zmm_saved = true;  // from the first use on
#else
    const bool zmm_saved = all(saved_registers(), kZmm);
#endif
    if (!zmm_saved || !all(more.b, kFDqBwVl) || !all(more.c, kHasVnni)) return ymm;
    if (!(most.a & kHasBf16)) return ymm | kVnni | kVnni256;
    // Intel issues a vdpbf16ps every second cycle, half the multiplications of its vfmadd; AMD's has twice those of vfmadd.
    const bool amd = Cpu(0, 0).b == kAuth;
    return ymm | kVnni | kVnni256 | kBf16 | (amd ? kFastBf16 : 0u) | (tiles_permitted() ? kAmx : 0u);
}
#elif defined(TR_ARM_KERNELS) && defined(__linux__)
unsigned detect() {
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    constexpr unsigned long kAsimdDp = 1ul << 20, kI8mm = 1ul << 13, kBf16Products = 1ul << 14;  // asm/hwcap.h; HWCAP2 the last two
    return (first & kAsimdDp ? kArmDot : 0u) | (second & kI8mm ? kArmI8mm : 0u) | (second & kBf16Products ? kArmBf16 : 0u);
}
#elif defined(TR_ARM_KERNELS) && defined(__APPLE__)
bool has(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
unsigned detect() {  // every Arm Mac has the dot product; old systems have no name for it
    return kArmDot | (has("hw.optional.arm.FEAT_I8MM") ? kArmI8mm : 0u) | (has("hw.optional.arm.FEAT_BF16") ? kArmBf16 : 0u);
}
#else
unsigned detect() { return 0; }
#endif

constexpr struct {
    unsigned feature;
    const char* name;
} kNames[] = {
    {kAmx, "AMX with int8 and bf16, or the system's permission to use it"},
    {kVnni, "AVX-512 F, DQ, BW, VL and VNNI"},
    {kVnni256, "AVX-VNNI"},
    {kAvx2, "AVX2 and FMA"},
    {kArmI8mm, "FEAT_I8MM"},
    {kArmBf16, "FEAT_BF16"},
    {kArmDot, "FEAT_DotProd"},
};

}  // namespace

std::string missing(const IsaRow& row) {
    std::string names;
    for (const auto& [feature, name] : kNames)
        if (row.needs & ~detect_features() & feature) names += (names.empty() ? "" : ", ") + std::string(name);
    return names;
}

unsigned detect_features() {
    static const unsigned features = detect();
    return features;
}

const std::vector<IsaRow>& isa_table() {
    static const std::vector<IsaRow> table = {
#if defined(TR_X86_KERNELS)
#if defined(__linux__)
        {"amx", kAmx, amx_kernels},
#endif
        {"avx512vnni", kVnni, avx512_kernels},
        {"avxvnni", kVnni256, avxvnni_kernels},
        {"avx2", kAvx2, avx2_kernels},
        {"avx2seven", kAvx2, avx2_seven_kernels},  // in place of avx2, for some models (native.py)
#if defined(TR_STAND_IN)
        {"avxvnni-evex", kVnni, evex_kernels},
        {"avxvnni-standin", kAvx2, stand_in_kernels},
#endif
#elif defined(TR_ARM_KERNELS)
        {"armi8mm", kArmDot | kArmI8mm | kArmBf16, armi8mm_kernels},
        {"armdot", kArmDot, armdot_kernels},
#endif
        {"portable", 0, portable_kernels},
    };
    return table;
}

}  // namespace turborank
