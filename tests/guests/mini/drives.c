// Drives: found by the label of their ext4 file system, as hostd's guests must. The boot counter is
// kept in the first sector of the data drive, which ext4 leaves to boot loaders.
#include "mini.h"

enum { MAX_DRIVES = 8, SECTOR = 512, READ = 0, WRITE = 1, OK = 0 };

static struct drive {
    u64 base;
    u64 sectors;
    struct queue queue;
    struct { u32 type, reserved; u64 sector; } request;
    u8 sector[SECTOR], status;
} drives[MAX_DRIVES];
static u32 count;
static const char COUNTER_MAGIC[8] = "MINIBOOT";

void drives_add(u64 base)
{
    struct drive *drive = &drives[count];
    if (count == MAX_DRIVES || !virtio_begin(base))
        return;
    drive->base = base;
    drive->sectors = read32(base + CONFIG) | (u64)read32(base + CONFIG + 4) << 32;
    virtio_queue(base, 0, &drive->queue, 0);
    virtio_go(base);
    count++;
}

static void describe(struct queue *queue, u32 id, void *data, u32 length, u16 flags)
{
    queue->descriptors[id].address = (u64)data;
    queue->descriptors[id].length = length;
    queue->descriptors[id].flags = flags;
    queue->descriptors[id].next = id + 1;
}

static bool transfer(struct drive *drive, u32 type, u64 sector)
{
    u16 data_flags = CHAINED | (type == READ ? DEVICE_WRITES : DEVICE_READS);
    drive->request.type = type;
    drive->request.sector = sector;
    drive->status = 0xff;
    describe(&drive->queue, 0, &drive->request, sizeof drive->request, CHAINED);
    describe(&drive->queue, 1, drive->sector, SECTOR, data_flags);
    describe(&drive->queue, 2, &drive->status, 1, DEVICE_WRITES);
    queue_push(&drive->queue, 0);
    queue_kick(&drive->queue);
    return queue_wait(&drive->queue) && *(volatile u8 *)&drive->status == OK;
}

// Copies the label, at most 16 characters, "" where there is no ext4 file system.
static void read_label(struct drive *drive, char label[17])
{
    enum { SUPERBLOCK_SECTOR = 1024 / SECTOR, EXT4_MAGIC_AT = 0x38, LABEL_AT = 0x78 };
    label[0] = 0;
    if (!transfer(drive, READ, SUPERBLOCK_SECTOR))
        return;
    if (drive->sector[EXT4_MAGIC_AT] != 0x53 || drive->sector[EXT4_MAGIC_AT + 1] != 0xef)
        return;
    copy(label, drive->sector + LABEL_AT, 16);
    label[16] = 0;
}

static struct drive *data_drive(void)
{
    static struct drive *found;
    char label[17];
    for (u32 i = 0; !found && i < count; i++) {
        read_label(&drives[i], label);
        if (same(label, "mvm-data", 9))
            found = &drives[i];
    }
    return found;
}

bool drives_boots(u64 *boots)
{
    struct drive *drive = data_drive();
    *boots = 0;
    if (!drive)
        return true;
    if (!transfer(drive, READ, 0))
        return false;
    if (same(drive->sector, COUNTER_MAGIC, sizeof COUNTER_MAGIC))
        copy(boots, drive->sector + sizeof COUNTER_MAGIC, sizeof *boots);
    return true;
}

void drives_count_boot(void)
{
    u64 boots;
    struct drive *drive = data_drive();
    if (!drive || !drives_boots(&boots))
        return;
    boots++;
    copy(drive->sector, COUNTER_MAGIC, sizeof COUNTER_MAGIC);
    copy(drive->sector + sizeof COUNTER_MAGIC, &boots, sizeof boots);
    transfer(drive, WRITE, 0);
}

void drives_list(struct text *to)
{
    char label[17];
    for (u32 i = 0; i < count; i++) {
        read_label(&drives[i], label);
        add(to, i ? ",{\"label\":\"" : "{\"label\":\"");
        add(to, label);
        add(to, "\",\"size_bytes\":");
        add_number(to, drives[i].sectors * SECTOR);
        add(to, "}");
    }
}
