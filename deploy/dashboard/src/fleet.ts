/**
 * The fleet as far as it is known: no NATS, no DOM. Feed and snapshot meet here.
 *
 * The caller subscribes first, then calls `beginRead`, reads every key of the bucket, and calls
 * `endRead`. A key that the feed has mentioned since `beginRead` keeps what the feed said: the messages
 * of a key come in order from its one writer, so the feed is never behind what was read. An event that
 * the state already reflects (the same journal, a `seq` not above) changes no status.
 *
 * The events have no gap: after an interruption, what came before it stays only if the newest of the
 * stream, read again, reach back to it.
 */
import { hostValue, instanceValue, unpack, type HostEvent, type HostValue, type InstanceValue } from "./wire";

export const EVENTS_MAX = 2000;
export const OUTCOMES_MAX = 500;
const TRANSITIONS = new Set(["starting", "stopping", "draining", "snapshotting", "waking", "destroying"]);

export interface Host {
  readonly id: string;
  value: HostValue;
  /** When this page last saw the lease renewed, by its own clock; 0: only read, not seen. */
  renewedMs: number;
}

export interface Instance extends Readonly<{ key: string; host: string; lane: string; tenant: string; pool: string; id: string; words: string }> {
  value: InstanceValue;
}

export class Fleet {
  readonly hosts = new Map<string, Host>();
  readonly instances = new Map<string, Instance>();
  readonly networks = new Map<string, string>();
  /** How often the feed was interrupted, and the interruption up to which the events were read again. */
  interruptions = 0;
  healed = 0;
  /** Newest last. */
  events: HostEvent[] = [];
  outcomes: HostEvent[] = [];
  /** Grows with each change of which instances there are. */
  population = 0;
  received = 0;
  /** Each is told of each event, once, also while nothing is drawn. */
  readonly followers = new Set<(event: HostEvent) => void>();
  /** After which interruption each of `events` and of `outcomes`, which last longer, came. */
  private readonly seen = new Map<string, number>();
  private readonly finished = new Map<string, number>();
  private mentioned = new Set<string>();
  private found: Set<string> | null = null;

  constructor(private readonly now: () => number = Date.now) {}

  beginRead(): void {
    this.mentioned = new Set();
    this.found = new Set();
  }

  /** A key's value as it is in the bucket; null: it was deleted meanwhile. */
  read(key: string, data: Uint8Array | null): void {
    if (data) this.found?.add(key);
    if (!this.mentioned.has(key)) this.put(key, data, false);
  }

  /** What neither the bucket nor the feed has any more is gone. */
  endRead(): void {
    const found = this.found ?? new Set<string>();
    this.found = null;
    const known = [...this.hosts.keys()].map((id) => `${id}.host`);
    for (const key of [...known, ...this.instances.keys(), ...this.networks.keys()]) {
      if (!found.has(key) && !this.mentioned.has(key)) this.put(key, null, false);
    }
  }

  /**
   * A write of a key, as it happens; null: a deletion. Returns true if the value is another writer's
   * than the one before: it may have been refused, and must be read back.
   */
  feed(key: string, data: Uint8Array | null): boolean {
    if (this.found) this.mentioned.add(key);
    const before = this.writer(key);
    this.put(key, data, true);
    const after = this.writer(key);
    return before !== "" && after !== "" && before !== after;
  }

  /** Takes an event, once. Returns false if it was known. */
  event(event: HostEvent): boolean {
    if (this.seen.has(event.key) || this.finished.has(event.key)) return false;
    this.received += 1;
    this.keep(this.events, this.seen, event, EVENTS_MAX);
    if (event.kind === "command") this.keep(this.outcomes, this.finished, event, OUTCOMES_MAX);
    this.followers.forEach((follow) => follow(event));
    if (event.kind !== "status") return true;
    const known = this.instances.get(`${event.host}.${event.lane}`);
    const isNewer = known && event.journalId === known.value.journalId && event.seq > known.value.seq;
    if (isNewer && event.to) {
      const { to, reason, commandId, journalId, seq, atMs } = event;
      known.value = { ...known.value, status: to, sinceMs: atMs, reason, commandId, journalId, seq, atMs };
    }
    return true;
  }

  /** From now on events may be missing, until they are read again. */
  interrupt(): void {
    this.interruptions += 1;
  }

  /** Takes the newest events of the stream, oldest first, and forgets what they do not reach back to. */
  readEvents(events: readonly HostEvent[]): void {
    const [oldest] = events;
    const came = oldest ? (this.seen.get(oldest.key) ?? Infinity) : 0;
    if (came > this.healed) {
      this.events = this.since(this.events, this.seen);
      this.outcomes = this.since(this.outcomes, this.finished);
    }
    events.forEach((event) => this.event(event));
    this.healed = this.interruptions;
  }

  /** Whether the host's lease is valid, by the clock of this page, which may differ from the host's. */
  isLive(host: Host): boolean {
    if (!host.value.leaseUntilMs) return false;
    const until = host.renewedMs ? host.renewedMs + host.value.leaseUntilMs - host.value.atMs : host.value.leaseUntilMs;
    return this.now() < until;
  }

  stateOf(host: Host): string {
    return this.isLive(host) ? host.value.status : "stale";
  }

  inTransition(): Instance[] {
    return [...this.instances.values()].filter((each) => TRANSITIONS.has(each.value.status));
  }

  /** Puts an event where its time is, and its key to the others; the oldest are forgotten. */
  private keep(events: HostEvent[], keys: Map<string, number>, event: HostEvent, most: number): void {
    let at = events.length;
    while (at > 0 && (events[at - 1]?.atMs ?? 0) > event.atMs) at -= 1;
    events.splice(at, 0, event);
    keys.set(event.key, this.interruptions);
    if (events.length > most) events.splice(0, events.length - most).forEach((old) => keys.delete(old.key));
  }

  /** Those that came after the last interruption; the keys of the others are forgotten. */
  private since(events: readonly HostEvent[], keys: Map<string, number>): HostEvent[] {
    return events.filter((event) => keys.get(event.key) === this.interruptions || !keys.delete(event.key));
  }

  private put(key: string, data: Uint8Array | null, isLive: boolean): void {
    const [host, kind, ...ids] = key.split(".");
    if (!host || !kind) return;
    const map = data && unpack(data);
    if (kind === "host" && !ids.length) this.putHost(host, map ? hostValue(host, map) : null, isLive);
    if (kind === "network" && ids[0]) {
      if (map) this.networks.set(key, ids[0]);
      else this.networks.delete(key);
    }
    const [tenant, pool, id] = ids;
    if (kind !== "instance" || !tenant || !pool || !id) return;
    const known = this.instances.get(key);
    if (!map) {
      if (this.instances.delete(key)) this.population += 1;
    } else if (known) {
      const value = instanceValue(map);
      const isOlder = value.journalId === known.value.journalId && value.seq < known.value.seq;
      if (!isOlder) known.value = value;
    } else {
      const words = `${host} ${tenant}/${pool}/${id}`.toLowerCase();
      this.instances.set(key, { key, host, lane: `instance.${tenant}.${pool}.${id}`, tenant, pool, id, words, value: instanceValue(map) });
      this.population += 1;
    }
  }

  private putHost(id: string, value: HostValue | null, isLive: boolean): void {
    const known = this.hosts.get(id);
    if (!value) this.hosts.delete(id);
    else if (known) {
      if (isLive || value.atMs !== known.value.atMs) known.renewedMs = isLive ? this.now() : 0;
      known.value = value;
    } else this.hosts.set(id, { id, value, renewedMs: isLive ? this.now() : 0 });
  }

  private writer(key: string): string {
    const host = key.endsWith(".host") ? this.hosts.get(key.slice(0, -".host".length)) : undefined;
    return host ? host.value.workerId : (this.instances.get(key)?.value.journalId ?? "");
  }
}
