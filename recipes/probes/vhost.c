/* Lets QEMU's vhost-vsock-pci, whose state can be saved, be served by vhost-device-vsock, whose own device of QEMU's
 * (vhost-user-vsock-pci) can not. Preloaded into QEMU, which is given a socket connected to vhost-device-vsock as
 * `vhostfd`: the ioctls that are meant for /dev/vhost-vsock (linux/vhost.h) become messages of vhost-user there.
 *
 * Nothing is logged while memory is being saved: the guest has to be stopped before, then its device is as well.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/vhost.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9,
       SET_VRING_BASE = 10, GET_VRING_BASE = 11, SET_VRING_KICK = 12, SET_VRING_CALL = 13, SET_VRING_ERR = 14,
       SET_VRING_ENABLE = 18 };

#define VERSION 1u
#define NO_FD 0x100u /* beside a ring's index */
#define PROTOCOL_FEATURES (1ull << 30)
#define LOG_ALL (1ull << VHOST_F_LOG_ALL)
#define MAX_REGIONS 8
#define RINGS 2 /* the third, events, is QEMU's */

struct region { uint64_t guest, size, user, offset; };

struct message {
    uint32_t request, flags, size;
    union {
        uint64_t number;
        struct vhost_vring_state state;
        struct vhost_vring_addr address;
        struct { uint32_t count, padding; struct region regions[MAX_REGIONS]; } memory;
    } body;
} __attribute__((packed));

#define HEADER offsetof(struct message, body)

static int fail(int number) { errno = number; return -1; }

static void await(int socket, short events)
{
    struct pollfd one = {.fd = socket, .events = events};
    poll(&one, 1, -1);
}

static int tell(int socket, struct message *message, uint32_t request, uint32_t size, const int *fds, int count)
{
    message->request = request;
    message->flags = VERSION;
    message->size = size;
    struct iovec part = {message, HEADER + size};
    union { struct cmsghdr header; char space[CMSG_SPACE(MAX_REGIONS * sizeof(int))]; } control = {0};
    struct msghdr all = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        all.msg_control = &control;
        all.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&all);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), fds, count * sizeof(int));
    }
    for (;;) {
        ssize_t sent = sendmsg(socket, &all, MSG_NOSIGNAL);
        if (sent == (ssize_t)part.iov_len)
            return 0;
        if (sent >= 0)
            return fail(EIO); /* a socket's buffer holds many of these */
        if (errno == EAGAIN)
            await(socket, POLLOUT);
        else if (errno != EINTR)
            return -1;
    }
}

static int ask(int socket, struct message *message, uint32_t request, uint32_t size)
{
    if (tell(socket, message, request, size, NULL, 0))
        return -1;
    size_t have = 0, wanted = HEADER;
    while (have < wanted) {
        ssize_t got = recv(socket, (char *)message + have, wanted - have, 0);
        if (got > 0) {
            have += got;
            if (have == HEADER && (wanted += message->size) > sizeof *message)
                return fail(EPROTO);
        } else if (got == 0)
            return fail(EPIPE);
        else if (errno == EAGAIN)
            await(socket, POLLIN);
        else if (errno != EINTR)
            return -1;
    }
    return message->request == request ? 0 : fail(EPROTO);
}

/* The open file that is mapped at `address`, -1 when there is none, and where in it that is. */
static int file_at(uint64_t address, uint64_t *offset)
{
    static char maps[1 << 20];
    size_t have = 0;
    int file = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    for (ssize_t got; file >= 0 && have < sizeof maps - 1 && (got = read(file, maps + have, sizeof maps - 1 - have)) > 0;)
        have += got;
    close(file);
    maps[have] = 0;
    for (char *line = maps, *next; *line; line = next) { /* start-end mode offset major:minor inode path */
        next = strchr(line, '\n');
        next = next ? next + 1 : maps + have;
        char *at;
        uint64_t start = strtoull(line, &at, 16), end = strtoull(at + 1, &at, 16);
        if (address < start || address >= end)
            continue;
        uint64_t from = strtoull(at + 6, &at, 16);
        unsigned int device = strtoull(at + 1, &at, 16), unit = strtoull(at + 1, &at, 16);
        uint64_t inode = strtoull(at, NULL, 10);
        *offset = from + (address - start);
        for (int fd = 3; inode && fd < 1024; fd++) {
            struct stat found;
            if (!fstat(fd, &found) && found.st_ino == inode && found.st_dev == makedev(device, unit))
                return fd;
        }
    }
    return -1;
}

static int set_memory(int socket, const struct vhost_memory *memory)
{
    struct message message = {0};
    int fds[MAX_REGIONS];
    uint32_t count = 0;
    for (uint32_t i = 0; i < memory->nregions; i++) {
        const struct vhost_memory_region *one = &memory->regions[i];
        struct region region = {one->guest_phys_addr, one->memory_size, one->userspace_addr, 0};
        int fd = file_at(region.user, &region.offset);
        if (fd < 0)
            continue; /* no memory of the guest's, which is a shared file */
        if (count == MAX_REGIONS)
            return fail(E2BIG);
        fds[count] = fd;
        message.body.memory.regions[count++] = region;
    }
    message.body.memory.count = count;
    return tell(socket, &message, SET_MEM_TABLE, 8 + count * sizeof(struct region), fds, count);
}

static int set_file(int socket, uint32_t request, const struct vhost_vring_file *file)
{
    struct message message = {.body.number = file->index | (file->fd < 0 ? NO_FD : 0)};
    return tell(socket, &message, request, 8, &file->fd, file->fd >= 0);
}

/* A ring of vhost-user runs from the moment that it has the file that it is kicked by, the kernel's when QEMU says so,
 * which has then said where it is to be called: a call that went elsewhere would not be repeated. So these files wait.
 * There is one device, and one ioctl at a time. */
static struct vhost_vring_file kicks[RINGS];

static int set_kick(const struct vhost_vring_file *file)
{
    if (file->index >= RINGS)
        return fail(EINVAL);
    kicks[file->index] = *file;
    return 0;
}

static int enable(int socket, int enabled)
{
    for (uint32_t i = 0; i < RINGS; i++) {
        struct message message = {.body.state = {i, enabled}};
        if (tell(socket, &message, SET_VRING_ENABLE, 8, NULL, 0))
            return -1;
    }
    return 0;
}

static int run(int socket)
{
    for (int i = 0; i < RINGS; i++)
        if (set_file(socket, SET_VRING_KICK, &kicks[i]))
            return -1;
    /* Enabled only now: vhost-device-vsock ends its service when a ring is kicked that is not ready yet, and QEMU gives
     * it files with a kick in them. So that one is lost, and given again. */
    struct message done = {0};
    if (enable(socket, 1) || ask(socket, &done, GET_FEATURES, 0))
        return -1;
    for (int i = 0; i < RINGS; i++)
        if (write(kicks[i].fd, &(uint64_t){1}, 8) != 8)
            return -1;
    return 0;
}

static int vhost(int socket, unsigned long request, void *argument)
{
    struct message message = {0};
    switch (request) {
    case VHOST_GET_FEATURES:
        if (ask(socket, &message, GET_FEATURES, 0))
            return -1;
        *(uint64_t *)argument = (message.body.number & ~PROTOCOL_FEATURES) | LOG_ALL;
        return 0;
    case VHOST_SET_FEATURES:
        message.body.number = *(uint64_t *)argument;
        if (message.body.number & LOG_ALL)
            return fail(EOPNOTSUPP);
        message.body.number |= PROTOCOL_FEATURES; /* rings are enabled one by one */
        return tell(socket, &message, SET_FEATURES, 8, NULL, 0);
    case VHOST_SET_OWNER:
        return tell(socket, &message, SET_OWNER, 0, NULL, 0);
    case VHOST_SET_MEM_TABLE:
        return set_memory(socket, argument);
    case VHOST_SET_VRING_NUM:
    case VHOST_SET_VRING_BASE:
        message.body.state = *(struct vhost_vring_state *)argument;
        return tell(socket, &message, request == VHOST_SET_VRING_NUM ? SET_VRING_NUM : SET_VRING_BASE, 8, NULL, 0);
    case VHOST_GET_VRING_BASE:
        message.body.state = *(struct vhost_vring_state *)argument;
        if (ask(socket, &message, GET_VRING_BASE, 8))
            return -1;
        *(struct vhost_vring_state *)argument = message.body.state;
        return 0;
    case VHOST_SET_VRING_ADDR:
        message.body.address = *(struct vhost_vring_addr *)argument;
        return tell(socket, &message, SET_VRING_ADDR, sizeof message.body.address, NULL, 0);
    case VHOST_SET_VRING_KICK:
        return set_kick(argument);
    case VHOST_SET_VRING_CALL:
        return set_file(socket, SET_VRING_CALL, argument);
    case VHOST_SET_VRING_ERR:
        return set_file(socket, SET_VRING_ERR, argument);
    case VHOST_VSOCK_SET_RUNNING:
        return *(int *)argument ? run(socket) : enable(socket, 0);
    case VHOST_VSOCK_SET_GUEST_CID: /* it was started with it */
        return 0;
    default:
        return fail(ENOTTY);
    }
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (_IOC_TYPE(request) != VHOST_VIRTIO)
        return syscall(SYS_ioctl, fd, request, argument);
    struct message done = {0};
    if (vhost(fd, request, argument))
        return -1;
    /* An ioctl has happened when it returns; a message has when the next one is answered. */
    return ask(fd, &done, GET_FEATURES, 0);
}
