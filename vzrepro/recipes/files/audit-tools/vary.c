/* Put before a build's command by an audit: changes what only a process can change of itself, prints what it then sees
 * as one line, `vzrepro-observed {json}`, and becomes the command.
 *
 *     vary [--personality=N]... [--pid=N] [--mkdir=PATH] [--look=PROGRAM] -- COMMAND [ARGUMENT]...
 *
 * Static, so that it runs in an image without a C library. The line stays below what vzrepro shows of one (2,000
 * bytes): lists are told as hashes, texts are cut.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_ENTRIES 50000 /* looked at in /in: a tenth of a second */
#define LONGEST_TEXT 160
#define HASH_START 0xcbf29ce484222325u

extern char **environ;

static char line[1900];
static size_t used;

__attribute__((format(printf, 1, 2))) static void add(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line + used, sizeof line - used, format, arguments);
    va_end(arguments);
    if (n < 0 || (size_t)n >= sizeof line - used) {
        fprintf(stderr, "vary: the line would be too long\n");
        exit(125);
    }
    used += (size_t)n;
}

static void add_text(const char *name, const char *text) {
    add(",\"%s\":\"", name);
    for (size_t i = 0; text != NULL && text[i] != 0 && i < LONGEST_TEXT; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x20 || c >= 0x7f || c == '"' || c == '\\')
            add("\\u%04x", c);
        else
            add("%c", c);
    }
    add("\"");
}

/* FNV-1a, 64 bits; the terminating zero counts, so that lists of names cannot run together. */
static uint64_t hash(uint64_t state, const char *text) {
    do
        state = (state ^ (unsigned char)*text) * 0x100000001b3u;
    while (*text++ != 0);
    return state;
}

struct walk {
    uint64_t order; /* of the names as readdir gives them */
    int entries;
    long links; /* of the first regular file, 0 for none */
};

static void look_through(int parent, const char *name, struct walk *walk) {
    int descriptor = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *directory = descriptor < 0 ? NULL : fdopendir(descriptor);
    if (directory == NULL)
        return;
    struct dirent *entry;
    while (walk->entries < MOST_ENTRIES && (entry = readdir(directory)) != NULL) {
        struct stat found;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        walk->entries++;
        walk->order = hash(walk->order, entry->d_name);
        if (fstatat(dirfd(directory), entry->d_name, &found, AT_SYMLINK_NOFOLLOW) != 0)
            continue;
        if (S_ISREG(found.st_mode) && walk->links == 0)
            walk->links = (long)found.st_nlink;
        if (S_ISDIR(found.st_mode))
            look_through(dirfd(directory), entry->d_name, walk);
    }
    closedir(directory);
}

static uint64_t filesystem(const char *path) {
    struct statfs found;
    return statfs(path, &found) == 0 ? (uint64_t)found.f_type : 0;
}

static void add_cpus(void) {
    cpu_set_t set;
    char text[LONGEST_TEXT] = "";
    size_t length = 0;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int cpu = 0; cpu < CPU_SETSIZE && length < sizeof text - 8; cpu++)
            if (CPU_ISSET(cpu, &set))
                length += (size_t)sprintf(text + length, length ? ",%d" : "%d", cpu);
    add_text("cpus", text);
}

/* What tells one OCI runtime from another: kinds and options of the mounts that it makes by itself, in /proc and for
 * terminals. Their order differs between runs, and numbers and paths of the host do. proc(5): the fields of mountinfo. */
static uint64_t mounts(void) {
    FILE *file = fopen("/proc/self/mountinfo", "re");
    char text[8192], target[4096], options[1024], kind[256], detail[1024];
    uint64_t sum = 0;
    while (file != NULL && fgets(text, sizeof text, file) != NULL) {
        const char *rest = strstr(text, " - ");
        if (rest == NULL || sscanf(text, "%*s %*s %*s %*s %4095s %1023s", target, options) != 2 ||
            sscanf(rest, " - %255s %*s %1023s", kind, detail) != 2)
            continue;
        /* /proc/meminfo is another axis. */
        if ((strncmp(target, "/proc/", 6) == 0 && strcmp(target, "/proc/meminfo") != 0) ||
            strcmp(target, "/dev/pts") == 0)
            sum += hash(hash(hash(hash(HASH_START, target), options), kind), detail);
    }
    if (file != NULL)
        fclose(file);
    return sum;
}

static void add_memory(void) {
    FILE *file = fopen("/proc/meminfo", "re");
    long long kilobytes = 0;
    if (file != NULL) {
        if (fscanf(file, "MemTotal: %lld", &kilobytes) != 1)
            kilobytes = 0;
        fclose(file);
    }
    add(",\"memory\":\"%lld kB\"", kilobytes);
}

/* What dynamic programs see is seen by one: PROGRAM prints JSON members. Without a C library there are no others. */
static void add_look(char *program) {
    int ends[2];
    char answer[512];
    size_t length = 0;
    if (pipe2(ends, O_CLOEXEC) != 0)
        return;
    pid_t child = fork();
    if (child == 0) {
        char *arguments[] = {program, NULL};
        dup2(ends[1], STDOUT_FILENO);
        execv(program, arguments);
        _exit(127);
    }
    close(ends[1]);
    ssize_t n;
    while (length < sizeof answer - 1 && (n = read(ends[0], answer + length, sizeof answer - 1 - length)) > 0)
        length += (size_t)n;
    close(ends[0]);
    answer[length] = 0;
    int status = -1;
    if (child > 0 && waitpid(child, &status, 0) == child && status == 0)
        add(",%s", answer);
}

static void observe(char *look) {
    struct utsname names;
    struct stat found;
    struct walk walk = {HASH_START, 0, 0};
    char place[4096];
    uint64_t variables = HASH_START;
    int count = 0;

    for (char **each = environ; *each != NULL; each++, count++)
        variables = hash(variables, *each);
    look_through(AT_FDCWD, "/in", &walk);
    mode_t mask = umask(0);
    umask(mask);

    add("vzrepro-observed {\"pid\":\"%d\",\"uid\":\"%u\",\"gid\":\"%u\"", getpid(), getuid(), getgid());
    if (uname(&names) == 0) {
        add_text("host", names.nodename);
        add_text("domain", names.domainname);
        add_text("release", names.release);
    }
    add_text("cwd", getcwd(place, sizeof place));
    add_text("home", getenv("HOME"));
    add_text("path", getenv("PATH"));
    add_text("tz", getenv("TZ"));
    add_text("locale", getenv("LC_ALL"));
    add_text("cores", getenv("VZ_CORES"));
    add_cpus();
    add_memory();
    add(",\"umask\":\"%04o\",\"environment\":\"%d:%016llx\"", mask, count, (unsigned long long)variables);
    add(",\"build\":\"%llx\"", (unsigned long long)filesystem("/build"));
    add(",\"in\":\"%llx\",\"out\":\"%llx\"", (unsigned long long)filesystem("/in"), (unsigned long long)filesystem("/out"));
    add(",\"inode\":\"%llu\"", stat("/build", &found) == 0 ? (unsigned long long)found.st_ino : 0ull);
    add(",\"shell\":\"%lld\"", stat("/bin/sh", &found) == 0 ? (long long)found.st_size : 0ll);
    add(",\"entries\":\"%d\",\"order\":\"%016llx\",\"links\":\"%ld\"", walk.entries, (unsigned long long)walk.order,
        walk.links);
    add(",\"mounts\":\"%016llx\",\"personality\":\"%x\"", (unsigned long long)mounts(), personality(0xffffffff));
    if (look != NULL)
        add_look(look);
    add("}\n");
    for (size_t written = 0; written < used;) {
        ssize_t n = write(STDOUT_FILENO, line + written, used - written);
        if (n < 0 && errno != EINTR)
            break;
        written += n > 0 ? (size_t)n : 0;
    }
}

/* Use up the process ids below one, and stand in for a child that has it: end as it ends. */
static void move_on(long wanted) {
    for (pid_t burnt = getpid(); burnt > 0 && burnt < wanted - 1;) {
        burnt = fork();
        if (burnt == 0)
            _exit(0);
        if (burnt > 0)
            waitpid(burnt, NULL, 0);
    }
    pid_t child = fork();
    if (child == 0)
        return;
    int status = 125 << 8;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    if (WIFSIGNALED(status)) {
        signal(WTERMSIG(status), SIG_DFL);
        raise(WTERMSIG(status));
    }
    _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 125);
}

static char *value_of(char *argument, const char *name) {
    size_t length = strlen(name);
    return strncmp(argument, name, length) == 0 ? argument + length : NULL;
}

int main(int count, char **arguments) {
    unsigned long persona = 0;
    long pid = 0;
    char *look = NULL, *value;
    int i = 1;
    for (; i < count && strcmp(arguments[i], "--") != 0; i++) {
        if ((value = value_of(arguments[i], "--personality=")) != NULL)
            persona |= strtoul(value, NULL, 0);
        else if ((value = value_of(arguments[i], "--pid=")) != NULL)
            pid = strtol(value, NULL, 10);
        else if ((value = value_of(arguments[i], "--mkdir=")) != NULL)
            mkdir(value, 0777);
        else if ((value = value_of(arguments[i], "--look=")) != NULL)
            look = value;
        else
            break;
    }
    if (i + 1 >= count || strcmp(arguments[i], "--") != 0) {
        fprintf(stderr, "usage: vary [--personality=N] [--pid=N] [--mkdir=PATH] [--look=PROGRAM] -- COMMAND...\n");
        return 125;
    }
    if (pid > 0) { /* its parent's, too */
        move_on(pid - 1);
        move_on(pid);
    }
    if (persona != 0 && personality(persona) < 0)
        perror("vary: personality");
    observe(look);
    execvp(arguments[i + 1], arguments + i + 1);
    int error = errno;
    fprintf(stderr, "vary: %s: %s\n", arguments[i + 1], strerror(error));
    return error == ENOENT ? 127 : 126;
}
