/* Real faults below SQLite: with LD_PRELOAD, the calls that write and sync fail as long as the file
 * named by DEFER_FAULT says so: its first byte is 'f' (sync fails with EIO), 'd' (that of the redo log
 * alone: SQLite as it is built here never calls fdatasync), 'r' or 'w' (that of SQLite on the thread that
 * reads or writes; each time, a byte is added to the file's `.hits`), 'e' (the disk is full) or anything
 * else (all is well). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <unistd.h>

static char fault(void) {
    const char *name = getenv("DEFER_FAULT");
    char byte = 0;
    int fd = name ? open(name, O_RDONLY) : -1;
    if (fd >= 0) {
        if (read(fd, &byte, 1) != 1) byte = 0;
        close(fd);
    }
    return byte;
}

/* Whether this is the thread that is to fail. */
static int is_meant(char fault) {
    char thread[16] = "", name[4096];
    prctl(PR_GET_NAME, thread);
    if (strncmp(thread, fault == 'r' ? "defer-store-rea" : "defer-store-wri", 15)) return 0;
    snprintf(name, sizeof name, "%s.hits", getenv("DEFER_FAULT"));
    int fd = open(name, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (fd >= 0) {
        if (write(fd, "!", 1) != 1) abort();
        close(fd);
    }
    return 1;
}

#define REAL(type, name) \
    static type real; \
    if (!real) real = (type)dlsym(RTLD_NEXT, name)

typedef int (*sync_fn)(int);
typedef ssize_t (*pwrite_fn)(int, const void *, size_t, off_t);

int fsync(int fd) {
    REAL(sync_fn, "fsync");
    char now = fault();
    if (now == 'f' || ((now == 'r' || now == 'w') && is_meant(now))) { errno = EIO; return -1; }
    return real(fd);
}

int fdatasync(int fd) {
    REAL(sync_fn, "fdatasync");
    if (fault() == 'f' || fault() == 'd') { errno = EIO; return -1; }
    return real(fd);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off_t place) {
    REAL(pwrite_fn, "pwrite64");
    if (fault() == 'e') { errno = ENOSPC; return -1; }
    return real(fd, bytes, count, place);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t place) {
    REAL(pwrite_fn, "pwrite");
    if (fault() == 'e') { errno = ENOSPC; return -1; }
    return real(fd, bytes, count, place);
}
