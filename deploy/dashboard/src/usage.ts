/** What instances used, from `usage` events (contract, section 10): spans, their sums, and how much of it is there. */
import { clock, el, facts, say } from "./dom";
import { inOrder, VirtualTable, type Column } from "./table";
import { hostHref } from "./views";
import { fields, text, type HostEvent } from "./wire";

type Known = number | null;
/** How far the stream was read: `some` of it, and nothing reads now; `all` of it. */
export type Read = "reading" | "some" | "all";

export interface Span {
  readonly host: string;
  readonly lane: string;
  readonly state: string;
  readonly endedMs: Known;
  readonly launch: Known;
  readonly durationMs: Known;
  readonly cpuUs: Known;
  readonly vcpuMs: Known;
  readonly memoryMibS: Known;
  readonly memoryPeakBytes: Known;
  readonly sentBytes: Known;
  readonly receivedBytes: Known;
  readonly snapshotBytes: Known;
  readonly snapshotMibS: Known;
  /** The totals of which the span is the last, so far: what has the same text has one beginning. */
  readonly era: string;
  readonly fromMs: Known;
  readonly launches: Known;
  readonly sleepingMs: Known;
}

/** The span of a `usage` event; null: it is another event. */
export function spanOf(event: HostEvent): Span | null {
  const span = fields(event.detail["span"]);
  const totals = fields(event.detail["totals"]);
  if (event.kind !== "usage" || !span || !totals) return null;
  const launch = fields(event.detail["launch"]) ?? {};
  const snapshot = fields(event.detail["snapshot"]) ?? {};
  const fromMs = known(totals["from_ms"]);
  return {
    host: event.host,
    lane: event.lane,
    state: text(span["state"]),
    endedMs: known(span["ended_ms"]),
    launch: known(launch["launch"]),
    durationMs: known(span["duration_ms"]),
    cpuUs: known(launch["cpu_us"]),
    vcpuMs: known(launch["vcpu_ms"]),
    memoryMibS: known(launch["memory_mib_s"]),
    memoryPeakBytes: known(launch["memory_peak_bytes"]),
    sentBytes: known(launch["guest_sent_bytes"]),
    receivedBytes: known(launch["guest_received_bytes"]),
    snapshotBytes: known(snapshot["allocated_bytes"]),
    snapshotMibS: known(snapshot["snapshot_mib_s"]),
    era: `${event.host} ${event.lane} ${fromMs}`,
    fromMs,
    launches: known(totals["launches"]),
    sleepingMs: known(totals["sleeping_ms"]),
  };
}

/** What a host can count; what came as a larger integer than 2^53 is rounded. */
function known(value: unknown): Known {
  return typeof value === "number" && value >= 0 && value <= 2 ** 63 ? value : null;
}

/** Sums over spans, without what is not known; a span of another state than these two is in none. */
export class Sums {
  spans = 0;
  launches = 0;
  unknown = 0;
  runningMs = 0;
  sleepingMs = 0;
  cpuUs = 0;
  vcpuMs = 0;
  memoryMibS = 0;
  sentBytes = 0;
  receivedBytes = 0;
  snapshotMibS = 0;

  add(span: Span): void {
    this.spans += 1;
    if (span.state === "running") this.addLaunch(span);
    if (span.state === "sleeping") this.addSleep(span);
  }

  private addLaunch(span: Span): void {
    const values = [span.durationMs, span.cpuUs, span.vcpuMs, span.memoryMibS, span.sentBytes, span.receivedBytes];
    this.launches += 1;
    this.unknown += values.includes(null) ? 1 : 0;
    this.runningMs += span.durationMs ?? 0;
    this.cpuUs += span.cpuUs ?? 0;
    this.vcpuMs += span.vcpuMs ?? 0;
    this.memoryMibS += span.memoryMibS ?? 0;
    this.sentBytes += span.sentBytes ?? 0;
    this.receivedBytes += span.receivedBytes ?? 0;
  }

  private addSleep(span: Span): void {
    this.unknown += [span.durationMs, span.snapshotMibS].includes(null) ? 1 : 0;
    this.sleepingMs += span.durationMs ?? 0;
    this.snapshotMibS += span.snapshotMibS ?? 0;
  }
}

export function sumsOf(spans: Iterable<Span>): Sums {
  const sums = new Sums();
  for (const span of spans) sums.add(span);
  return sums;
}

export function groups<T>(items: Iterable<T>, by: (item: T) => string): Map<string, T[]> {
  const found = new Map<string, T[]>();
  for (const item of items) {
    const group = found.get(by(item));
    if (group) group.push(item);
    else found.set(by(item), [item]);
  }
  return found;
}

/** Whether these are all spans since the hosts began to count: each host counts them in its totals, too. */
export function isWhole(spans: readonly Span[]): boolean {
  const eras = groups(spans, (span) => span.era);
  return [...eras.values()].every((era) => {
    const { launches, sleepingMs } = sumsOf(era);
    return era.every((span) => launches >= (span.launches ?? Infinity) && sleepingMs >= (span.sleepingMs ?? Infinity));
  });
}

const format = (digits: number): Intl.NumberFormat => new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const FORMATS = { 0: format(0), 1: format(1), 3: format(3) }; // making one takes longer than using it
type Digits = keyof typeof FORMATS;

const shown = (value: Known, per = 1, digits: Digits = 0): string => (value === null ? "unknown" : FORMATS[digits].format(value / per));
const seconds = (ms: Known): string => shown(ms, 1000, 1);

export function rowsOf(sums: Sums): (readonly [string, string])[] {
  return [
    ["Launches that ended", shown(sums.launches)],
    ["Running, s", seconds(sums.runningMs)],
    ["Asleep, s", seconds(sums.sleepingMs)],
    ["vCPUs given, vCPU s", seconds(sums.vcpuMs)],
    ["CPU used, s", shown(sums.cpuUs, 1e6, 3)],
    ["Memory given, MiB s", shown(sums.memoryMibS)],
    ["Guest sent, bytes", shown(sums.sentBytes)],
    ["Guest received, bytes", shown(sums.receivedBytes)],
    ["Snapshots, MiB s", shown(sums.snapshotMibS)],
    ["Spans with unknown values, left out", sums.unknown ? shown(sums.unknown) : ""],
  ];
}

const ofLaunch = (span: Span, value: Known, ...how: readonly [number?, Digits?]): string => (span.state === "running" ? shown(value, ...how) : "");
const ofSleep = (span: Span, value: Known): string => (span.state === "sleeping" ? shown(value) : "");

export const spanColumns: readonly Column<Span>[] = [
  { title: "Ended", text: (span) => clock(span.endedMs ?? 0) },
  { title: "Host", text: (span) => span.host, href: (span) => hostHref(span.host) },
  { title: "State", text: (span) => span.state },
  { title: "For, s", isNumber: true, text: (span) => seconds(span.durationMs) },
  { title: "Launch", isNumber: true, text: (span) => ofLaunch(span, span.launch) },
  { title: "vCPU s", isNumber: true, text: (span) => ofLaunch(span, span.vcpuMs, 1000, 1) },
  { title: "CPU used, s", isNumber: true, text: (span) => ofLaunch(span, span.cpuUs, 1e6, 3) },
  { title: "Memory, MiB s", isNumber: true, text: (span) => ofLaunch(span, span.memoryMibS) },
  { title: "Memory peak, bytes", isNumber: true, text: (span) => ofLaunch(span, span.memoryPeakBytes) },
  { title: "Guest sent, bytes", isNumber: true, text: (span) => ofLaunch(span, span.sentBytes) },
  { title: "Guest received, bytes", isNumber: true, text: (span) => ofLaunch(span, span.receivedBytes) },
  { title: "Snapshot, bytes", isNumber: true, text: (span) => ofSleep(span, span.snapshotBytes) },
  { title: "Snapshot, MiB s", isNumber: true, text: (span) => ofSleep(span, span.snapshotMibS) },
];

/** What one instance used on one host. */
export class Used {
  private made: readonly string[] | null = null;

  constructor(readonly host: string, readonly lane: string, private readonly sums: Sums) {}

  /** Of `rowsOf`, made once, and only for a row that is in sight. */
  get texts(): readonly string[] {
    this.made ??= rowsOf(this.sums).map(([, text]) => text);
    return this.made;
  }
}

/** Per instance and host, in the order of their names. */
export function usedOf(spans: readonly Span[]): Used[] {
  const found = inOrder([...groups(spans, (span) => `${span.lane} ${span.host}`)], ([name]) => name, false);
  return found.flatMap(([, group]) => (group[0] ? [new Used(group[0].host, group[0].lane, sumsOf(group))] : []));
}

/** What a set of usage events adds up to, in words and in a table; `rowsOf` makes the table's rows of the spans. */
export class UsageTable<T> {
  readonly element: HTMLElement;
  private readonly table: VirtualTable<T>;
  private readonly sums = el("div");
  private readonly since = el("p", { "aria-live": "polite" });
  private rows: readonly T[] = [];

  constructor(columns: readonly Column<T>[], private readonly rowsOf: (spans: readonly Span[]) => readonly T[]) {
    this.table = new VirtualTable("Usage", columns, () => {});
    this.element = el("div", { class: "usage" }, el("h3", {}, "Used"), this.since, this.sums, this.table.element);
  }

  /** For when there is another event, or more was read: it goes through all of them. */
  show(events: Iterable<HostEvent>, read: Read): void {
    const spans = [...events].map(spanOf).filter((span) => span !== null);
    say(this.since, since(spans, read));
    this.sums.replaceChildren(...(spans.length ? [facts(rowsOf(sumsOf(spans)))] : []));
    this.table.element.hidden = !spans.length;
    this.rows = this.rowsOf(spans);
  }

  draw(): void {
    this.table.show(this.rows);
  }

  close(): void {
    this.table.close();
  }
}

const NOTHING: Readonly<Record<Read, string>> = {
  reading: "Reading",
  some: "No launch and no sleep that ended was read yet",
  all: "No launch and no sleep that ended is in the stream",
};

function since(spans: readonly Span[], read: Read): string {
  if (!spans.length) return NOTHING[read];
  if (read === "all" && isWhole(spans)) return `What ended since ${earliest(spans, (span) => span.fromMs)}, when counting began`;
  const why = read === "all" ? "the rest has left the stream, or this page forgot it: reload it" : "older events were not read yet";
  return `Partial: what ended since ${earliest(spans, (span) => span.endedMs)}; ${why}`;
}

function earliest(spans: readonly Span[], time: (span: Span) => Known): string {
  return clock(spans.reduce((least, span) => Math.min(least, time(span) || Infinity), Infinity)) || "unknown";
}
