// The guest's end of vsock: a handful of stream connections to the agent's port.
// Source: OASIS virtio 1.2, 5.10. All that is received is dealt with at once, so the only flow
// control needed is to say so; answers are smaller than any peer's buffer.
#include "mini.h"

enum { RX, TX, EVENT, HOST_CID = 2, STREAM = 1, MAX_CONNECTIONS = 16, OUR_BUFFER = 65536 };
enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };

struct __attribute__((packed)) header {
    u64 from_cid, to_cid;
    u32 from_port, to_port, length;
    u16 type, operation;
    u32 flags, buffer, forwarded;
};

u64 vsock_resets;
static u64 device;
static u32 cid;
static struct queue queues[3];
static u8 rx_buffers[QUEUE_SIZE][BUFFER_SIZE], tx_buffer[BUFFER_SIZE];
static u8 event_buffers[QUEUE_SIZE][BUFFER_SIZE];
static struct connection connections[MAX_CONNECTIONS];

void vsock_init(u64 base)
{
    if (device || !virtio_begin(base))
        return;
    device = base;
    cid = read32(base + CONFIG);
    virtio_queue(base, RX, &queues[RX], rx_buffers[0]);
    virtio_queue(base, TX, &queues[TX], tx_buffer);
    virtio_queue(base, EVENT, &queues[EVENT], event_buffers[0]);
    virtio_go(base);
    queue_offer_all(&queues[RX]);
    queue_offer_all(&queues[EVENT]);
}

static void send(u32 to_port, u32 from_port, u16 operation, u32 received, const void *data, u32 size)
{
    struct header *header = (struct header *)queue_send_buffer(&queues[TX]);
    *header = (struct header){
        .from_cid = cid, .to_cid = HOST_CID, .from_port = from_port, .to_port = to_port,
        .length = size, .type = STREAM, .operation = operation,
        .buffer = OUR_BUFFER, .forwarded = received,
    };
    copy(header + 1, data, size);
    queue_send(&queues[TX], sizeof *header + size);
}

void vsock_send(struct connection *to, const void *data, u32 length)
{
    send(to->peer_port, to->local_port, RW, to->received, data, length);
}

void vsock_close(struct connection *connection)
{
    send(connection->peer_port, connection->local_port, RST, connection->received, 0, 0);
    connection->open = false;
}

void vsock_each(void (*visit)(struct connection *))
{
    for (u32 i = 0; i < MAX_CONNECTIONS; i++)
        if (connections[i].open)
            visit(&connections[i]);
}

static struct connection *find(u32 peer_port, u32 local_port)
{
    for (u32 i = 0; i < MAX_CONNECTIONS; i++)
        if (connections[i].open && connections[i].peer_port == peer_port
            && connections[i].local_port == local_port)
            return &connections[i];
    return 0;
}

static bool accept(u32 peer_port, u32 local_port)
{
    if (!agent_accepts(local_port))
        return false;
    struct connection *connection = find(peer_port, local_port);
    for (u32 i = 0; !connection && i < MAX_CONNECTIONS; i++)
        if (!connections[i].open)
            connection = &connections[i];
    if (!connection)
        return false;
    connection->open = true;
    connection->peer_port = peer_port;
    connection->local_port = local_port;
    connection->received = connection->length = 0;
    connection->ack_due = false;
    send(peer_port, local_port, RESPONSE, 0, 0, 0);
    return true;
}

static void receive(struct header *header)
{
    struct connection *connection = find(header->from_port, header->to_port);
    if (header->operation == REQUEST) {
        if (!accept(header->from_port, header->to_port))
            send(header->from_port, header->to_port, RST, 0, 0, 0);
    } else if (!connection) {
        if (header->operation != RST)
            send(header->from_port, header->to_port, RST, 0, 0, 0);
    } else if (header->operation == RW && header->length <= BUFFER_SIZE - sizeof *header) {
        connection->received += header->length;
        agent_receive(connection, (u8 *)(header + 1), header->length);
    } else if (header->operation == CREDIT_REQUEST) {
        send(header->from_port, header->to_port, CREDIT_UPDATE, connection->received, 0, 0);
    } else if (header->operation == SHUTDOWN) {
        vsock_close(connection);
    } else if (header->operation == RST) {
        connection->open = false;
    }
}

// After a snapshot was loaded the host knows none of our connections any more.
static void transport_reset(void)
{
    for (u32 i = 0; i < MAX_CONNECTIONS; i++)
        connections[i].open = false;
    cid = read32(device + CONFIG);
    vsock_resets++;
}

static bool drain_queue(u32 which)
{
    u32 id, length;
    u8 *buffer;
    bool any = false;
    while ((buffer = queue_take(&queues[which], &id, &length))) {
        if (which == EVENT)
            transport_reset();
        else if (length >= sizeof(struct header))
            receive((struct header *)buffer);
        queue_offer(&queues[which], id);
        any = true;
    }
    if (any)
        queue_kick(&queues[which]);
    return any;
}

bool vsock_poll(void)
{
    if (!device)
        return false;
    bool event = drain_queue(EVENT); // first: what comes after a reset is new
    return drain_queue(RX) || event;
}
