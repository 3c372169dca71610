// The mini guest: what its files offer each other.
//
// It is a guest for Firecracker without a kernel in it: 64-bit freestanding C that drives virtio-mmio
// vsock, network and block devices, in one endless loop of polling and halting. It runs on any KVM,
// also where kernel-mode guest code goes through KVM's instruction emulator (KVM_PVM), at about a
// million instructions a second and without SSE, XRSTOR, INT3 and long-mode IRET. So: general
// registers only, no byte loops over much memory, no returning interrupt handlers.
#ifndef MINI_H
#define MINI_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef _Bool bool;
enum { false, true };

// -- machine.c: the processor and the board -------------------------------------------------------
extern volatile u64 ticks;             // of the timer
extern volatile u64 device_interrupts; // from virtio devices
extern volatile u32 keyboard_waits;    // the keyboard controller has something to read
void idle(void);                       // start.S: sleep until the next interrupt
void machine_init(void);
u64 milliseconds(void); // since boot, counted in ticks; stands still while the VM does
u64 timestamp(void);    // the time stamp counter
void slow_down_ticks(void);
bool ctrl_alt_del(void); // was it pressed since the last call?
void serial_line(const char *text);
void reset(void);
void crash(void);
void hang(void);
u32 read32(u64 address);
u64 read64(u64 address);
void write32(u64 address, u32 value);

// -- text.c: copying, and just enough text --------------------------------------------------------
struct text {
    char data[2048];
    u32 length;
};
void copy(void *to, const void *from, u64 size);
bool same(const void *a, const void *b, u64 size);
u64 length_of(const char *text);
void add(struct text *to, const char *text);
void add_number(struct text *to, u64 value);
void add_hex(struct text *to, u64 value); // 16 digits
u64 number(const char **at, u32 base);    // moves `at` past the digits
bool begins(const char *text, const char *prefix);
bool value_is(const char *value, const char *word); // also "word:..." counts

// -- virtio.c ------------------------------------------------------------------------------------
enum { QUEUE_SIZE = 32, BUFFER_SIZE = 4096, DEVICE_READS = 0, CHAINED = 1, DEVICE_WRITES = 2 };
enum { TYPE_NET = 1, TYPE_BLOCK = 2, TYPE_VSOCK = 19, CONFIG = 0x100 };
struct queue {
    struct { u64 address; u32 length; u16 flags, next; } descriptors[QUEUE_SIZE];
    struct { u16 flags, index, ring[QUEUE_SIZE]; } available;
    struct { u16 flags, index; struct { u32 id, length; } ring[QUEUE_SIZE]; } used;
    u64 base;         // of the device's registers
    u8 *buffers;      // QUEUE_SIZE of BUFFER_SIZE; a transmit queue has just one
    u32 number;
    u16 seen;         // used.index up to here is dealt with
} __attribute__((aligned(16)));
u32 virtio_type(u64 base); // 0 if there is no device
bool virtio_begin(u64 base);
void virtio_queue(u64 base, u32 number, struct queue *queue, u8 *buffers);
void virtio_go(u64 base);
void queue_offer_all(struct queue *queue);                 // give the device every buffer to fill
u8 *queue_take(struct queue *queue, u32 *id, u32 *length); // a filled buffer, or 0
void queue_offer(struct queue *queue, u32 id);
void queue_kick(struct queue *queue);
void queue_push(struct queue *queue, u32 first); // make the chain that begins there available
bool queue_wait(struct queue *queue);            // until the device used all; false: gave up
u8 *queue_send_buffer(struct queue *queue);      // waits for the message sent before
void queue_send(struct queue *queue, u32 length);

// -- drives.c ------------------------------------------------------------------------------------
void drives_add(u64 base);
void drives_count_boot(void);
bool drives_boots(u64 *boots); // read from the data drive now; 0 without one; false: it failed
void drives_list(struct text *to);

// -- vsock.c, agent.c ----------------------------------------------------------------------------
struct connection {
    bool open;
    u32 peer_port, local_port;
    u32 received;                    // bytes, for the peer's flow control
    u32 length;                      // of `input`
    u8 input[BUFFER_SIZE];           // a frame that is not complete yet
    bool ack_due, ack_held;          // a drain was asked for and is not answered yet:
    u64 ack_at_ms;                   // until then, or until released if it is held
};
extern u64 vsock_resets;
void vsock_init(u64 base);
bool vsock_poll(void); // true if there was something to do
void vsock_send(struct connection *to, const void *data, u32 length);
void vsock_close(struct connection *connection);
void vsock_each(void (*visit)(struct connection *));
void agent_option(const char *option); // KEY=VALUE, without the "mini."
bool agent_accepts(u32 port);
void agent_receive(struct connection *from, const u8 *data, u32 length);
bool agent_poll(void);
bool agent_heeds_ctrl_alt_del(void);
void mix_identity(void); // gather randomness for the boot id
extern u64 counter;

// -- net.c ---------------------------------------------------------------------------------------
void net_address(const char *ip); // <guest>::<gateway>:<mask>::eth0:off
void net_init(u64 base);
bool net_poll(void);

#endif
