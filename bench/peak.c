// The most that one core can do: giga-operations a second of the instructions matrix products are made of (a multiply
// and an add are two), from chains long enough to hide their latency, operands in registers; and bytes read from memory.
//   gcc -O2 -o peak peak.c && ./peak      prints JSON; what the processor lacks is absent
#define _GNU_SOURCE
#include <cpuid.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#define R4(x, a, b, c, d) x(a) x(b) x(c) x(d)
#define R12(x) R4(x, 0, 1, 2, 3) R4(x, 4, 5, 6, 7) R4(x, 8, 9, 10, 11)
#define S(x) #x
#define CHAIN(name, clear, step)                                                                   \
    static void name(long n) {                                                                     \
        __asm__ volatile(R12(clear) clear(12) clear(13) "1:\n" R12(step) R12(step) "dec %0\njnz 1b\nvzeroupper\n"      \
                         : "+r"(n)::"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                           "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");  \
    }
#define ZERO_Z(i) "vpxorq %%zmm" S(i) ",%%zmm" S(i) ",%%zmm" S(i) "\n"
#define ZERO_Y(i) "vpxor %%ymm" S(i) ",%%ymm" S(i) ",%%ymm" S(i) "\n"
#define VNNI(i) "vpdpbusd %%zmm12,%%zmm13,%%zmm" S(i) "\n"
#define VNNI_Y(i) "%{vex%} vpdpbusd %%ymm12,%%ymm13,%%ymm" S(i) "\n"
#define BF16(i) "vdpbf16ps %%zmm12,%%zmm13,%%zmm" S(i) "\n"
#define FMA_Z(i) "vfmadd231ps %%zmm12,%%zmm13,%%zmm" S(i) "\n"
#define FMA_Y(i) "vfmadd231ps %%ymm12,%%ymm13,%%ymm" S(i) "\n"
#define MADD(i) "vpmaddwd %%ymm12,%%ymm13,%%ymm14\nvpaddd %%ymm14,%%ymm" S(i) ",%%ymm" S(i) "\n"
// What isa_avx2.cpp does for 64 products: four sums of two in 16 bits become two, those 32 bits.
#define MADDUB(i) "vpmaddubsw %%ymm12,%%ymm13,%%ymm14\nvpmaddubsw %%ymm12,%%ymm13,%%ymm15\nvpaddw %%ymm14,%%ymm15,%%ymm14\n" \
                  "vpmaddwd %%ymm12,%%ymm14,%%ymm14\nvpaddd %%ymm14,%%ymm" S(i) ",%%ymm" S(i) "\n"
CHAIN(vnni, ZERO_Z, VNNI)
CHAIN(vnni_y, ZERO_Y, VNNI_Y)
CHAIN(bf16, ZERO_Z, BF16)
CHAIN(fma_z, ZERO_Z, FMA_Z)
CHAIN(fma_y, ZERO_Y, FMA_Y)
CHAIN(madd, ZERO_Y, MADD)
CHAIN(maddub, ZERO_Y, MADDUB)

static struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles;

// Four accumulators, two operands of each side: the tiling of a 32 x 32 block.
#define AMX(name, op)                                                                                                   \
    static void name(long n) {                                                                                         \
        __asm__ volatile("ldtilecfg %1\ntilezero %%tmm0\ntilezero %%tmm1\ntilezero %%tmm2\ntilezero %%tmm3\n"          \
                         "tilezero %%tmm4\ntilezero %%tmm5\ntilezero %%tmm6\ntilezero %%tmm7\n1:\n"                    \
                         op " %%tmm6,%%tmm4,%%tmm0\n" op " %%tmm7,%%tmm4,%%tmm1\n" op " %%tmm6,%%tmm5,%%tmm2\n"        \
                         op " %%tmm7,%%tmm5,%%tmm3\ndec %0\njnz 1b\ntilerelease\n" : "+r"(n) : "m"(tiles));            \
    }
AMX(amx_int8, "tdpbssd")
AMX(amx_bf16, "tdpbf16ps")

static double rate(void (*run)(long), double operations) {
    double best = 0;
    long n = 1000;
    for (double took = 0; took < 0.02; n *= 2) {
        const double start = now();
        run(n);
        took = now() - start;
    }
    for (int i = 0; i < 7; ++i) {
        const double start = now();
        run(n);
        const double got = operations * (double)n / (now() - start) * 1e-9;
        if (got > best) best = got;
    }
    return best;
}

static double bandwidth(void) {
    const size_t n = (size_t)1 << 27;  // 1 GiB of words, more than caches that a share of a processor sees
    uint64_t* data = malloc(n * 8);
    if (!data) return 0;
    memset(data, 1, n * 8);
    double best = 0;
    volatile uint64_t sink;
    for (int i = 0; i < 3; ++i) {
        uint64_t a = 0, b = 0, c = 0, d = 0;
        const double start = now();
        for (size_t k = 0; k < n; k += 32) a += data[k], b += data[k + 8], c += data[k + 16], d += data[k + 24];
        sink = a + b + c + d;
        const double got = (double)n * 8 / (now() - start) * 1e-9;
        if (got > best) best = got;
    }
    (void)sink;
    free(data);
    return best;
}

static int has_avx_vnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

int main(void) {
    __builtin_cpu_init();
    printf("{");
    if (__builtin_cpu_supports("avx2")) {
        printf("\"fma_ymm\": %.1f, ", rate(fma_y, 24 * 16.0));
        printf("\"vpmaddwd_ymm\": %.1f, ", rate(madd, 24 * 32.0));
        printf("\"vpmaddubsw_ymm\": %.1f, ", rate(maddub, 24 * 128.0));
    }
    if (has_avx_vnni()) printf("\"vpdpbusd_ymm\": %.1f, ", rate(vnni_y, 24 * 64.0));
    if (__builtin_cpu_supports("avx512f")) printf("\"fma_zmm\": %.1f, ", rate(fma_z, 24 * 32.0));
    if (__builtin_cpu_supports("avx512bf16")) printf("\"vdpbf16ps\": %.1f, ", rate(bf16, 24 * 64.0));
    if (__builtin_cpu_supports("avx512vnni")) printf("\"vpdpbusd\": %.1f, ", rate(vnni, 24 * 128.0));
    if (!syscall(SYS_arch_prctl, 0x1023, 18L)) {  // ARCH_REQ_XCOMP_PERM, tile data
        tiles.palette = 1;
        for (int t = 0; t < 8; ++t) tiles.bytes[t] = 64, tiles.rows[t] = 16;
        printf("\"tdpbssd\": %.1f, ", rate(amx_int8, 4 * 32768.0));
        printf("\"tdpbf16ps\": %.1f, ", rate(amx_bf16, 4 * 16384.0));
    }
    printf("\"read_gb_s\": %.1f}\n", bandwidth());
    return 0;
}
