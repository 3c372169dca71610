// Drives, found by the label of their ext4 file system: /mnt/config and /mnt/secrets read only,
// /mnt/data writable. The small ones are unmounted before sleep, for they may be others at wake; the
// kernel drops a block device's cached pages with its last user, so the new contents are read then.
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

static struct place {
    const char *name, *label, *directory;
    bool mounted;
} places[DRIVES] = {
    [CONFIG] = {"config", "mvm-config", "/mnt/config", false},
    [SECRETS] = {"secrets", "mvm-secrets", "/mnt/secrets", false},
    [DATA] = {"data", "mvm-data", "/mnt/data", false},
};
static const char BOOTS[] = "/mnt/data/boots";

// Opens /dev/vda and so on; returns its label ("" without ext4) and size, or false past the last.
static bool inspect(int number, char device[16], char label[17], uint64_t *size_bytes)
{
    enum { SUPERBLOCK = 1024, MAGIC_AT = 0x38, LABEL_AT = 0x78 };
    unsigned char superblock[1024];

    snprintf(device, 16, "/dev/vd%c", 'a' + number);
    int file = open(device, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    label[0] = label[16] = 0;
    *size_bytes = 0;
    ioctl(file, BLKGETSIZE64, size_bytes);
    if (pread(file, superblock, sizeof superblock, SUPERBLOCK) == sizeof superblock
        && superblock[MAGIC_AT] == 0x53 && superblock[MAGIC_AT + 1] == 0xef)
        memcpy(label, superblock + LABEL_AT, 16);
    close(file);
    return true;
}

static void mount_place(struct place *place, const char *device)
{
    bool writable = place == &places[DATA];
    mkdir("/mnt", 0755);
    mkdir(place->directory, 0755);
    int failed = mount(device, place->directory, "ext4", writable ? 0 : MS_RDONLY, 0);
    if (failed)
        printf("mount %s on %s: %s\n", device, place->directory, strerror(errno));
    place->mounted = !failed;
}

void mount_drives(void)
{
    char device[16], label[17];
    uint64_t size;
    for (int number = 0; inspect(number, device, label, &size); number++)
        for (int i = 0; i < DRIVES; i++)
            if (!places[i].mounted && !strcmp(label, places[i].label))
                mount_place(&places[i], device);
}

bool unmount_small_drives(char *detail, size_t size)
{
    sync();
    for (int i = 0; i < DATA; i++) {
        if (!places[i].mounted)
            continue;
        if (umount(places[i].directory)) {
            snprintf(detail, size, "%s: %s", places[i].directory, strerror(errno));
            return false;
        }
        places[i].mounted = false;
    }
    return true;
}

uint64_t boots(void)
{
    char text[32];
    return read_text(BOOTS, text, sizeof text) > 0 ? strtoull(text, NULL, 10) : 0;
}

void count_boot(void)
{
    char text[32];
    if (!places[DATA].mounted)
        return;
    int size = snprintf(text, sizeof text, "%lu\n", (unsigned long)boots() + 1);
    int file = open(BOOTS, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file < 0 || write(file, text, size) != size || fsync(file))
        printf("%s: %s\n", BOOTS, strerror(errno));
    close(file);
}

void list_drives(char *json, size_t size)
{
    char device[16], label[17];
    uint64_t bytes;
    size_t used = snprintf(json, size, "[");
    for (int number = 0; inspect(number, device, label, &bytes) && used < size; number++)
        used += snprintf(json + used, size - used, "%s{\"label\":\"%s\",\"size_bytes\":%lu}",
                         number ? "," : "", label, (unsigned long)bytes);
    if (used < size)
        snprintf(json + used, size - used, "]");
}

void list_mounts(char *json, size_t size)
{
    size_t used = snprintf(json, size, "[");
    for (int i = 0; i < DRIVES; i++)
        if (places[i].mounted)
            used += snprintf(json + used, size - used, "%s\"%s\"", used > 1 ? "," : "", places[i].name);
    snprintf(json + used, size - used, "]");
}
