/**
 * Keeps a Fleet up to date: subscribes, reads, and reads again after each reconnect. A subscription that
 * the server ended is made again before the next read.
 * `Link` says how far what is shown can be trusted.
 */
import type { Msg, Subscription } from "@nats-io/nats-core";
import { Bus, BusFailure, each, type Access, type Kept } from "./bus";
import { Fleet } from "./fleet";
import { hostEvent, type HostEvent } from "./wire";

const EVENTS_READ = 300;
const RETRY_MS = 2000;
/** A mirror hears its original's heartbeats each second. */
const SILENT_MS = 10_000;
const MIRROR_CHECK_MS = 2000;

const SILENT = "The mirror does not hear from the cell's servers";

export interface Link {
  readonly state: "live" | "reading" | "lost";
  readonly text: string;
}

export class Session {
  link: Link = { state: "reading", text: "Reading the state" };
  /** When everything was read, or the last message since came; 0: never. */
  currentMs = 0;
  private reads = 0;
  private subscriptions: Subscription[] = [];
  /** Why a subscription has ended; empty: all go on. */
  private ended = "";

  private constructor(readonly bus: Bus, readonly fleet: Fleet) {}

  /** Raises what the connection or the first read raised: nothing is shown then. */
  static async open(access: Access, fleet: Fleet): Promise<Session> {
    const session = new Session(await Bus.open(access), fleet);
    try {
      await session.read();
    } catch (error) {
      await session.close();
      throw error;
    }
    void session.follow();
    void session.watchMirror();
    return session;
  }

  async close(): Promise<void> {
    this.reads += 1;
    await this.bus.nats.close();
  }

  /** Makes both subscriptions, in place of those that there are. */
  private subscribe(): void {
    const { bus, fleet } = this;
    this.subscriptions.forEach((each) => each.unsubscribe());
    this.ended = "";
    const ended = (why: string): void => {
      this.ended = why;
      this.lose(why);
      this.readSoon();
    };
    const events = bus.subscribe(`${bus.root}.*.evt.>`, (message) => {
      this.heard();
      const event = hostEvent(bus.root, message.subject, message.data);
      if (event) fleet.event(event);
    }, ended);
    const state = bus.subscribe(`$KV.${bus.bucket}.>`, (message) => {
      this.heard();
      const key = this.key(message.subject);
      if (fleet.feed(key, valueOf(message))) void this.readBack(key);
    }, ended);
    this.subscriptions = [events, state];
  }

  /** Reads everything, again until it worked; a later call replaces it. */
  private async read(): Promise<void> {
    const turn = ++this.reads;
    const { bus, fleet } = this;
    const stream = `KV_${bus.bucket}`;
    if (this.ended || !this.subscriptions.length) this.subscribe();
    await bus.nats.flush(); // the server has answered the subscriptions before
    if (this.ended) throw new BusFailure(this.ended);
    if (((await bus.mirrorSilentMs(stream)) ?? 0) > SILENT_MS) throw new BusFailure(SILENT);
    fleet.beginRead();
    const subjects = await bus.subjects(stream, `$KV.${bus.bucket}.>`);
    let done = 0;
    await each(subjects.keys(), async (subject) => {
      const kept = await bus.last(stream, subject);
      if (turn !== this.reads) return;
      fleet.read(this.key(subject), kept && valueOfKept(kept));
      done += 1;
      if (done % 100 === 0) this.link = { state: "reading", text: `Reading the state: ${done} of ${subjects.size}` };
    });
    if (turn !== this.reads) return;
    fleet.endRead();
    const events = await this.newestEvents();
    if (turn !== this.reads) return;
    fleet.readEvents(events);
    this.currentMs = Date.now();
    this.link = { state: "live", text: "Live" };
  }

  /** Says when a mirror hears nothing of its original: this connection alone does not show it. */
  private async watchMirror(): Promise<void> {
    const { bus } = this;
    const stream = `KV_${bus.bucket}`;
    while (!bus.nats.isClosed()) {
      await new Promise((done) => setTimeout(done, MIRROR_CHECK_MS));
      if (this.link.state !== "live") continue;
      try {
        const silentMs = await bus.mirrorSilentMs(stream);
        if (silentMs === null) return;
        if (silentMs <= SILENT_MS) continue;
      } catch {
        continue; // the connection's own loss is seen by follow()
      }
      this.lose(SILENT);
      this.readSoon();
    }
  }

  private heard(): void {
    if (this.link.state === "live") this.currentMs = Date.now();
  }

  /** Of the stream, oldest first. */
  private async newestEvents(): Promise<HostEvent[]> {
    const { bus } = this;
    const found = new Map<number, HostEvent>();
    const { first, last } = await bus.bounds(bus.events);
    const from = Math.max(first, last - EVENTS_READ + 1, 1);
    const wanted = Array.from({ length: Math.max(0, last - from + 1) }, (_, at) => from + at);
    await each(wanted, async (seq) => {
      const kept = await bus.at(bus.events, seq);
      const event = kept && hostEvent(bus.root, kept.subject, kept.data);
      if (event) found.set(seq, event);
    });
    return wanted.flatMap((seq) => found.get(seq) ?? []);
  }

  private async readBack(key: string): Promise<void> {
    const { bus, fleet } = this;
    try {
      const kept = await bus.last(`KV_${bus.bucket}`, `$KV.${bus.bucket}.${key}`);
      fleet.feed(key, kept && valueOfKept(kept));
    } catch {
      this.lose("Could not read a value back");
      this.readSoon();
    }
  }

  private async follow(): Promise<void> {
    for await (const status of this.bus.nats.status()) {
      if (status.type === "disconnect" || status.type === "staleConnection") {
        this.reads += 1;
        this.lose("Connection lost, reconnecting");
      }
      if (status.type === "reconnect") this.readSoon(0);
      if (status.type === "slowConsumer") this.readSoon(0);
    }
  }

  private readSoon(afterMs = RETRY_MS): void {
    this.fleet.interrupt();
    const turn = ++this.reads;
    setTimeout(() => {
      if (turn !== this.reads || this.bus.nats.isClosed()) return;
      this.link = { state: "reading", text: "Reading the state" };
      this.read().catch((error: unknown) => {
        if (turn + 1 !== this.reads) return;
        this.lose(error instanceof Error ? error.message : String(error));
        this.readSoon();
      });
    }, afterMs);
  }

  private lose(text: string): void {
    this.fleet.interrupt();
    this.link = { state: "lost", text };
  }

  private key(subject: string): string {
    return subject.slice(`$KV.${this.bus.bucket}.`.length);
  }
}

function valueOf(message: Msg): Uint8Array | null {
  return message.headers?.get("KV-Operation") ? null : message.data;
}

function valueOfKept(kept: Kept): Uint8Array | null {
  return kept.header("KV-Operation") ? null : kept.data;
}
