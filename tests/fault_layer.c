/* A disk that fails: loaded before libc (LD_PRELOAD), it counts what changes files below a folder, and fails the n-th of it.

   cc -shared -fPIC -O1 -o fault_layer.so fault_layer.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { FULL = 1, BROKEN = 2, KILL = 3 };      /* ENOSPC from then on, EIO once, SIGKILL in the middle of it */
enum { GROWS = 1, MOVES = 2, REMOVES = 3 };   /* removing never fails: it makes room */

static char prefix[4096];
static long at = -1;
static int kind, armed;
static long *counted; /* shared with the process that forked us */

void fault_share(void) {
    counted = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void fault_arm(const char *below, long number, int what) {
    snprintf(prefix, sizeof prefix, "%s", below);
    at = number, kind = what, *counted = 0, armed = 1;
}

void fault_disarm(void) { armed = 0; }

long fault_counted(void) { return *counted; }

static int below(const char *path) { return path && strncmp(path, prefix, strlen(prefix)) == 0; }

static int fd_below(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

static int path_below(int folder, const char *path) {
    return path && path[0] == '/' ? below(path) : folder != AT_FDCWD && fd_below(folder);
}

/* Whether this change fails; the process may end here instead. */
static int fails(int what) {
    long number = (*counted)++;
    if (at < 0) return 0;
    if (kind == KILL && number == at) raise(SIGKILL);
    if (kind == BROKEN && number == at && what != REMOVES) { errno = EIO; return 1; }
    if (kind == FULL && number >= at && what == GROWS) { errno = ENOSPC; return 1; }
    return 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (!armed || !fd_below(fd)) return real(fd, data, size);
    if (kind == KILL && at == *counted && size > 1) real(fd, data, size / 2); /* torn */
    return fails(GROWS) ? -1 : real(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t place) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    return armed && fd_below(fd) && fails(GROWS) ? -1 : real(fd, data, size, place);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t place) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off_t);
    return armed && fd_below(fd) && fails(GROWS) ? -1 : real(fd, data, size, place);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    return armed && fd_below(fd) && fails(GROWS) ? -1 : real(fd, parts, count);
}

ssize_t sendfile(int out, int in, off_t *place, size_t size) {
    REAL(ssize_t, sendfile, int, int, off_t *, size_t);
    return armed && fd_below(out) && fails(GROWS) ? -1 : real(out, in, place, size);
}

ssize_t sendfile64(int out, int in, off_t *place, size_t size) {
    REAL(ssize_t, sendfile64, int, int, off_t *, size_t);
    return armed && fd_below(out) && fails(GROWS) ? -1 : real(out, in, place, size);
}

ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t size, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off_t *, int, off_t *, size_t, unsigned);
    return armed && fd_below(out) && fails(GROWS) ? -1 : real(in, from, out, to, size, flags);
}

int ftruncate(int fd, off_t size) {
    REAL(int, ftruncate, int, off_t);
    return armed && fd_below(fd) && fails(GROWS) ? -1 : real(fd, size);
}

int ftruncate64(int fd, off_t size) {
    REAL(int, ftruncate64, int, off_t);
    return armed && fd_below(fd) && fails(GROWS) ? -1 : real(fd, size);
}

int fsync(int fd) {
    REAL(int, fsync, int);
    return armed && fd_below(fd) && fails(GROWS) ? -1 : real(fd);
}

int fdatasync(int fd) {
    REAL(int, fdatasync, int);
    return armed && fd_below(fd) && fails(GROWS) ? -1 : real(fd);
}

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        va_list more; va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        if (armed && flags & O_CREAT && path_below(AT_FDCWD, path) && fails(GROWS)) return -1; \
        return real(path, flags, mode); \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        va_list more; va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        if (armed && flags & O_CREAT && path_below(folder, path) && fails(GROWS)) return -1; \
        return real(folder, path, flags, mode); \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t);
    return armed && path_below(AT_FDCWD, path) && fails(GROWS) ? -1 : real(path, mode);
}

int link(const char *from, const char *to) {
    REAL(int, link, const char *, const char *);
    return armed && path_below(AT_FDCWD, to) && fails(GROWS) ? -1 : real(from, to);
}

int linkat(int one, const char *from, int other, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    return armed && path_below(other, to) && fails(GROWS) ? -1 : real(one, from, other, to, flags);
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *);
    return armed && path_below(AT_FDCWD, to) && fails(MOVES) ? -1 : real(from, to);
}

int renameat(int one, const char *from, int other, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *);
    return armed && path_below(other, to) && fails(MOVES) ? -1 : real(one, from, other, to);
}

int renameat2(int one, const char *from, int other, const char *to, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    return armed && path_below(other, to) && fails(MOVES) ? -1 : real(one, from, other, to, flags);
}

int unlink(const char *path) {
    REAL(int, unlink, const char *);
    return armed && path_below(AT_FDCWD, path) && fails(REMOVES) ? -1 : real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    return armed && path_below(folder, path) && fails(REMOVES) ? -1 : real(folder, path, flags);
}

int rmdir(const char *path) {
    REAL(int, rmdir, const char *);
    return armed && path_below(AT_FDCWD, path) && fails(REMOVES) ? -1 : real(path);
}
