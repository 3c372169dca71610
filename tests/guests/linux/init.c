// The first and only process of the Linux guest: sets the system up, then serves the agent on vsock
// and echoes TCP and UDP on port 7, in one loop.
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

enum { AGENT_PORT = 5252, ECHO_PORT = 7, MAX_CLIENTS = 32, TICK_MS = 50 };
enum { SIGNALS, AGENT, TCP_ECHO, UDP_ECHO, FIRST_CLIENT };

static struct pollfd watched[FIRST_CLIENT + MAX_CLIENTS];
static struct client *clients[FIRST_CLIENT + MAX_CLIENTS]; // NULL: an echo connection
static int count = FIRST_CLIENT;

static int bound(int socket, const void *address, socklen_t size)
{
    int on = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(socket, address, size))
        printf("bind: %s\n", strerror(errno));
    return socket;
}

// Ctrl-Alt-Del comes as SIGINT to the first process, once the kernel does not reboot by itself.
static int signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    reboot(RB_DISABLE_CAD);
    return signalfd(-1, &set, SFD_CLOEXEC);
}

static void listen_on_everything(void)
{
    struct sockaddr_vm agent = {
        .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = AGENT_PORT};
    struct sockaddr_in echo = {.sin_family = AF_INET, .sin_port = htons(ECHO_PORT)};

    watched[SIGNALS].fd = signals();
    watched[AGENT].fd = bound(socket(AF_VSOCK, SOCK_STREAM, 0), &agent, sizeof agent);
    watched[TCP_ECHO].fd = bound(socket(AF_INET, SOCK_STREAM, 0), &echo, sizeof echo);
    watched[UDP_ECHO].fd = bound(socket(AF_INET, SOCK_DGRAM, 0), &echo, sizeof echo);
    listen(watched[AGENT].fd, 16);
    listen(watched[TCP_ECHO].fd, 16);
    for (int i = 0; i < FIRST_CLIENT; i++)
        watched[i].events = POLLIN;
}

static void accept_client(int listener)
{
    int socket = accept4(watched[listener].fd, NULL, NULL, SOCK_CLOEXEC);
    if (socket < 0)
        return;
    if (count == FIRST_CLIENT + MAX_CLIENTS) {
        close(socket);
        return;
    }
    watched[count] = (struct pollfd){.fd = socket, .events = POLLIN};
    clients[count] = NULL;
    if (listener == AGENT) {
        clients[count] = malloc(sizeof **clients);
        clients[count]->socket = socket;
        clients[count]->length = 0;
    }
    count++;
}

static void drop_client(int i)
{
    close(watched[i].fd);
    free(clients[i]);
    count--;
    watched[i] = watched[count];
    clients[i] = clients[count];
}

static bool echo_stream(int socket)
{
    char data[16384];
    ssize_t got = recv(socket, data, sizeof data, 0);
    return got > 0 && send(socket, data, got, MSG_NOSIGNAL) == got;
}

static void echo_datagram(int socket)
{
    char data[65536];
    struct sockaddr_storage from;
    socklen_t size = sizeof from;
    ssize_t got = recvfrom(socket, data, sizeof data, 0, (struct sockaddr *)&from, &size);
    if (got >= 0)
        sendto(socket, data, got, 0, (struct sockaddr *)&from, size);
}

static void end(void)
{
    sync();
    umount("/mnt/data");
    reboot(RB_AUTOBOOT);
}

int main(void)
{
    mount_kernel_file_systems();
    load_modules();
    configure_network();
    mount_drives();
    count_boot();
    listen_on_everything();
    printf("linux guest is up\n");
    for (;; counter++) {
        if (poll(watched, count, TICK_MS) <= 0)
            continue;
        if (watched[SIGNALS].revents)
            end();
        for (int i = count - 1; i >= FIRST_CLIENT; i--)
            if (watched[i].revents
                && !(clients[i] ? agent_receive(clients[i]) : echo_stream(watched[i].fd)))
                drop_client(i);
        if (watched[UDP_ECHO].revents)
            echo_datagram(watched[UDP_ECHO].fd);
        for (int listener = AGENT; listener <= TCP_ECHO; listener++)
            if (watched[listener].revents)
                accept_client(listener);
    }
}
