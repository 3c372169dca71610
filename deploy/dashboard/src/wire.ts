/**
 * What arrives, as typed values. Everything comes from others and is taken field by field: a missing
 * or mistyped field is empty, never an exception in a view. Host, tenant and instance are those of the
 * subject, which the server's accounts guard; what a body says about them is not read.
 */
import { decode } from "@msgpack/msgpack";

const LIMITS = { maxStrLength: 1 << 16, maxBinLength: 1 << 20, maxArrayLength: 1 << 16, maxMapLength: 1 << 16 };
const DEPTH_MAX = 32;
const TEXT_MAX = 4096;
const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

export type Fields = { readonly [name: string]: unknown };

export interface HostValue {
  readonly host: string;
  readonly status: string;
  readonly degradedBy: readonly string[];
  readonly hostname: string;
  readonly version: string;
  readonly vmmVersions: readonly string[];
  readonly bootId: string;
  readonly journalId: string;
  readonly workerId: string;
  readonly atMs: number;
  readonly leaseUntilMs: number;
  readonly vcpus: number;
  readonly vcpusUsed: number;
  readonly memMib: number;
  readonly memFreeMib: number;
  readonly diskFreeMib: number;
  readonly running: number;
  readonly warmVmms: number;
}

export interface InstanceValue {
  readonly status: string;
  readonly sinceMs: number;
  readonly launch: number;
  readonly revision: string;
  readonly commandId: string;
  readonly reason: string;
  readonly journalId: string;
  readonly seq: number;
  readonly atMs: number;
}

export interface HostEvent {
  /** Host and ID: no host's event can pass for another's. */
  readonly key: string;
  readonly host: string;
  readonly lane: string;
  readonly kind: string;
  readonly journalId: string;
  readonly seq: number;
  readonly atMs: number;
  readonly from: string;
  readonly to: string;
  readonly commandId: string;
  readonly reason: string;
  readonly traceparent: string;
  readonly detail: Fields;
}

/** The map in these bytes; null if they are something else, or nested deeper than 32. */
export function unpack(data: Uint8Array): Fields | null {
  try {
    const value = decode(data, LIMITS);
    return isWithin(value, DEPTH_MAX) ? fields(value) : null;
  } catch {
    return null;
  }
}

/** The decoder has no bound of depth, and what walks a value, e.g. JSON.stringify, runs out of stack. */
function isWithin(value: unknown, depth: number): boolean {
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) return true;
  return depth > 0 && Object.values(value).every((each) => isWithin(each, depth - 1));
}

export function fields(value: unknown): Fields | null {
  const isMap = typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Uint8Array);
  return isMap ? (value as Fields) : null;
}

/** Control characters, and those that turn the direction of what follows, are made visible. */
export function text(value: unknown): string {
  return typeof value === "string" ? value.slice(0, TEXT_MAX).replace(HIDDEN, "\u{fffd}") : "";
}

export function number(value: unknown): number {
  return typeof value === "number" && Number.isFinite(value) ? value : 0;
}

export function list(value: unknown): readonly unknown[] {
  return Array.isArray(value) ? value : [];
}

export function hostValue(host: string, map: Fields): HostValue {
  const capacity = fields(map["capacity"]) ?? {};
  const versions = list(map["vmm_versions"]).map((each) => fields(each) ?? {});
  return {
    host,
    status: text(map["status"]),
    degradedBy: list(map["degraded_by"]).map(text).filter(Boolean),
    hostname: text(map["hostname"]),
    version: text(map["version"]),
    vmmVersions: versions.map((each) => text(each["version"])).filter(Boolean),
    bootId: text(map["boot_id"]),
    journalId: text(map["journal_id"]),
    workerId: text(map["worker_id"]),
    atMs: number(map["at_ms"]),
    leaseUntilMs: number(map["lease_until_ms"]),
    vcpus: number(capacity["vcpus"]),
    vcpusUsed: number(capacity["vcpus_used"]),
    memMib: number(capacity["mem_mib"]),
    memFreeMib: number(capacity["mem_free_mib"]),
    diskFreeMib: number(capacity["disk_free_mib"]),
    running: number(capacity["instances"]),
    warmVmms: number(map["warm_vmms"]),
  };
}

export function instanceValue(map: Fields): InstanceValue {
  return {
    status: text(map["status"]),
    sinceMs: number(map["since_ms"]),
    launch: number(map["launch"]),
    revision: text(map["revision"]),
    commandId: text(map["command_id"]),
    reason: text(map["reason"]),
    journalId: text(map["journal_id"]),
    seq: number(map["seq"]),
    atMs: number(map["at_ms"]),
  };
}

/**
 * The event in a message of `<root>.<host>.evt.<lane>.<kind>`; null if it is none. One from the future, by
 * this page's clock, happened now: it would stay the newest, and push out all that follow.
 */
export function hostEvent(root: string, subject: string, data: Uint8Array): HostEvent | null {
  const [host, evt, ...lane] = subject.slice(root.length + 1).split(".");
  const kind = lane.pop();
  const map = unpack(data);
  if (!subject.startsWith(`${root}.`) || !host || evt !== "evt" || !kind || !lane.length || !map) return null;
  return {
    key: `${host} ${text(map["id"])}`,
    host,
    lane: lane.join("."),
    kind,
    journalId: text(map["journal_id"]),
    seq: number(map["seq"]),
    atMs: Math.min(number(map["at_ms"]), Date.now()),
    from: text(map["from"]),
    to: text(map["to"]),
    commandId: text(map["command_id"]),
    reason: text(map["reason"]),
    traceparent: text(map["traceparent"]),
    detail: fields(map["detail"]) ?? {},
  };
}
