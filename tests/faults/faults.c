/* Faults on request, preloaded into a process (LD_PRELOAD) and armed through ctypes: the first to the last call, counted
 * from 1, of those that the armed kind concerns. Linux with glibc.
 *
 * MEMORY: allocations and threads that the native engine and libstdc++ ask for, while `inside` is armed.
 * FULL, READ_ONLY, KILL: calls that change something below `folder`. On a full disk half of what is written fits; a process
 * that is killed has written half.
 * RECORD: nothing fails; every file that is renamed to its place is linked into `record`.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, MEMORY, FULL, READ_ONLY, KILL, RECORD };

static atomic_int kind = NOTHING;
static atomic_long count, hits;
static long first, last;
static char folder[PATH_MAX], record[PATH_MAX];

static struct { uintptr_t from, to; } ranges[16];
static int range_count;

static int note_range(struct dl_phdr_info *info, size_t size, void *unused) {
    (void)size, (void)unused;
    const char *name = info->dlpi_name ? info->dlpi_name : "";
    if (!strstr(name, "/_native") && !strstr(name, "libstdc++")) return 0;
    for (int i = 0; i < info->dlpi_phnum && range_count < 16; ++i)
        if (info->dlpi_phdr[i].p_type == PT_LOAD) {
            ranges[range_count].from = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            ranges[range_count].to = ranges[range_count].from + info->dlpi_phdr[i].p_memsz;
            ++range_count;
        }
    return 0;
}

void faults_arm(int what, long from, long to, const char *below, const char *links) {
    kind = NOTHING;
    count = 0;
    hits = 0;
    first = from;
    last = to;
    snprintf(folder, sizeof folder, "%s", below ? below : "");
    snprintf(record, sizeof record, "%s", links ? links : "");
    range_count = 0;
    dl_iterate_phdr(note_range, NULL);
    kind = what;
}

/* Calls that were counted since faults_arm; faults_hits: those that failed. */
long faults_disarm(void) {
    kind = NOTHING;
    return count;
}
long faults_hits(void) { return hits; }

static int strikes(void) {
    const long now = ++count;
    if (now < first || now > last) return 0;
    ++hits;
    return 1;
}

/* ---- memory */

static int fails(const void *caller) {
    if (kind != MEMORY) return 0;
    for (int i = 0; i < range_count; ++i)
        if ((uintptr_t)caller >= ranges[i].from && (uintptr_t)caller < ranges[i].to) return strikes();
    return 0;
}

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);

#define REFUSED (errno = ENOMEM, (void *)NULL)
void *malloc(size_t n) { return fails(__builtin_return_address(0)) ? REFUSED : __libc_malloc(n); }
void *calloc(size_t n, size_t m) { return fails(__builtin_return_address(0)) ? REFUSED : __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { return fails(__builtin_return_address(0)) ? REFUSED : __libc_realloc(p, n); }
void *aligned_alloc(size_t a, size_t n) { return fails(__builtin_return_address(0)) ? REFUSED : __libc_memalign(a, n); }

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with) {
    if (fails(__builtin_return_address(0))) return EAGAIN;
    return NEXT(pthread_create)(thread, how, run, with);
}

/* ---- files */

static int below(const char *path) {
    const size_t n = strlen(folder);
    return n && !strncmp(path, folder, n) && (path[n] == '/' || !path[n]);
}

static int concerns_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (kind < FULL) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    return n > 0 && (path[n] = 0, below(path));
}

static int concerns(int at, const char *path) {
    char whole[2 * PATH_MAX], link[64];
    if (kind < FULL || !path) return 0;
    if (path[0] == '/') return below(path);
    ssize_t n;
    if (at == AT_FDCWD) n = getcwd(whole, PATH_MAX) ? (ssize_t)strlen(whole) : -1;
    else snprintf(link, sizeof link, "/proc/self/fd/%d", at), n = readlink(link, whole, PATH_MAX - 1);
    if (n < 0) return 0;
    snprintf(whole + n, sizeof whole - (size_t)n, "/%s", path);
    return below(whole);
}

/* The error number of a call that fails now, 0 for one that does not. Space is asked for by some calls only. */
static int fault(int concerned, int space) {
    if (!concerned || kind == NOTHING || (kind == FULL && !space) || !strikes()) return 0;
    if (kind == KILL) kill(getpid(), SIGKILL);
    return kind == FULL ? ENOSPC : kind == READ_ONLY ? EROFS : 0;
}

#define FAIL_IF(concerned, space, result) \
    do { const int error = fault(concerned, space); if (error) return errno = error, result; } while (0)

#define OPEN(name, at, parameters, arguments)                                                  \
    int name parameters {                                                                      \
        mode_t mode = 0;                                                                       \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
        if ((flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT)) FAIL_IF(concerns(at, path), 0, -1); \
        return (int)syscall arguments;                                                         \
    }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (SYS_openat, AT_FDCWD, path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (SYS_openat, AT_FDCWD, path, flags, mode))
OPEN(openat, at, (int at, const char *path, int flags, ...), (SYS_openat, at, path, flags, mode))
OPEN(openat64, at, (int at, const char *path, int flags, ...), (SYS_openat, at, path, flags, mode))

FILE *fopen(const char *path, const char *how) {
    if (strpbrk(how, "wa+")) FAIL_IF(concerns(AT_FDCWD, path), 0, NULL);
    return NEXT(fopen)(path, how);
}
FILE *fopen64(const char *path, const char *how) {
    if (strpbrk(how, "wa+")) FAIL_IF(concerns(AT_FDCWD, path), 0, NULL);
    return NEXT(fopen64)(path, how);
}

/* The part of a write that takes place although it strikes: half of it, the first time. */
static size_t half(int fd, size_t n) {
    const int concerned = concerns_fd(fd);
    if (!concerned || kind == NOTHING || kind == RECORD) return n;
    if (!strikes()) return n;
    return hits == 1 && n > 1 && kind != READ_ONLY ? n / 2 : 0;
}

#define WRITE(name, parameters, call, whole)                                              \
    ssize_t name parameters {                                                             \
        const size_t size = n, part = half(fd, size);                                     \
        if (part == size) return whole;                                                   \
        n = part;                                                                         \
        const ssize_t written = part ? call : 0;                                          \
        if (kind == KILL) kill(getpid(), SIGKILL);                                        \
        return part ? written : (errno = kind == READ_ONLY ? EROFS : ENOSPC, -1);         \
    }
#define PLAIN syscall(SYS_write, fd, data, n)
#define PLACED syscall(SYS_pwrite64, fd, data, n, at)
WRITE(write, (int fd, const void *data, size_t n), PLAIN, PLAIN)
WRITE(pwrite, (int fd, const void *data, size_t n, off_t at), PLACED, PLACED)
WRITE(pwrite64, (int fd, const void *data, size_t n, off64_t at), PLACED, PLACED)

ssize_t writev(int fd, const struct iovec *data, int n) {
    FAIL_IF(concerns_fd(fd), 1, -1);
    return syscall(SYS_writev, fd, data, n);
}
size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
    const int error = kind >= FULL && file != stdout && file != stderr ? fault(concerns_fd(fileno(file)), 1) : 0;
    return error ? errno = error, 0 : NEXT(fwrite)(data, size, n, file);
}
int ftruncate(int fd, off_t size) { FAIL_IF(concerns_fd(fd), 1, -1); return (int)syscall(SYS_ftruncate, fd, size); }
int ftruncate64(int fd, off64_t size) { FAIL_IF(concerns_fd(fd), 1, -1); return (int)syscall(SYS_ftruncate, fd, size); }
int mkdir(const char *path, mode_t mode) { FAIL_IF(concerns(AT_FDCWD, path), 1, -1); return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { FAIL_IF(concerns(at, path), 1, -1); return (int)syscall(SYS_mkdirat, at, path, mode); }
int unlink(const char *path) { FAIL_IF(concerns(AT_FDCWD, path), 0, -1); return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0); }
int unlinkat(int at, const char *path, int how) { FAIL_IF(concerns(at, path), 0, -1); return (int)syscall(SYS_unlinkat, at, path, how); }
int rmdir(const char *path) { FAIL_IF(concerns(AT_FDCWD, path), 0, -1); return (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR); }
int link(const char *from, const char *to) { FAIL_IF(concerns(AT_FDCWD, to), 1, -1); return (int)syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0); }
int symlink(const char *from, const char *to) { FAIL_IF(concerns(AT_FDCWD, to), 1, -1); return (int)syscall(SYS_symlinkat, from, AT_FDCWD, to); }

static int renamed(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    FAIL_IF(concerns(to_at, to), 0, -1);
    const int result = (int)syscall(SYS_renameat2, from_at, from, to_at, to, flags);
    if (!result && kind == RECORD && concerns(to_at, to)) {
        char copy[2 * PATH_MAX];
        const char *name = strrchr(to, '/');
        snprintf(copy, sizeof copy, "%s/%ld-%s", record, (long)++count, name ? name + 1 : to);
        syscall(SYS_linkat, to_at, to, AT_FDCWD, copy, 0);
    }
    return result;
}
int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_at, const char *from, int to_at, const char *to) { return renamed(from_at, from, to_at, to, 0); }
int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) { return renamed(from_at, from, to_at, to, flags); }
