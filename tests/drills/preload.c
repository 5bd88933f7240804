/* Counts what a process changes under one folder, call by call of libc, and lets one of these calls fail, be the last or be
   met by a signal. Preloaded by LD_PRELOAD; it does nothing before `drill_arm`, or where the variable DRILL is not set.

   A call is of a class: 1 needs room on the disk, 2 only removes or shrinks, 4 flushes. Calls on other files go through. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ROOM = 1, REMOVE = 2, FLUSH = 4 };
enum { PASS, FAIL };

static char folder[PATH_MAX];
static long at, lasting;
static int classes, signal_number, error_number, log_fd = -1;
static atomic_long calls;

/* "folder|classes|at|signal|errno|lasting|log": counts the calls of these classes; the at-th one (from 1) is met by the
   signal, or fails with errno and with it, if lasting, each one after it. at = 0: only the log is written. */
void drill_arm(const char *text) {
    char log[PATH_MAX];
    folder[0] = 0;
    if (sscanf(text, "%4000[^|]|%d|%ld|%d|%d|%ld|%4000[^|]", folder, &classes, &at, &signal_number, &error_number, &lasting, log) != 7)
        abort();
    calls = 0;
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
}

__attribute__((constructor)) static void start(void) {
    if (getenv("DRILL")) drill_arm(getenv("DRILL"));
}

static int under(const char *path) {
    size_t n = strlen(folder);
    return n && !strncmp(path, folder, n) && (path[n] == 0 || path[n] == '/');
}

static int whole(int dir, const char *path, char *out) {
    if (!folder[0]) return 0;
    if (path[0] == '/') snprintf(out, PATH_MAX, "%s", path);
    else {
        char base[PATH_MAX], link[64];
        if (dir == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
        if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    }
    return under(out);
}

static int open_file(int fd, char *out) {
    char link[64];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    if (n < 0) return 0;
    out[n] = 0;
    return under(out);
}

/* The verdict on a call; `torn` is what a write does before it is the last one. */
static int met(const char *name, int class, const char *path, int fd, const void *data, size_t size) {
    if (!(classes & class)) return PASS;
    long n = ++calls;
    int hit = at && (n == at || (lasting && n > at));
    if (log_fd >= 0) {
        char line[PATH_MAX + 99];
        int length = snprintf(line, sizeof line, "%c %s %s\n", hit ? '!' : '.', name, path);
        syscall(SYS_write, log_fd, line, length);
    }
    if (!hit) return PASS;
    if (signal_number) {
        if (signal_number == SIGKILL && data) syscall(SYS_write, fd, data, size / 2);
        if (n == at) kill(getpid(), signal_number);
        return PASS;
    }
    errno = error_number;
    return FAIL;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

#define OPEN(name)                                                                              \
    int name(const char *path, int flags, ...) {                                                \
        REAL(name); MODE(flags) char full[PATH_MAX];                                            \
        if (CHANGES(flags) && whole(AT_FDCWD, path, full) && met("open", ROOM, full, -1, 0, 0)) return -1; \
        return real(path, flags, mode);                                                         \
    }
#define OPENAT(name)                                                                            \
    int name(int dir, const char *path, int flags, ...) {                                       \
        REAL(name); MODE(flags) char full[PATH_MAX];                                            \
        if (CHANGES(flags) && whole(dir, path, full) && met("open", ROOM, full, -1, 0, 0)) return -1; \
        return real(dir, path, flags, mode);                                                    \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define ON_FILE(result, name, class, declared, given, fd, data, size)                           \
    result name declared {                                                                      \
        REAL(name); char full[PATH_MAX];                                                        \
        if (open_file(fd, full) && met(#name, class, full, fd, data, size)) return -1;          \
        return real given;                                                                      \
    }
ON_FILE(ssize_t, write, ROOM, (int fd, const void *data, size_t n), (fd, data, n), fd, data, n)
ON_FILE(ssize_t, pwrite, ROOM, (int fd, const void *data, size_t n, off_t o), (fd, data, n, o), fd, 0, 0)
ON_FILE(ssize_t, pwrite64, ROOM, (int fd, const void *data, size_t n, off64_t o), (fd, data, n, o), fd, 0, 0)
ON_FILE(ssize_t, writev, ROOM, (int fd, const struct iovec *v, int n), (fd, v, n), fd, 0, 0)
ON_FILE(int, fallocate, ROOM, (int fd, int mode, off_t o, off_t n), (fd, mode, o, n), fd, 0, 0)
ON_FILE(int, fallocate64, ROOM, (int fd, int mode, off64_t o, off64_t n), (fd, mode, o, n), fd, 0, 0)
ON_FILE(int, ftruncate, REMOVE, (int fd, off_t n), (fd, n), fd, 0, 0)
ON_FILE(int, ftruncate64, REMOVE, (int fd, off64_t n), (fd, n), fd, 0, 0)
ON_FILE(int, fsync, FLUSH, (int fd), (fd), fd, 0, 0)
ON_FILE(int, fdatasync, FLUSH, (int fd), (fd), fd, 0, 0)

#define ON_PATH(name, called, class, declared, given, dir, path)                                \
    int name declared {                                                                         \
        REAL(name); char full[PATH_MAX];                                                        \
        if (whole(dir, path, full) && met(called, class, full, -1, 0, 0)) return -1;            \
        return real given;                                                                      \
    }
ON_PATH(rename, "rename", ROOM, (const char *a, const char *b), (a, b), AT_FDCWD, b)
ON_PATH(renameat, "rename", ROOM, (int d, const char *a, int e, const char *b), (d, a, e, b), e, b)
ON_PATH(renameat2, "rename", ROOM, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f), e, b)
ON_PATH(mkdir, "mkdir", ROOM, (const char *a, mode_t m), (a, m), AT_FDCWD, a)
ON_PATH(mkdirat, "mkdir", ROOM, (int d, const char *a, mode_t m), (d, a, m), d, a)
ON_PATH(unlink, "unlink", REMOVE, (const char *a), (a), AT_FDCWD, a)
ON_PATH(unlinkat, "unlink", REMOVE, (int d, const char *a, int f), (d, a, f), d, a)
ON_PATH(rmdir, "rmdir", REMOVE, (const char *a), (a), AT_FDCWD, a)
