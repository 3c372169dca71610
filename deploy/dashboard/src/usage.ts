/** What instances used, from `usage` events (contract, section 10): spans, their sums, and how much of it is there. */
import { clock, el, facts, say } from "./dom";
import { VirtualTable, type Column } from "./table";
import { fields, number, text, type HostEvent } from "./wire";

type Known = number | null;

export interface Span {
  readonly state: string;
  readonly endedMs: number;
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
  readonly fromMs: number;
  readonly launches: number;
  readonly sleepingMs: number;
}

/** The span of a `usage` event; null: it is another event. */
export function spanOf(event: HostEvent): Span | null {
  const span = fields(event.detail["span"]);
  const totals = fields(event.detail["totals"]);
  if (event.kind !== "usage" || !span || !totals) return null;
  const launch = fields(event.detail["launch"]) ?? {};
  const snapshot = fields(event.detail["snapshot"]) ?? {};
  return {
    state: text(span["state"]),
    endedMs: number(span["ended_ms"]),
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
    era: `${event.host} ${event.lane} ${number(totals["from_ms"])}`,
    fromMs: number(totals["from_ms"]),
    launches: number(totals["launches"]),
    sleepingMs: number(totals["sleeping_ms"]),
  };
}

function known(value: unknown): Known {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

/** Sums over spans, without what is not known. */
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
    const isRunning = span.state === "running";
    const values = isRunning ? [span.durationMs, span.cpuUs, span.sentBytes, span.receivedBytes] : [span.durationMs, span.snapshotBytes];
    this.spans += 1;
    this.unknown += values.includes(null) ? 1 : 0;
    this.launches += isRunning ? 1 : 0;
    this.runningMs += isRunning ? (span.durationMs ?? 0) : 0;
    this.sleepingMs += isRunning ? 0 : (span.durationMs ?? 0);
    this.cpuUs += span.cpuUs ?? 0;
    this.vcpuMs += span.vcpuMs ?? 0;
    this.memoryMibS += span.memoryMibS ?? 0;
    this.sentBytes += span.sentBytes ?? 0;
    this.receivedBytes += span.receivedBytes ?? 0;
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
    return launches >= Math.max(...era.map((span) => span.launches)) && sleepingMs >= Math.max(...era.map((span) => span.sleepingMs));
  });
}

const shown = (value: Known, per = 1, digits = 0): string =>
  value === null ? "unknown" : (value / per).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
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
    ["Left out, spans with something unknown", sums.unknown ? shown(sums.unknown) : ""],
  ];
}

const ofLaunch = (span: Span, value: Known, ...how: readonly [number?, number?]): string => (span.state === "running" ? shown(value, ...how) : "");
const ofSleep = (span: Span, value: Known): string => (span.state === "sleeping" ? shown(value) : "");

export const spanColumns: readonly Column<Span>[] = [
  { title: "Ended", text: (span) => clock(span.endedMs) },
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

/** What a set of usage events adds up to, in words and in a table; `rows` makes the table's rows of the spans. */
export class UsageTable<T> {
  readonly element: HTMLElement;
  private readonly table: VirtualTable<T>;
  private readonly sums = el("div");
  private readonly since = el("p", { "aria-live": "polite" });
  private drawn = "";

  constructor(columns: readonly Column<T>[], private readonly rows: (spans: readonly (readonly [HostEvent, Span])[]) => readonly T[]) {
    this.table = new VirtualTable("Usage", columns, () => {});
    this.element = el("div", { class: "usage" }, el("h3", {}, "Used"), this.since, this.sums, this.table.element);
  }

  /** `isRead`: the stream has been read to its beginning. */
  show(events: Iterable<HostEvent>, isRead: boolean): void {
    const spans = [...events].flatMap((event) => {
      const span = spanOf(event);
      return span ? [[event, span] as const] : [];
    });
    const drawn = `${isRead} ${spans.length}`;
    if (drawn !== this.drawn) {
      const all = spans.map(([, span]) => span);
      say(this.since, since(all, isRead));
      this.sums.replaceChildren(...(all.length ? [facts(rowsOf(sumsOf(all)))] : []));
      this.drawn = drawn;
    }
    this.table.element.hidden = !spans.length;
    this.table.show(this.rows(spans));
  }

  close(): void {
    this.table.close();
  }
}

function since(spans: readonly Span[], isRead: boolean): string {
  if (!spans.length) return isRead ? "No launch and no sleep that ended is in the stream" : "Reading";
  const counted = Math.min(...spans.map((span) => span.fromMs || Infinity));
  if (isWhole(spans)) return `What ended since ${clock(counted)}, when its host began to count`;
  const from = clock(Math.min(...spans.map((span) => span.endedMs)));
  return `Partial: what ended since ${from}; ${isRead ? "the stream no longer has all of before" : "older events were not read yet"}`;
}
