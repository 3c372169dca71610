// From nothing to a running system: file systems, modules, network.
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static char command_line[4096];

uint64_t nanoseconds(int clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000UL + now.tv_nsec;
}

int read_text(const char *path, char *text, size_t size)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? -1 : read(file, text, size - 1);
    int error = errno;
    if (file >= 0)
        close(file);
    text[length < 0 ? 0 : length] = 0;
    errno = error;
    return length;
}

void mount_kernel_file_systems(void)
{
    mount("proc", "/proc", "proc", 0, 0);
    mount("sysfs", "/sys", "sysfs", 0, 0);
    mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    read_text("/proc/cmdline", command_line, sizeof command_line);
}

// /modules/order names them one a line, each after those that it needs.
void load_modules(void)
{
    char order[2048], path[256];
    read_text("/modules/order", order, sizeof order);
    for (char *name = strtok(order, "\n"); name; name = strtok(NULL, "\n")) {
        snprintf(path, sizeof path, "/modules/%s", name);
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0 || syscall(SYS_finit_module, file, "", 0))
            printf("module %s: %s\n", name, strerror(errno));
        close(file);
    }
}

const char *boot_option(const char *key)
{
    static char value[128];
    size_t size = strlen(key);
    for (const char *at = command_line; (at = strstr(at, key)); at++) {
        if ((at != command_line && at[-1] != ' ') || at[size] != '=')
            continue;
        at += size + 1;
        snprintf(value, sizeof value, "%.*s", (int)strcspn(at, " \n"), at);
        return value;
    }
    return NULL;
}

static struct sockaddr *address(struct sockaddr *place, const char *text)
{
    struct sockaddr_in ip = {.sin_family = AF_INET};
    inet_pton(AF_INET, text, &ip.sin_addr);
    memcpy(place, &ip, sizeof ip);
    return place;
}

static void bring_up(int control, const char *name)
{
    struct ifreq request = {0};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    ioctl(control, SIOCGIFFLAGS, &request);
    request.ifr_flags |= IFF_UP;
    if (ioctl(control, SIOCSIFFLAGS, &request))
        printf("%s up: %s\n", name, strerror(errno));
}

// ip=<guest>::<gateway>:<mask>::eth0:off. Distribution kernels leave this to user space.
void configure_network(void)
{
    char guest[32] = "", gateway[32] = "", mask[32] = "";
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {.ifr_name = "eth0"};
    struct rtentry route = {.rt_flags = RTF_UP | RTF_GATEWAY};
    const char *ip = boot_option("ip");

    bring_up(control, "lo");
    if (ip && sscanf(ip, "%31[0-9.]::%31[0-9.]:%31[0-9.]", guest, gateway, mask) == 3) {
        address(&request.ifr_addr, guest);
        ioctl(control, SIOCSIFADDR, &request);
        address(&request.ifr_netmask, mask);
        ioctl(control, SIOCSIFNETMASK, &request);
        bring_up(control, "eth0");
        address(&route.rt_gateway, gateway);
        address(&route.rt_dst, "0.0.0.0");
        address(&route.rt_genmask, "0.0.0.0");
        if (ioctl(control, SIOCADDRT, &route))
            printf("default route: %s\n", strerror(errno));
    }
    close(control);
}
