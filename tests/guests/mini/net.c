// One address on one interface: answers ARP and ping, echoes UDP and TCP on every port.
//
// TCP needs no state: an echo returns each byte at its own place in the stream, so with the peer's
// initial sequence number as ours too, the answer's sequence number is that of the segment. Thus
// connections live through sleep and wake, and retransmitted segments are answered alike.
#include "mini.h"

enum { RX, TX, VIRTIO_HEADER = 12, ETHERNET = 14, IPV4 = 20, UDP = 8, TCP = 20, MAX_FRAME = 1514 };
enum { PROTOCOL_ICMP = 1, PROTOCOL_TCP = 6, PROTOCOL_UDP = 17, WINDOW = 32768 };
enum { FIN = 1, SYN = 2, RST = 4, PSH = 8, ACK = 16 };

static u64 device;
static u8 mac[6];
static u32 address;
static struct queue queues[2];
// The VMM reads from the TAP only while 65562 bytes of buffers are posted: 32 of 4096 are enough.
static u8 rx_buffers[QUEUE_SIZE][BUFFER_SIZE], tx_buffer[BUFFER_SIZE];

static u16 get16(const u8 *at) { return at[0] << 8 | at[1]; }
static u32 get32(const u8 *at) { return (u32)get16(at) << 16 | get16(at + 2); }
static void put16(u8 *at, u16 value) { at[0] = value >> 8, at[1] = value; }
static void put32(u8 *at, u32 value) { put16(at, value >> 16), put16(at + 2, value); }

static void swap(u8 *a, u8 *b, u32 size)
{
    for (; size; size--, a++, b++) {
        u8 kept = *a;
        *a = *b, *b = kept;
    }
}

// The sum over network-order bytes, in host order. Added in little-endian words and swapped once:
// the ones' complement sum does not care (RFC 1071, 2B).
static u16 checksum(const u8 *data, u32 size, u64 sum)
{
    for (; size >= 4; size -= 4, data += 4)
        sum += *(const u32 *)data;
    if (size & 2)
        sum += *(const u16 *)data, data += 2;
    if (size & 1)
        sum += *data;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return ~(u16)(sum << 8 | sum >> 8);
}

void net_address(const char *ip)
{
    for (u32 i = 0; i < 4; i++) {
        address = address << 8 | number(&ip, 10);
        ip += *ip == '.';
    }
}

void net_init(u64 base)
{
    if (device || !virtio_begin(base))
        return;
    device = base;
    for (u32 i = 0; i < 6; i++)
        mac[i] = *(volatile u8 *)(base + CONFIG + i);
    virtio_queue(base, RX, &queues[RX], rx_buffers[0]);
    virtio_queue(base, TX, &queues[TX], tx_buffer);
    virtio_go(base);
    queue_offer_all(&queues[RX]);
}

static u32 answer_arp(u8 *arp)
{
    if (get16(arp + 6) != 1 || get32(arp + 24) != address)
        return 0;
    put16(arp + 6, 2);
    swap(arp + 8, arp + 18, 10); // sender and target: MAC and address
    copy(arp + 8, mac, 6);
    put32(arp + 14, address);
    return ETHERNET + 28;
}

static u32 answer_icmp(u8 *icmp, u32 size)
{
    if (size < 8 || icmp[0] != 8)
        return 0;
    icmp[0] = 0;
    put16(icmp + 2, 0);
    put16(icmp + 2, checksum(icmp, size, 0));
    return size;
}

static u32 answer_udp(u8 *udp, u32 size)
{
    if (size < UDP)
        return 0;
    swap(udp, udp + 2, 2);
    put16(udp + 6, 0); // no checksum
    return size;
}

static u32 answer_tcp(u8 *ip, u8 *tcp, u32 size)
{
    u32 header = (tcp[12] >> 4) * 4u, flags = tcp[13];
    if (size < TCP || header < TCP || header > size || flags & RST)
        return 0;
    u32 sequence = get32(tcp + 4), data = flags & SYN ? 0 : size - header;
    if (!(flags & (SYN | FIN)) && !data)
        return 0;
    swap(tcp, tcp + 2, 2);
    put32(tcp + 4, sequence);
    put32(tcp + 8, sequence + data + ((flags & (SYN | FIN)) != 0));
    if (header != TCP)
        copy(tcp + TCP, tcp + header, data);
    tcp[12] = TCP / 4 << 4;
    tcp[13] = ACK | (flags & (SYN | FIN)) | (data ? PSH : 0);
    put16(tcp + 14, WINDOW);
    put16(tcp + 16, 0);
    put16(tcp + 18, 0);
    size = TCP + data;
    u8 pseudo[12];
    copy(pseudo, ip + 12, 8);
    put16(pseudo + 8, PROTOCOL_TCP);
    put16(pseudo + 10, size);
    u16 part = ~checksum(pseudo, sizeof pseudo, 0);
    put16(tcp + 16, checksum(tcp, size, (u16)(part << 8 | part >> 8)));
    return size;
}

static u32 answer_ip(u8 *ip, u32 size)
{
    u32 total = get16(ip + 2);
    if (ip[0] != 0x45 || get32(ip + 16) != address || total < IPV4 || total > size)
        return 0;
    if (get16(ip + 6) & 0x3fff) // a fragment
        return 0;
    u8 *payload = ip + IPV4;
    swap(ip + 12, ip + 16, 4);
    size = total - IPV4;
    size = ip[9] == PROTOCOL_ICMP ? answer_icmp(payload, size)
         : ip[9] == PROTOCOL_UDP  ? answer_udp(payload, size)
         : ip[9] == PROTOCOL_TCP  ? answer_tcp(ip, payload, size) : 0;
    if (!size)
        return 0;
    put16(ip + 2, IPV4 + size);
    ip[8] = 64;
    put16(ip + 10, 0);
    put16(ip + 10, checksum(ip, IPV4, 0));
    return ETHERNET + IPV4 + size;
}

static void receive(const u8 *packet, u32 size)
{
    if (size < VIRTIO_HEADER + ETHERNET + 28 || size > VIRTIO_HEADER + MAX_FRAME)
        return;
    u8 *sent = queue_send_buffer(&queues[TX]), *frame = sent + VIRTIO_HEADER;
    copy(sent, packet, size);
    u32 type = get16(frame + 12), answer = 0;
    if (type == 0x0806)
        answer = answer_arp(frame + ETHERNET);
    else if (type == 0x0800)
        answer = answer_ip(frame + ETHERNET, size - VIRTIO_HEADER - ETHERNET);
    if (!answer)
        return;
    copy(frame, frame + 6, 6);
    copy(frame + 6, mac, 6);
    for (u32 i = 0; i < VIRTIO_HEADER; i++)
        sent[i] = 0;
    queue_send(&queues[TX], VIRTIO_HEADER + answer);
}

bool net_poll(void)
{
    u32 id, length;
    u8 *buffer;
    bool any = false;
    while (device && (buffer = queue_take(&queues[RX], &id, &length))) {
        receive(buffer, length);
        queue_offer(&queues[RX], id);
        any = true;
    }
    if (any)
        queue_kick(&queues[RX]);
    return any;
}
