// The guest agent: frames of a 4-byte big-endian length and JSON.
//
// hostd's requests:  "Ping", {"SleepPrep":{"drain_timeout_secs":N}}, "Wake",
//                    {"SetClock":{"unix_nanos":N}} -> {"ClockAck":{"was_off_nanos":guest minus N}}
// for tests:         "Stat", "Drives", {"ReadFile":{"path":P}} (64 KiB at most; a byte is a character)
#define _GNU_SOURCE
#include "guest.h"

#include "../json.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

uint64_t counter;
static uint64_t drains, wakes;
static char answer[8 * 65536];

static const char *error(const char *what, const char *why)
{
    snprintf(answer, sizeof answer, "{\"Error\":{\"message\":\"%s: %s\"}}", what, why);
    return answer;
}

static const char *stat(void)
{
    char boot_id[64], mounts[64];
    read_text("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
    boot_id[strcspn(boot_id, "\n")] = 0;
    list_mounts(mounts, sizeof mounts);
    snprintf(answer, sizeof answer,
             "{\"Stat\":{\"counter\":%lu,\"boots\":%lu,\"boot_id\":\"%s\",\"unix_nanos\":%lu,"
             "\"mono_nanos\":%lu,\"drains\":%lu,\"wakes\":%lu,\"mounted\":%s}}",
             counter, boots(), boot_id, nanoseconds(CLOCK_REALTIME), nanoseconds(CLOCK_MONOTONIC),
             drains, wakes, mounts);
    return answer;
}

static const char *sleep_prep(void)
{
    char detail[100];
    bool success = unmount_small_drives(detail, sizeof detail);
    drains += success;
    if (success)
        return "{\"SleepPrepAck\":{\"success\":true,\"detail\":null}}";
    snprintf(answer, sizeof answer, "{\"SleepPrepAck\":{\"success\":false,\"detail\":\"%s\"}}", detail);
    return answer;
}

static const char *wake(void)
{
    mount_drives();
    wakes++;
    return "{\"WakeAck\":{\"success\":true}}";
}

static const char *set_clock(const char *body)
{
    const char *value = json_field(body, "unix_nanos");
    if (!value)
        return error("SetClock", "unix_nanos is missing");
    int64_t wanted = strtoll(value, NULL, 10);
    int64_t was_off = (int64_t)nanoseconds(CLOCK_REALTIME) - wanted;
    struct timespec time = {.tv_sec = wanted / 1000000000, .tv_nsec = wanted % 1000000000};
    if (clock_settime(CLOCK_REALTIME, &time))
        return error("SetClock", strerror(errno));
    snprintf(answer, sizeof answer, "{\"ClockAck\":{\"was_off_nanos\":%ld}}", was_off);
    return answer;
}

static const char *read_file(const char *body)
{
    static char content[65536];
    char path[256], *to = answer;
    const char *value = json_field(body, "path");
    if (!value || sscanf(value, "\"%255[^\"\\]\"", path) != 1)
        return error("ReadFile", "path is missing");
    int length = read_text(path, content, sizeof content);
    if (length < 0)
        return error(path, strerror(errno));
    to += sprintf(to, "{\"ReadFile\":{\"content\":\"");
    for (int i = 0; i < length; i++) {
        unsigned char c = content[i];
        to += sprintf(to, c < ' ' || c > '~' || c == '"' || c == '\\' ? "\\u%04x" : "%c", c);
    }
    sprintf(to, "\"}}");
    return answer;
}

static const char *drives(void)
{
    char list[1024];
    list_drives(list, sizeof list);
    snprintf(answer, sizeof answer, "{\"Drives\":%s}", list);
    return answer;
}

static const char *handle(const char *request)
{
    const char *body;
    if (json_body(request, "Ping"))
        return "\"Pong\"";
    if (json_body(request, "SleepPrep"))
        return sleep_prep();
    if (json_body(request, "Wake"))
        return wake();
    if ((body = json_body(request, "SetClock")))
        return set_clock(body);
    if (json_body(request, "Stat"))
        return stat();
    if (json_body(request, "Drives"))
        return drives();
    if ((body = json_body(request, "ReadFile")))
        return read_file(body);
    return error("unknown request", "see the head of agent.c");
}

static bool send_all(int socket, const void *data, size_t size)
{
    for (const char *at = data; size;) {
        ssize_t sent = send(socket, at, size, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        at += sent, size -= sent;
    }
    return true;
}

bool agent_receive(struct client *from)
{
    uint32_t length;
    char *end = from->frame + from->length;
    ssize_t got = recv(from->socket, end, sizeof from->frame - 1 - from->length, 0);
    if (got <= 0)
        return false;
    from->length += got;
    while (from->length >= sizeof length) {
        memcpy(&length, from->frame, sizeof length);
        length = ntohl(length);
        if (length > sizeof from->frame - sizeof length - 1)
            return false;
        size_t whole = sizeof length + length;
        if (from->length < whole)
            break;
        char next = from->frame[whole]; // overwritten by the end of this request's text
        from->frame[whole] = 0;
        const char *reply = handle(from->frame + sizeof length);
        from->frame[whole] = next;
        uint32_t reply_length = htonl(strlen(reply));
        if (!send_all(from->socket, &reply_length, sizeof reply_length)
            || !send_all(from->socket, reply, strlen(reply)))
            return false;
        from->length -= whole;
        memmove(from->frame, from->frame + whole, from->length);
    }
    return true;
}
