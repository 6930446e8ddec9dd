// Makes a process believe that its processor is older: CPUID is trapped (Linux arch_prctl ARCH_SET_CPUID, where the
// processor can), answered by the real instruction, and the bits above CPU_CAP are cleared. For fair rows of
// "what if this machine had only AVX2": most libraries have no such switch of their own.
//   gcc -O2 -shared -fPIC -o cap.so cap.c;  CPU_CAP=avx2 LD_PRELOAD=./cap.so command
// Where the processor cannot trap (AMD's), caps.py writes `int $0xa2` over each CPUID of a library's copy: as long, and a
// fault that no compiler writes (as it does ud2), so it is answered here too. CPU_CAP_PLANTED=1 says that this is meant.
// CPU_CAP_COUNT=1: how many CPUIDs were answered, and how many of them with bits cleared, on standard error at the end.
#define _GNU_SOURCE
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kSetCpuid = 0x1012 };

static int level;  // 2: AVX2, 3: AVX-512 with VNNI and BF16, no AMX
static atomic_uint answered, masked;

static void set_cpuid(long on) { syscall(SYS_arch_prctl, kSetCpuid, on); }

static void mask(uint32_t leaf, uint32_t subleaf, uint32_t r[4]) {
    if (leaf == 7 && subleaf == 0) {
        r[3] &= ~(1u << 22 | 1u << 24 | 1u << 25);  // AMX-BF16, AMX-TILE, AMX-INT8
        if (level == 2) {
            r[1] &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);  // AVX-512 F DQ IFMA PF ER CD BW VL
            r[2] &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);  // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
            r[3] &= ~(1u << 2 | 1u << 3 | 1u << 8);                         // 4VNNIW, 4FMAPS, VP2INTERSECT
        }
        r[3] &= ~(1u << 23);  // AVX512-FP16: neither level has it
    }
    if (leaf == 7 && subleaf == 1) {
        r[0] &= ~(1u << 21);                             // AMX-FP16
        if (level == 2) r[0] &= ~(1u << 4 | 1u << 5 | 1u << 23);  // AVX-VNNI, AVX512-BF16, AVX-IFMA
    }
    if (leaf == 0xd && subleaf == 0) r[0] &= level == 2 ? ~0x600e0u : ~0x60000u;  // XSAVE state of tiles and of zmm
}

// CPUID itself, or what stands in its place.
static int is_cpuid(const uint8_t* at) { return (at[0] == 0x0f || at[0] == 0xcd) && at[1] == 0xa2; }

static void trapped(int signal_number, siginfo_t* info, void* context) {
    (void)info;
    greg_t* g = ((ucontext_t*)context)->uc_mcontext.gregs;
    if (!is_cpuid((const uint8_t*)g[REG_RIP])) {  // a real fault: let it happen again, unhandled
        signal(signal_number, SIG_DFL);
        return;
    }
    const uint32_t leaf = (uint32_t)g[REG_RAX], subleaf = (uint32_t)g[REG_RCX];
    uint32_t r[4], real[4];
    set_cpuid(1);  // fails where CPUID cannot be trapped, and need not be
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(subleaf));
    set_cpuid(0);
    memcpy(real, r, sizeof r);
    mask(leaf, subleaf, r);
    answered++, masked += memcmp(real, r, sizeof r) != 0;
    g[REG_RAX] = r[0], g[REG_RBX] = r[1], g[REG_RCX] = r[2], g[REG_RDX] = r[3];
    g[REG_RIP] += 2;
}

__attribute__((constructor)) static void cap(void) {
    const char* wanted = getenv("CPU_CAP");
    if (!wanted || !*wanted) return;
    level = !strcmp(wanted, "avx2") ? 2 : 3;
    struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    if (syscall(SYS_arch_prctl, kSetCpuid, 0L) && !getenv("CPU_CAP_PLANTED")) {
        fprintf(stderr, "cap: this processor cannot trap CPUID\n");
        _exit(77);
    }
}

__attribute__((destructor)) static void count(void) {
    if (getenv("CPU_CAP_COUNT")) fprintf(stderr, "cap: %u CPUIDs answered, %u of them masked\n", answered, masked);
}
