/* What an ordinary dynamic program sees, as JSON members on stdout: the clock, randomness, addresses, a new
 * file, the locale. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <langinfo.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void print_bytes(const char *name, const unsigned char *bytes, size_t count) {
    printf(",\"%s\":\"", name);
    for (size_t i = 0; i < count; i++)
        printf("%02x", bytes[i]);
    printf("\"");
}

int main(void) {
    struct timespec now = {0, 0};
    struct stat found = {0};
    unsigned char bytes[8] = {0};
    char name[] = "/tmp/XXXXXX";

    clock_gettime(CLOCK_REALTIME, &now);
    printf("\"time\":\"%lld.%09ld\"", (long long)now.tv_sec, now.tv_nsec);
    if (getrandom(bytes, sizeof bytes, 0) == (ssize_t)sizeof bytes)
        print_bytes("random", bytes, sizeof bytes);
    int device = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
    if (device >= 0 && read(device, bytes, sizeof bytes) == (ssize_t)sizeof bytes)
        print_bytes("urandom", bytes, sizeof bytes);
    int file = mkstemp(name);
    if (file >= 0 && fstat(file, &found) == 0 && unlink(name) == 0)
        printf(",\"temporary\":\"%s\",\"modified\":\"%lld\"", name, (long long)found.st_mtim.tv_sec);
    setlocale(LC_ALL, "");
    printf(",\"codeset\":\"%s\",\"decimal\":\"1%s5\"", nl_langinfo(CODESET), nl_langinfo(RADIXCHAR));
    printf(",\"stack\":\"%p\"", (void *)&now);
    return 0;
}
