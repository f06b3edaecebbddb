/* Asks the C library for all that an audit's preloaded library changes, and prints the answers, one kind a line. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static struct timespec soon(clockid_t clock) {
    struct timespec when;
    clock_gettime(clock, &when);
    when.tv_nsec += 200000000;
    when.tv_sec += when.tv_nsec / 1000000000;
    when.tv_nsec %= 1000000000;
    return when;
}

static double waited(int (*wait)(void)) {
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    int result = wait();
    clock_gettime(CLOCK_MONOTONIC, &to);
    double seconds = to.tv_sec - from.tv_sec + (to.tv_nsec - from.tv_nsec) / 1e9;
    return result == 0 ? seconds : -result;
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static int on_condition(void) {
    pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
    struct timespec until = soon(CLOCK_REALTIME);
    pthread_mutex_lock(&mutex);
    int result = pthread_cond_timedwait(&condition, &mutex, &until);
    pthread_mutex_unlock(&mutex);
    return result == ETIMEDOUT ? 0 : 1;
}

static int on_monotonic_condition(void) {
    pthread_cond_t condition;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&condition, &attributes);
    struct timespec until = soon(CLOCK_MONOTONIC);
    pthread_mutex_lock(&mutex);
    int result = pthread_cond_timedwait(&condition, &mutex, &until);
    pthread_mutex_unlock(&mutex);
    return result == ETIMEDOUT ? 0 : 1;
}

/* For good: this wait must be the last. */
static void *lock(void *unused) {
    pthread_mutex_lock(&mutex);
    return unused;
}

static int on_mutex(void) {
    pthread_t other;
    pthread_create(&other, NULL, lock, NULL);
    pthread_join(other, NULL);
    struct timespec until = soon(CLOCK_REALTIME);
    return pthread_mutex_timedlock(&mutex, &until) == ETIMEDOUT ? 0 : 1;
}

static int on_semaphore(void) {
    sem_t semaphore;
    sem_init(&semaphore, 0, 0);
    struct timespec until = soon(CLOCK_REALTIME);
    return sem_timedwait(&semaphore, &until) == -1 && errno == ETIMEDOUT ? 0 : 1;
}

static int asleep(void) {
    struct timespec until = soon(CLOCK_REALTIME);
    return clock_nanosleep(CLOCK_REALTIME, TIMER_ABSTIME, &until, NULL);
}

static void print_times(const char *name, const char *path) {
    struct stat found;
    struct statx more;
    stat(path, &found);
    statx(AT_FDCWD, path, 0, STATX_MTIME, &more);
    printf("%s %ld %d\n", name, (long)found.st_mtim.tv_sec, found.st_mtim.tv_sec == more.stx_mtime.tv_sec);
}

int main(void) {
    struct timespec now, got;
    struct timeval day;
    clock_gettime(CLOCK_REALTIME, &now);
    gettimeofday(&day, NULL);
    timespec_get(&got, TIME_UTC);
    printf("clock %ld\n", (long)now.tv_sec);
    long most = labs(day.tv_sec - now.tv_sec) + labs(got.tv_sec - now.tv_sec) + labs(time(NULL) - now.tv_sec);
    printf("agree %d\n", most < 9);

    close(open("new", O_CREAT | O_WRONLY, 0600));
    print_times("new", "new");
    struct stat found;
    stat("new", &found);
    struct timespec same[2] = {found.st_atim, found.st_mtim};
    close(open("copy", O_CREAT | O_WRONLY, 0600));
    utimensat(AT_FDCWD, "copy", same, 0);
    print_times("copy", "copy");
    struct timespec old[2] = {{1, 0}, {1, 0}};
    utimensat(AT_FDCWD, "copy", old, 0);
    print_times("old", "copy");
    print_times("input", "/in/tree");

    int (*waits[])(void) = {on_condition, on_monotonic_condition, on_semaphore, asleep, on_mutex};
    printf("waits");
    for (int i = 0; i < 5; i++)
        printf(" %.1f", waited(waits[i]));
    printf("\n");

    unsigned char bytes[300];
    char one[] = "/tmp/aXXXXXX", two[] = "/tmp/aXXXXXX.suffix", three[] = "/tmp/dXXXXXX", four[] = "/tmp/short";
    printf("random %d", getentropy(bytes, 256));
    printf(" %02x%02x", bytes[0], bytes[255]);
    printf(" %d", getentropy(bytes, 300));
    arc4random_buf(bytes, sizeof bytes);
    printf(" %02x %08x %d", bytes[299], arc4random(), arc4random_uniform(10) < 10);
    printf(" %02x\n", *(unsigned char *)getauxval(AT_RANDOM));
    printf("names %d %d %d", mkstemp(one) > 2, mkstemps(two, 7) > 2, mkdtemp(three) == three);
    printf(" %d %s %s %s\n", mkstemp(four), one, two, three);
    return 0;
}
