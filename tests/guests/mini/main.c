// From the command line to the endless loop.
#include "mini.h"

// 4K@0xd0000000:5. The place moves between Firecracker versions, so nothing else is assumed.
static void add_device(const char *place)
{
    while (*place != ' ' && *place != '@')
        if (!*place++)
            return;
    if (!begins(place, "@0x"))
        return;
    place += 3;
    u64 base = number(&place, 16);
    u32 type = virtio_type(base);
    if (type == TYPE_VSOCK)
        vsock_init(base);
    else if (type == TYPE_NET)
        net_init(base);
    else if (type == TYPE_BLOCK)
        drives_add(base);
    mix_identity();
}

static void heed_word(const char *word)
{
    if (begins(word, "ip="))
        net_address(word + length_of("ip="));
    else if (begins(word, "mini."))
        agent_option(word + length_of("mini."));
    else if (begins(word, "virtio_mmio.device="))
        add_device(word + length_of("virtio_mmio.device="));
}

static void heed_keyboard(void)
{
    static u64 looked_at; // also look now and then without its interrupt
    if (!keyboard_waits && ticks - looked_at < 16)
        return;
    looked_at = ticks;
    if (ctrl_alt_del() && agent_heeds_ctrl_alt_del())
        reset();
}

void mini_main(u64 zero_page)
{
    enum { COMMAND_LINE_AT = 0x228 };
    const char *line = (const char *)(u64)read32(zero_page + COMMAND_LINE_AT);

    machine_init();
    heed_word(line);
    for (const char *at = line; *at; at++)
        if (*at == ' ')
            heed_word(at + 1);
    drives_count_boot();
    mix_identity();
    serial_line("mini guest is up");
    for (;;) {
        counter++;
        bool busy = vsock_poll();
        busy |= net_poll();
        busy |= agent_poll();
        heed_keyboard();
        if (device_interrupts)
            slow_down_ticks();
        if (!busy)
            idle();
    }
}
