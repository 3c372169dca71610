// virtio-mmio, version 2, split queues. Source: OASIS virtio 1.2, 2.7 and 4.2.
#include "mini.h"

enum {
    MAGIC = 0x000, DEVICE_ID = 0x008, DRIVER_FEATURES = 0x020, DRIVER_FEATURES_SELECT = 0x024,
    QUEUE_SELECT = 0x030, QUEUE_NUM = 0x038, QUEUE_READY = 0x044, QUEUE_NOTIFY = 0x050,
    STATUS = 0x070, QUEUE_DESCRIPTORS = 0x080, QUEUE_AVAILABLE = 0x090, QUEUE_USED = 0x0a0,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

static void barrier(void) { __asm__ volatile("" ::: "memory"); } // x86 keeps the order of stores

u32 virtio_type(u64 base) { return read32(base + MAGIC) == 0x74726976 ? read32(base + DEVICE_ID) : 0; }

bool virtio_begin(u64 base)
{
    write32(base + STATUS, 0);
    write32(base + STATUS, ACKNOWLEDGE);
    write32(base + STATUS, ACKNOWLEDGE | DRIVER);
    write32(base + DRIVER_FEATURES_SELECT, 0);
    write32(base + DRIVER_FEATURES, 0);
    write32(base + DRIVER_FEATURES_SELECT, 1);
    write32(base + DRIVER_FEATURES, 1); // bit 32, VERSION_1, is all that we want
    write32(base + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    return read32(base + STATUS) & FEATURES_OK;
}

static void write_address(u64 at, void *address)
{
    write32(at, (u64)address);
    write32(at + 4, (u64)address >> 32);
}

void virtio_queue(u64 base, u32 n, struct queue *queue, u8 *buffers)
{
    queue->base = base;
    queue->number = n;
    queue->buffers = buffers;
    write32(base + QUEUE_SELECT, n);
    write32(base + QUEUE_NUM, QUEUE_SIZE);
    write_address(base + QUEUE_DESCRIPTORS, queue->descriptors);
    write_address(base + QUEUE_AVAILABLE, &queue->available);
    write_address(base + QUEUE_USED, &queue->used);
    write32(base + QUEUE_READY, 1);
}

void virtio_go(u64 base) { write32(base + STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK); }

void queue_push(struct queue *queue, u32 first)
{
    queue->available.ring[queue->available.index % QUEUE_SIZE] = first;
    barrier();
    queue->available.index++;
}

void queue_kick(struct queue *queue)
{
    barrier();
    write32(queue->base + QUEUE_NOTIFY, queue->number);
}

void queue_offer(struct queue *queue, u32 id)
{
    queue->descriptors[id].address = (u64)queue->buffers + id * BUFFER_SIZE;
    queue->descriptors[id].length = BUFFER_SIZE;
    queue->descriptors[id].flags = DEVICE_WRITES;
    queue_push(queue, id);
}

void queue_offer_all(struct queue *queue)
{
    for (u32 id = 0; id < QUEUE_SIZE; id++)
        queue_offer(queue, id);
    queue_kick(queue);
}

u8 *queue_take(struct queue *queue, u32 *id, u32 *length)
{
    if (queue->seen == *(volatile u16 *)&queue->used.index)
        return 0;
    *id = queue->used.ring[queue->seen % QUEUE_SIZE].id;
    *length = queue->used.ring[queue->seen % QUEUE_SIZE].length;
    queue->seen++;
    return queue->buffers + *id * BUFFER_SIZE;
}

bool queue_wait(struct queue *queue)
{
    for (u64 tries = 0; tries < 10000000; tries++)
        if (*(volatile u16 *)&queue->used.index == queue->available.index)
            return true;
    return false;
}

// Sending is one message at a time: the only descriptor is free once the message before is used.
u8 *queue_send_buffer(struct queue *queue)
{
    queue_wait(queue);
    return queue->buffers;
}

void queue_send(struct queue *queue, u32 length)
{
    queue->descriptors[0].address = (u64)queue->buffers;
    queue->descriptors[0].length = length;
    queue->descriptors[0].flags = DEVICE_READS;
    queue_push(queue, 0);
    queue_kick(queue);
}
