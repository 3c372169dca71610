// The guest agent: frames of a 4-byte big-endian length and JSON, on a vsock port (5252).
//
// hostd's requests:   "Ping", {"SleepPrep":{"drain_timeout_secs":N}}, "Wake", {"SetClock":{...}}
// for tests:          "Stat", "Drives", {"Set":{"drain":"hold",...}}, "Release", "Crash", "Reset", "Hang"
//
// How it misbehaves is told on the command line (mini.KEY=VALUE) or later by Set:
//   agent=on|off|deaf             off: nothing listens; deaf: connects, never answers
//   drain=ok|refuse|silent|hold|slow:MS   how SleepPrep is answered; hold: when "Release" comes
//   wake=ok|refuse|silent
//   cad=on|off                    whether Ctrl-Alt-Del resets
#include "mini.h"

#include "../json.h"

enum { DEFAULT_PORT = 5252, FRAME_HEADER = 4, MAX_FRAME = BUFFER_SIZE - FRAME_HEADER - 1 };

static struct mode { const char *key; char value[24]; } modes[] = {
    {"agent", "on"}, {"drain", "ok"}, {"wake", "ok"}, {"cad", "on"},
};
enum { AGENT, DRAIN, WAKE, CAD, MODES };

u64 counter; // of rounds of the main loop and of requests, so that each Stat says more
static u64 identity[2] = {0x6d696e692d677565, 0x73742d626f6f7473};
static u64 drains, wakes;
static bool asleep;
static u32 port = DEFAULT_PORT;

// Each call folds the time in; the exits to the VMM in between make it vary.
void mix_identity(void)
{
    for (u32 i = 0; i < 2; i++) {
        identity[i] ^= timestamp() + (identity[1 - i] << 7);
        identity[i] = (identity[i] ^ identity[i] >> 29) * 0x9e3779b97f4a7c15;
    }
}

static void set_mode(struct mode *mode, const char *value)
{
    u32 n = 0;
    for (; n < sizeof mode->value - 1 && value[n] && value[n] != ' ' && value[n] != '"'; n++)
        mode->value[n] = value[n];
    mode->value[n] = 0;
}

void agent_option(const char *option)
{
    if (begins(option, "port=")) {
        option += length_of("port=");
        port = number(&option, 10);
    }
    for (u32 i = 0; i < MODES; i++) {
        const char *value = option + length_of(modes[i].key);
        if (begins(option, modes[i].key) && *value == '=')
            set_mode(&modes[i], value + 1);
    }
}

static bool mode_is(u32 mode, const char *word) { return value_is(modes[mode].value, word); }
bool agent_accepts(u32 to_port) { return to_port == port && !mode_is(AGENT, "off"); }
bool agent_heeds_ctrl_alt_del(void) { return !mode_is(CAD, "off"); }

static void answer(struct connection *to, const struct text *json)
{
    static u8 frame[FRAME_HEADER + sizeof json->data];
    u32 n = json->length;
    frame[0] = n >> 24, frame[1] = n >> 16, frame[2] = n >> 8, frame[3] = n;
    copy(frame + FRAME_HEADER, json->data, n);
    vsock_send(to, frame, FRAME_HEADER + n);
}

static void answer_with(struct connection *to, const char *json)
{
    static struct text text;
    text.length = 0;
    add(&text, json);
    answer(to, &text);
}

static void add_field(struct text *to, const char *key, u64 value)
{
    add(to, to->data[to->length - 1] == '{' ? "\"" : ",\"");
    add(to, key);
    add(to, "\":");
    add_number(to, value);
}

static void stat(struct connection *from)
{
    static struct text text;
    u64 boots;
    if (!drives_boots(&boots)) {
        answer_with(from, "{\"Error\":{\"message\":\"the data drive does not answer\"}}");
        return;
    }
    text.length = 0;
    add(&text, "{\"Stat\":{");
    add_field(&text, "counter", counter);
    add_field(&text, "boots", boots);
    add_field(&text, "resets", vsock_resets);
    add_field(&text, "tsc", timestamp());
    add_field(&text, "uptime_ms", milliseconds());
    add_field(&text, "drains", drains);
    add_field(&text, "wakes", wakes);
    add_field(&text, "device_interrupts", device_interrupts);
    add(&text, asleep ? ",\"asleep\":true" : ",\"asleep\":false");
    add(&text, ",\"boot_id\":\"");
    add_hex(&text, identity[0]);
    add_hex(&text, identity[1]);
    add(&text, "\"}}");
    answer(from, &text);
}

static void list_drives(struct connection *from)
{
    static struct text text;
    text.length = 0;
    add(&text, "{\"Drives\":[");
    drives_list(&text);
    add(&text, "]}");
    answer(from, &text);
}

static void ack_drain(struct connection *to)
{
    to->ack_due = false;
    if (mode_is(DRAIN, "refuse")) {
        answer_with(to, "{\"SleepPrepAck\":{\"success\":false,\"detail\":\"told to refuse\"}}");
        return;
    }
    asleep = true;
    drains++;
    answer_with(to, "{\"SleepPrepAck\":{\"success\":true,\"detail\":null}}");
}

static void sleep_prep(struct connection *from)
{
    if (mode_is(DRAIN, "silent"))
        return;
    if (!mode_is(DRAIN, "hold") && !mode_is(DRAIN, "slow")) {
        ack_drain(from);
        return;
    }
    const char *delay = modes[DRAIN].value + length_of("slow:");
    from->ack_due = true;
    from->ack_held = mode_is(DRAIN, "hold");
    from->ack_at_ms = milliseconds() + (from->ack_held ? 0 : number(&delay, 10));
}

static void wake(struct connection *from)
{
    if (mode_is(WAKE, "silent"))
        return;
    wakes++;
    asleep = false;
    answer_with(from, mode_is(WAKE, "refuse") ? "{\"WakeAck\":{\"success\":false}}"
                                              : "{\"WakeAck\":{\"success\":true}}");
}

static void set(struct connection *from, const char *body)
{
    for (u32 i = 0; i < MODES; i++) {
        const char *value = json_field(body, modes[i].key);
        if (value && *value == '"')
            set_mode(&modes[i], value + 1);
    }
    answer_with(from, "\"Ok\"");
}

static void release_held(struct connection *connection)
{
    connection->ack_held = false; // agent_poll answers it
}

static void release(struct connection *from)
{
    vsock_each(release_held);
    answer_with(from, "\"Ok\"");
}

static void handle(struct connection *from, const char *request)
{
    const char *body;
    counter++;
    if (mode_is(AGENT, "deaf"))
        return;
    if (json_body(request, "Ping"))
        answer_with(from, "\"Pong\"");
    else if (json_body(request, "SleepPrep"))
        sleep_prep(from);
    else if (json_body(request, "Wake"))
        wake(from);
    else if (json_body(request, "SetClock")) // there is no clock to set, so it was right
        answer_with(from, "{\"ClockAck\":{\"was_off_nanos\":0}}");
    else if (json_body(request, "Stat"))
        stat(from);
    else if (json_body(request, "Drives"))
        list_drives(from);
    else if ((body = json_body(request, "Set")))
        set(from, body);
    else if (json_body(request, "Release"))
        release(from);
    else if (json_body(request, "Crash"))
        crash();
    else if (json_body(request, "Reset"))
        reset();
    else if (json_body(request, "Hang"))
        hang();
    else
        answer_with(from, "{\"Error\":{\"message\":\"unknown request\"}}");
}

void agent_receive(struct connection *from, const u8 *data, u32 size)
{
    u8 *in = from->input;
    while (from->open && size) {
        u32 part = BUFFER_SIZE - 1 - from->length;
        part = part < size ? part : size;
        copy(in + from->length, data, part);
        from->length += part, data += part, size -= part;
        while (from->length >= FRAME_HEADER) {
            u32 n = (u32)in[0] << 24 | in[1] << 16 | in[2] << 8 | in[3];
            if (n > MAX_FRAME) {
                vsock_close(from);
                return;
            }
            if (from->length < FRAME_HEADER + n)
                break;
            u8 next = in[FRAME_HEADER + n]; // overwritten by the end of this request's text
            in[FRAME_HEADER + n] = 0;
            handle(from, (char *)in + FRAME_HEADER);
            in[FRAME_HEADER + n] = next;
            from->length -= FRAME_HEADER + n;
            copy(in, in + FRAME_HEADER + n, from->length);
        }
    }
}

static u32 acks_sent;

static void ack_if_due(struct connection *connection)
{
    if (!connection->ack_due || connection->ack_held || milliseconds() < connection->ack_at_ms)
        return;
    ack_drain(connection);
    acks_sent++;
}

bool agent_poll(void)
{
    acks_sent = 0;
    vsock_each(ack_if_due);
    return acks_sent > 0;
}
