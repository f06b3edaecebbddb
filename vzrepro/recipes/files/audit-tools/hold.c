/* Loaded into every dynamic program by /etc/ld.so.preload: gives the clock another time, and constant randomness.
 *
 * /dev/mqueue/hold says what, one setting a line:
 *
 *     shift SECONDS START     the time of day is so many seconds later
 *     freeze SECONDS START    the time of day is this one (since 1970) and stands still
 *     random                  getrandom and its like always give the same bytes, temporary names the same names
 *
 * START is a time of day just before the build. Files changed after it, and only they, have their times told by the
 * changed clock, too. The monotonic clock is left alone: time limits and pauses would never end. What never asks the
 * C library is not reached: static programs, the instructions of the processor (rdrand, rdtsc).
 *
 * System calls are made directly where that is the whole of what the replaced function did.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SETTINGS "/dev/mqueue/hold"
#define YEARS_SINCE_BOOT 1000000000 /* 31 of them: an earlier deadline is one of the monotonic clock */

static int64_t start, shift, frozen;
static int random_held;
static int ready; /* two threads may both read the settings: they find the same */

static int64_t number(char **text) { return strtoll(*text, text, 10); }

__attribute__((constructor)) static void read_settings(void) {
    char text[256];
    if (__atomic_load_n(&ready, __ATOMIC_ACQUIRE))
        return;
    long file = syscall(SYS_open, SETTINGS, O_RDONLY | O_CLOEXEC);
    long length = file < 0 ? 0 : syscall(SYS_read, file, text, sizeof text - 1);
    if (file >= 0)
        syscall(SYS_close, file);
    text[length > 0 ? length : 0] = 0;
    for (char *line = text; line != NULL && *line != 0; line = strchr(line, '\n'), line += line != NULL) {
        char *rest = strchr(line, ' ');
        if (strncmp(line, "shift ", 6) == 0 && rest != NULL)
            shift = number(&rest), start = number(&rest);
        else if (strncmp(line, "freeze ", 7) == 0 && rest != NULL)
            frozen = number(&rest), start = number(&rest);
        else if (strncmp(line, "random", 6) == 0)
            random_held = 1;
    }
    /* The kernel's 16 random bytes for the program, which some take for a seed; the loader has had its use of them. */
    void *bytes = random_held ? (void *)getauxval(AT_RANDOM) : NULL;
    if (bytes != NULL)
        memset(bytes, 0x5a, 16);
    __atomic_store_n(&ready, 1, __ATOMIC_RELEASE);
}

/* --- the clock --------------------------------------------------------------------------------------------------- */

static int is_time_of_day(clockid_t clock) {
    return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE || clock == CLOCK_TAI;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    read_settings();
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (result != 0 || !is_time_of_day(clock))
        return result;
    if (frozen)
        *now = (struct timespec){frozen, 0};
    now->tv_sec += shift;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result != NULL)
        *result = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict result, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    *result = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    if (zone != NULL)
        memset(zone, 0, sizeof(struct timezone));
    return 0;
}

int timespec_get(struct timespec *now, int base) {
    return base == TIME_UTC && clock_gettime(CLOCK_REALTIME, now) == 0 ? base : 0;
}

/* Deadlines of the changed clock, told to a kernel that does not know it. */
static const struct timespec *deadline(const struct timespec *asked, struct timespec *real) {
    read_settings();
    if (asked == NULL || (!shift && !frozen) || asked->tv_sec < YEARS_SINCE_BOOT)
        return asked;
    *real = *asked;
    real->tv_sec -= shift;
    if (frozen) {
        struct timespec now;
        syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
        real->tv_sec += now.tv_sec - frozen;
        real->tv_nsec += now.tv_nsec;
        if (real->tv_nsec >= 1000000000) {
            real->tv_nsec -= 1000000000;
            real->tv_sec++;
        }
    }
    return real;
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    struct timespec real;
    if (is_time_of_day(clock) && (flags & TIMER_ABSTIME))
        until = deadline(until, &real);
    return syscall(SYS_clock_nanosleep, clock, flags, until, left) == 0 ? 0 : errno;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    struct timespec real;
    int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    /* By version: the plain name may give the one of 1999, for another kind of condition. */
    *(void **)&next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    return next(condition, mutex, deadline(until, &real));
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) {
    struct timespec real;
    int (*next)(pthread_mutex_t *, const struct timespec *);
    *(void **)&next = dlsym(RTLD_NEXT, "pthread_mutex_timedlock");
    return next(mutex, deadline(until, &real));
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    struct timespec real;
    int (*next)(sem_t *, const struct timespec *);
    *(void **)&next = dlsym(RTLD_NEXT, "sem_timedwait");
    return next(semaphore, deadline(until, &real));
}

/* --- times of files ---------------------------------------------------------------------------------------------- */

/* In both directions: what a program reads, and gives back to utimensat, must mean the same file time. */
static void tell(struct timespec *when) {
    if ((!shift && !frozen) || when->tv_sec < start)
        return;
    if (frozen)
        *when = (struct timespec){frozen, 0};
    else
        when->tv_sec += shift;
}

static int tell_all(int result, struct stat *found) {
    read_settings();
    if (result == 0) {
        tell(&found->st_atim);
        tell(&found->st_mtim);
        tell(&found->st_ctim);
    }
    return result;
}

int fstatat(int directory, const char *restrict path, struct stat *restrict found, int flags) {
    return tell_all((int)syscall(SYS_newfstatat, directory, path, found, flags), found);
}

int stat(const char *restrict path, struct stat *restrict found) { return fstatat(AT_FDCWD, path, found, 0); }

int lstat(const char *restrict path, struct stat *restrict found) {
    return fstatat(AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW);
}

int fstat(int file, struct stat *found) { return tell_all((int)syscall(SYS_fstat, file, found), found); }

/* On x86-64 the structures are the same. */
int fstatat64(int, const char *restrict, struct stat64 *restrict, int) __attribute__((alias("fstatat")));
int stat64(const char *restrict, struct stat64 *restrict) __attribute__((alias("stat")));
int lstat64(const char *restrict, struct stat64 *restrict) __attribute__((alias("lstat")));
int fstat64(int, struct stat64 *) __attribute__((alias("fstat")));

static void tell_statx(struct statx_timestamp *when) {
    struct timespec plain = {when->tv_sec, when->tv_nsec};
    tell(&plain);
    when->tv_sec = plain.tv_sec;
    when->tv_nsec = (uint32_t)plain.tv_nsec;
}

int statx(int directory, const char *restrict path, int flags, unsigned int mask, struct statx *restrict found) {
    read_settings();
    int result = (int)syscall(SYS_statx, directory, path, flags, mask, found);
    if (result == 0) {
        tell_statx(&found->stx_atime);
        tell_statx(&found->stx_btime);
        tell_statx(&found->stx_ctime);
        tell_statx(&found->stx_mtime);
    }
    return result;
}

int utimensat(int directory, const char *path, const struct timespec times[2], int flags) {
    struct timespec real[2];
    read_settings();
    if (times != NULL && shift) {
        for (int i = 0; i < 2; i++) {
            real[i] = times[i];
            if (real[i].tv_nsec != UTIME_NOW && real[i].tv_nsec != UTIME_OMIT && real[i].tv_sec >= start + shift)
                real[i].tv_sec -= shift;
        }
        times = real;
    }
    return (int)syscall(SYS_utimensat, directory, path, times, flags);
}

int futimens(int file, const struct timespec times[2]) { return utimensat(file, NULL, times, 0); }

/* --- randomness -------------------------------------------------------------------------------------------------- */

/* splitmix64: the same numbers in every process, one after the other. */
static uint64_t next_number(void) {
    static uint64_t state = 0x9e3779b97f4a7c15u;
    uint64_t z = __atomic_add_fetch(&state, 0x9e3779b97f4a7c15u, __ATOMIC_RELAXED);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

ssize_t getrandom(void *buffer, size_t length, unsigned int flags) {
    read_settings();
    if (!random_held)
        return syscall(SYS_getrandom, buffer, length, flags);
    for (size_t done = 0; done < length; done += 8) {
        uint64_t n = next_number();
        memcpy((char *)buffer + done, &n, length - done < 8 ? length - done : 8);
    }
    return (ssize_t)length;
}

int getentropy(void *buffer, size_t length) {
    if (length > 256) {
        errno = EIO;
        return -1;
    }
    for (size_t done = 0; done < length;) {
        ssize_t n = getrandom((char *)buffer + done, length - done, 0);
        if (n < 0 && errno != EINTR)
            return -1;
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

void arc4random_buf(void *buffer, size_t length) {
    for (size_t done = 0; done < length; done += 256)
        if (getentropy((char *)buffer + done, length - done < 256 ? length - done : 256) != 0)
            abort();
}

uint32_t arc4random(void) {
    uint32_t n;
    arc4random_buf(&n, sizeof n);
    return n;
}

uint32_t arc4random_uniform(uint32_t bound) {
    if (bound < 2)
        return 0;
    uint32_t lowest = -bound % bound, n; /* below it some results would come more often */
    do
        n = arc4random();
    while (n < lowest);
    return n % bound;
}

/* The C library makes temporary names by system calls of its own. */
static int make_temporary(char *template, int suffix, int directory, int flags) {
    static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    size_t length = strlen(template);
    read_settings();
    if (suffix < 0 || length < 6 + (size_t)suffix || memcmp(template + length - suffix - 6, "XXXXXX", 6) != 0) {
        errno = EINVAL;
        return -1;
    }
    char *place = template + length - suffix - 6;
    for (int attempt = 0; attempt < 100000; attempt++) {
        uint64_t n;
        if (getrandom(&n, sizeof n, 0) != sizeof n)
            return -1;
        for (int i = 0; i < 6; i++, n /= 62)
            place[i] = digits[n % 62];
        int result = directory ? mkdir(template, 0700) : open(template, O_RDWR | O_CREAT | O_EXCL | flags, 0600);
        if (result >= 0 || errno != EEXIST)
            return result;
    }
    return -1;
}

int mkostemps(char *template, int suffix, int flags) {
    return make_temporary(template, suffix, 0, flags & ~O_ACCMODE);
}

int mkostemp(char *template, int flags) { return mkostemps(template, 0, flags); }

int mkstemps(char *template, int suffix) { return mkostemps(template, suffix, 0); }

int mkstemp(char *template) { return mkostemps(template, 0, 0); }

int mkostemps64(char *, int, int) __attribute__((alias("mkostemps")));
int mkostemp64(char *, int) __attribute__((alias("mkostemp")));
int mkstemps64(char *, int) __attribute__((alias("mkstemps")));
int mkstemp64(char *) __attribute__((alias("mkstemp")));

char *mkdtemp(char *template) { return make_temporary(template, 0, 1, 0) == 0 ? template : NULL; }
