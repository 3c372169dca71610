// The processor and the board: pages, interrupts, timer, keyboard controller, serial port.
#include "mini.h"

enum { PIC1 = 0x20, PIC2 = 0xa0, PIT = 0x40, KEYBOARD = 0x60, SERIAL = 0x3f8 };
enum { VECTOR_BASE = 0x20, VECTORS = 16, PIT_HZ = 1193182 };
// Until a device interrupt has been seen, the timer alone wakes us, so it must be quick: 4 % of a
// core. With device interrupts it only moves the counter and the clock of this guest.
enum { QUICK_HZ = 250, SLOW_HZ = 25 };

volatile u64 ticks, device_interrupts;
volatile u32 keyboard_waits;
static u64 base_ms, base_ticks;
static u32 hz = QUICK_HZ;
static u64 device_pages[512] __attribute__((aligned(4096)));
static u64 idt[2 * (VECTOR_BASE + VECTORS)];
extern char on_tick[], on_keyboard[], on_device[];

static void out(u16 port, u8 value) { __asm__ volatile("outb %0,%1" ::"a"(value), "d"(port)); }

static u8 in(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1,%0" : "=a"(value) : "d"(port));
    return value;
}

u32 read32(u64 address) { return *(volatile u32 *)address; }
u64 read64(u64 address) { return *(volatile u64 *)address; }
void write32(u64 address, u32 value) { *(volatile u32 *)address = value; }

u64 timestamp(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

// The boot page tables map the first GiB only; devices are in the fourth: map it with 2 MiB pages.
static void map_devices(void)
{
    enum { PRESENT_WRITABLE = 3, UNCACHED_LARGE_PAGE = 0x93 };
    u64 cr3, *level4, *level3;
    __asm__ volatile("mov %%cr3,%0" : "=r"(cr3));
    level4 = (u64 *)(cr3 & ~0xfffUL);
    level3 = (u64 *)(level4[0] & 0xfffffff000UL);
    for (u64 i = 0; i < 512; i++)
        device_pages[i] = (0xc0000000UL + (i << 21)) | UNCACHED_LARGE_PAGE;
    level3[3] = (u64)device_pages | PRESENT_WRITABLE;
    __asm__ volatile("mov %0,%%cr3" ::"r"(cr3) : "memory");
}

static void set_gate(u32 vector, char *handler)
{
    u64 at = (u64)handler;
    idt[2 * vector] = (at & 0xffff) | 8UL << 16 | 0x8e00UL << 32 | (at >> 16 & 0xffff) << 48;
    idt[2 * vector + 1] = at >> 32;
}

static void set_timer(u32 new_hz)
{
    base_ms = milliseconds();
    base_ticks = ticks;
    hz = new_hz;
    out(PIT + 3, 0x34);
    out(PIT, PIT_HZ / hz);
    out(PIT, PIT_HZ / hz >> 8);
}

void machine_init(void)
{
    struct __attribute__((packed)) { u16 limit; u64 base; } table = {sizeof idt - 1, (u64)idt};

    map_devices();
    for (u32 i = 0; i < VECTORS; i++)
        set_gate(VECTOR_BASE + i, i == 0 ? on_tick : i == 1 ? on_keyboard : on_device);
    __asm__ volatile("lidt %0" ::"m"(table));
    // Both interrupt controllers: edge triggered, ending each interrupt by themselves, all unmasked.
    out(PIC1, 0x11), out(PIC1 + 1, VECTOR_BASE), out(PIC1 + 1, 4), out(PIC1 + 1, 3);
    out(PIC2, 0x11), out(PIC2 + 1, VECTOR_BASE + 8), out(PIC2 + 1, 2), out(PIC2 + 1, 3);
    out(PIC1 + 1, 0), out(PIC2 + 1, 0);
    // Priorities rotate: on a slow machine the timer, always due again, would starve the devices.
    out(PIC1, 0x80), out(PIC2, 0x80);
    set_timer(QUICK_HZ);
}

void slow_down_ticks(void)
{
    if (hz != SLOW_HZ)
        set_timer(SLOW_HZ);
}

u64 milliseconds(void) { return base_ms + (ticks - base_ticks) * 1000 / hz; }

// Firecracker's SendCtrlAltDel: the keys' scan codes (set 2) appear in the keyboard controller.
bool ctrl_alt_del(void)
{
    enum { STATUS_FULL = 1, LAST_KEY = 0x71 };
    bool pressed = false;

    keyboard_waits = 0;
    for (u32 i = 0; i < 16 && in(KEYBOARD + 4) & STATUS_FULL; i++)
        pressed |= in(KEYBOARD) == LAST_KEY;
    return pressed;
}

void serial_line(const char *text)
{
    while (*text)
        out(SERIAL, *text++);
    out(SERIAL, '\n');
}

void reset(void)
{
    out(KEYBOARD + 4, 0xfe);
    hang();
}

// An exception without a handler, without a handler for that: the processor shuts down.
void crash(void)
{
    struct __attribute__((packed)) { u16 limit; u64 base; } none = {0, 0};
    __asm__ volatile("lidt %0; ud2" ::"m"(none));
}

void hang(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}
