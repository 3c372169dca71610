/** One host, one instance, one command, one dead letter. */
import { BusFailure, type Bus, type Kept } from "./bus";
import { clock, el, facts, gib, OUTSIDE, say, tone } from "./dom";
import { EVENTS_MAX, type Fleet } from "./fleet";
import { History } from "./history";
import { repeat } from "./repeat";
import { VirtualTable, type Column } from "./table";
import { traceHref, traceId } from "./trace";
import { rowsOf, spanColumns, Sums, usedOf, UsageTable, type Span, type Used } from "./usage";
import { eventColumns, hostHref, laneHref, laneText, type View } from "./views";
import { fields, list, number, text, unpack, type Fields, type HostEvent } from "./wire";

const SHOWN_BYTES = 4096;
const ANSWERS = "What the worker answers";
const USAGE_MAX = 10_000;
const RETRY_MS = 2000;
const FORGOTTEN = "This page has forgotten older events that came while it was open: reload it";

type Usage = Pick<UsageTable<unknown>, "element" | "show" | "draw" | "close">;
export const tenantHref = (tenant: string): string => `#/tenant/${encodeURIComponent(tenant)}`;

type Live = readonly [Map<string, HostEvent>, Map<string, HostEvent>];

/**
 * Kept and live events of one subject, with a button for older ones. After an interruption it begins again
 * with the newest that are kept, so there is no gap.
 */
class HistoryTable implements View {
  readonly element: HTMLElement;
  private readonly table = new VirtualTable<HostEvent>("History", eventColumns, () => {});
  private readonly more = el("button", { type: "button" }, "Older");
  private readonly note = el("p", { class: "faint", "aria-live": "polite" });
  private history: History;
  private reading: History | null = null;
  private healed: number;
  /** What came since the page was opened, and what the fleet had then; `usage` events, and the others. */
  private live: Live = [new Map(), new Map()];
  /** What came since the history that is to take its place was begun. */
  private next: Live | null = null;
  private retryAtMs = 0;
  private kept = 0;
  private hasForgotten = false;
  private newest: readonly HostEvent[] = [];
  private summed = "";

  /** With `usage`, what its `usage` events add up to is above the table. */
  constructor(
    private readonly bus: Bus,
    private readonly filter: string,
    private readonly fleet: Fleet,
    private readonly matches: (event: HostEvent) => boolean,
    private readonly usage: Usage | null = null,
  ) {
    this.history = new History(bus, filter);
    this.healed = fleet.healed;
    this.more.addEventListener("click", () => void this.read());
    const above = usage ? [usage.element] : [];
    this.element = el("div", {}, ...above, el("h3", {}, "History"), this.table.element, el("div", { class: "filters" }, this.more, this.note));
    fleet.events.forEach(this.keep);
    fleet.followers.add(this.keep);
    void this.read();
  }

  draw(): void {
    if (this.healed !== this.fleet.healed && Date.now() >= this.retryAtMs) {
      this.healed = this.fleet.healed;
      this.next = [new Map(), new Map()];
      this.fleet.events.forEach(this.keep);
      void this.read(new History(this.bus, this.filter));
    }
    const { events, isComplete } = this.history;
    const read = isComplete ? "all" : this.reading ? "reading" : "some";
    const summed = `${this.kept} ${events.size} ${read}`;
    if (summed !== this.summed) {
      this.newest = newestOf(events.values(), ...this.live.map((each) => each.values()));
      this.usage?.show(this.newest, read);
    }
    this.summed = summed;
    this.table.show(this.newest);
    this.usage?.draw();
    if (!this.reading && this.hasForgotten) say(this.note, FORGOTTEN);
  }

  close(): void {
    this.fleet.followers.delete(this.keep);
    this.table.close();
    this.usage?.close();
  }

  private readonly keep = (event: HostEvent): void => {
    if (!this.matches(event)) return;
    this.kept += 1;
    for (const [usage, others] of this.next ? [this.live, this.next] : [this.live]) {
      const [kept, most] = event.kind === "usage" ? [usage, USAGE_MAX] as const : [others, EVENTS_MAX] as const;
      kept.set(event.key, event);
      const [oldest = ""] = kept.keys();
      if (kept.size > most) this.hasForgotten = kept.delete(oldest);
    }
  };

  /**
   * Reads some more of `history`; another one than before takes its place, and that of what came before.
   * If that fails, what there was stays, and it is tried again.
   */
  private async read(history = this.history): Promise<void> {
    this.reading = history;
    this.more.disabled = true;
    say(this.note, "Reading");
    let said = "";
    let hasFailed = false;
    try {
      await history.older();
      said = history.isComplete ? "That is all that is kept" : "";
    } catch (error) {
      said = reasonOf(error);
      hasFailed = true;
    }
    if (this.reading !== history) return;
    this.reading = null;
    if (history !== this.history && hasFailed) {
      this.healed = -1;
      this.retryAtMs = Date.now() + RETRY_MS;
    } else if (history !== this.history) this.beginWith(history);
    this.more.disabled = this.history.isComplete;
    say(this.note, said);
    this.draw();
  }

  private beginWith(history: History): void {
    this.history = history;
    this.live = this.next ?? [new Map(), new Map()];
    this.next = null;
    this.hasForgotten = this.live.some((each, at) => each.size >= (at ? EVENTS_MAX : USAGE_MAX));
    this.summed = "";
  }
}

function newestOf(...lists: readonly Iterable<HostEvent>[]): HostEvent[] {
  const found = new Map<string, HostEvent>();
  for (const list of lists) for (const event of list) found.set(event.key, event);
  return [...found.values()].sort((a, b) => b.atMs - a.atMs || b.seq - a.seq);
}

/** What a question was answered; a final answer is not asked for again. */
interface Answer {
  readonly nodes: readonly Node[];
  readonly isFinal: boolean;
}

/** A heading, facts that are drawn again, what the host answers to a question, and a history. */
class DetailView implements View {
  readonly element: HTMLElement;
  private readonly now = el("div");
  private readonly answer = el("div");
  private drawn = "";
  private endAsking = (): void => {};

  constructor(title: string, private readonly rows: () => readonly (readonly [string, string])[], private readonly history: HistoryTable | null, links: readonly Node[] = []) {
    this.element = el("div", {}, el("h2", {}, title), ...links, this.now, this.answer, ...(history ? [history.element] : []));
  }

  /** Shows what `ask` resolves to below the facts, and asks again until the answer is final. */
  with(ask: () => Promise<Answer>): this {
    this.endAsking = repeat(async () => {
      const { nodes, isFinal } = await ask().catch((error: unknown) => open(el("p", { class: "faint" }, reasonOf(error))));
      const shown = el("div", {}, ...nodes);
      if (!shown.isEqualNode(this.answer)) this.answer.replaceChildren(...shown.childNodes); // else a focused link would lose it
      return isFinal;
    });
    return this;
  }

  draw(): void {
    const rows = this.rows();
    const drawn = JSON.stringify(rows);
    if (drawn !== this.drawn && rows.length) this.now.replaceChildren(facts(rows));
    this.drawn = drawn;
    this.history?.draw();
  }

  close(): void {
    this.endAsking();
    this.history?.close();
  }
}

/** An answer that may change. */
function open(...nodes: readonly Node[]): Answer {
  return { nodes, isFinal: false };
}

export function hostDetail(fleet: Fleet, bus: Bus, id: string): View {
  const rows = (): (readonly [string, string])[] => {
    const host = fleet.hosts.get(id);
    if (!host) return [["State", "This host has no lease in the state bucket"]];
    const { value } = host;
    return [
      ["State", fleet.stateOf(host)],
      ["Degraded by", value.degradedBy.join(", ")],
      ["Lease renewed", clock(value.atMs)],
      ["Hostname", value.hostname],
      ["hostd", value.version],
      ["Firecracker", value.vmmVersions.join(", ")],
      ["vCPUs used", `${value.vcpusUsed} of ${value.vcpus}`],
      ["Memory free", `${gib(value.memFreeMib)} of ${gib(value.memMib)} GiB`],
      ["Disk free", `${gib(value.diskFreeMib)} GiB`],
      ["Warm VMMs", `${value.warmVmms}`],
      ["Boot ID", value.bootId],
      ["Journal ID", value.journalId],
    ];
  };
  const history = new HistoryTable(bus, `${bus.root}.${id}.evt.>`, fleet, (event) => event.host === id);
  const ask = async (): Promise<Answer> => {
    const answer = await bus.ask(id, "status");
    const counts = Object.entries(fields(answer["instances"]) ?? {}).map(([status, count]) => [status, `${number(count)}`] as const);
    return open(el("h3", {}, ANSWERS), facts([["Unfinished commands", `${number(answer["unfinished"])}`], ...counts]));
  };
  return new DetailView(`Host ${id}`, rows, history).with(ask);
}

export function instanceDetail(fleet: Fleet, bus: Bus, host: string, ids: readonly string[]): View {
  const [tenant = "", pool = "", id = ""] = ids;
  const lane = `instance.${ids.join(".")}`;
  const rows = (): (readonly [string, string])[] => {
    const value = fleet.instances.get(`${host}.${lane}`)?.value;
    if (!value) return [["Status", "The host has no such instance now"]];
    return [
      ["Status", value.status],
      ["Since", clock(value.sinceMs)],
      ["Reason", value.reason],
      ["Launch", `${value.launch}`],
      ["Revision", value.revision],
      ["Last command", value.commandId],
    ];
  };
  const usage = new UsageTable<Span>(spanColumns, (spans) => spans);
  const history = new HistoryTable(bus, `${bus.root}.*.evt.${lane}.*`, fleet, (event) => event.lane === lane, usage);
  const ask = async (): Promise<Answer> => {
    const answer = await bus.ask(host, "describe", { tenant_id: tenant, pool_id: pool, instance_id: id });
    const found = facts([
      ["vCPUs", plain(answer["vcpus"])],
      ["Memory, MiB", plain(answer["mem_mib"])],
      ["pid", plain(answer["pid"])],
      ["Jail", plain(answer["jail_id"])],
      ["Snapshot", plain(answer["snapshot"])],
      ["Hung since", clock(number(answer["hung_since_ms"]))],
      ["Last end", text(fields(answer["last_end"])?.["text"])],
    ]);
    return open(el("h3", {}, ANSWERS), found);
  };
  const link = el("p", {}, "on host ", el("a", { href: hostHref(host) }, host), ", of tenant ", el("a", { href: tenantHref(tenant) }, tenant));
  return new DetailView(`Instance ${ids.join("/")}`, rows, history, [link]).with(ask);
}

/** What a tenant's instances used, on all hosts, those that are gone too. */
export function tenantDetail(fleet: Fleet, bus: Bus, tenant: string): View {
  const columns: Column<Used>[] = [
    { title: "Instance", text: (row) => laneText(row.lane), href: (row) => laneHref(row.host, row.lane) },
    { title: "Host", text: (row) => row.host, href: (row) => hostHref(row.host) },
    ...rowsOf(new Sums()).map(([title], at) => ({ title, isNumber: true, text: (row: Used) => row.texts[at] ?? "" })),
  ];
  const usage = new UsageTable<Used>(columns, usedOf);
  const rows = (): (readonly [string, string])[] => {
    const now = [...fleet.instances.values()].filter((each) => each.tenant === tenant);
    return [["Instances now", `${now.length}`], ["Of these running", `${now.filter((each) => each.value.status === "running").length}`]];
  };
  const matches = (event: HostEvent): boolean => event.kind === "usage" && event.lane.startsWith(`instance.${tenant}.`);
  const history = new HistoryTable(bus, `${bus.root}.*.evt.instance.${tenant}.*.*.usage`, fleet, matches, usage);
  return new DetailView(`Tenant ${tenant}`, rows, history);
}

export function commandDetail(bus: Bus, host: string, id: string): View {
  const ask = async (): Promise<Answer> => {
    const answer = await bus.ask(host, "result", { id });
    const state = text(answer["state"]);
    const reply = fields(answer["reply"]) ?? {};
    const nodes = [facts([["State", state], ...replyRows(reply)]), ...traceOf(reply), ...stepsOf(reply)];
    return { nodes, isFinal: state === "done" };
  };
  const link = el("p", {}, "on host ", el("a", { href: hostHref(host) }, host));
  return new DetailView(`Command ${id}`, () => [], null, [link]).with(ask);
}

function replyRows(reply: Fields): (readonly [string, string])[] {
  const response = fields(reply["response"]);
  return [
    ["Code", text(reply["code"])],
    ["Message", text(fields(response?.["Error"])?.["message"])],
    ["Status of the instance", text(reply["status"])],
    ["Changed", plain(reply["changed"])],
    ["Attempts", plain(reply["attempts"])],
    ["Received", clock(number(reply["received_at_ms"]))],
    ["Finished", clock(number(reply["finished_at_ms"]))],
    ["Left behind", list(reply["left_behind"]).map(text).join(", ")],
    ["Detail", reply["detail"] ? JSON.stringify(reply["detail"], plainly) : ""],
  ];
}

function traceOf(reply: Fields): Node[] {
  const traceparent = text(reply["traceparent"]);
  const href = traceHref(traceparent);
  return href ? [el("p", {}, "in trace ", el("a", { ...OUTSIDE, href }, traceId(traceparent)))] : [];
}

function stepsOf(reply: Fields): Node[] {
  const rows = list(reply["steps"]).map((each) => {
    const step = fields(each) ?? {};
    const outcome = text(step["outcome"]);
    return el("tr", {}, el("td", {}, text(step["name"])), el("td", { class: "number" }, (number(step["took_us"]) / 1000).toFixed(1)), el("td", { class: tone(outcome) }, outcome));
  });
  if (!rows.length) return [];
  const head = el("tr", {}, ...["Step", "ms", "Outcome"].map((title) => el("th", { scope: "col" }, title)));
  return [el("table", { "aria-label": "Steps" }, el("thead", {}, head), el("tbody", {}, ...rows))];
}

export function deadLetterDetail(bus: Bus, seq: number): View {
  const ask = async (): Promise<Answer> => {
    const kept = await bus.at(bus.deadLetters, seq);
    return { nodes: kept ? letter(kept) : [el("p", {}, "It is not kept any more")], isFinal: true };
  };
  return new DetailView(`Dead letter ${seq}`, () => [], null).with(ask);
}

function letter(kept: Kept): Node[] {
  const hex = [...kept.data.subarray(0, SHOWN_BYTES)].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const map = unpack(kept.data);
  const rows: (readonly [string, string])[] = [
    ["Time", clock(kept.atMs)],
    ["Subject", kept.subject],
    ["Reason", text(kept.header("Hostd-Reason"))],
    ["ID", text(kept.header("Nats-Msg-Id"))],
    ["sha256", text(kept.header("Hostd-Sha256"))],
    ["Size, bytes", kept.header("Hostd-Truncated") || `${kept.data.length}`],
  ];
  const read = map ? [el("h3", {}, "As msgpack"), el("pre", {}, JSON.stringify(map, plainly, 2).slice(0, 4 * SHOWN_BYTES))] : [];
  return [facts(rows), ...read, el("h3", {}, "Bytes"), el("pre", {}, hex)];
}

function plain(value: unknown): string {
  return value === null || value === undefined ? "" : text(value) || String(value).slice(0, 100);
}

function plainly(_: string, value: unknown): unknown {
  if (value instanceof Uint8Array) return `${value.length} bytes`;
  return typeof value === "string" ? text(value) : typeof value === "bigint" ? String(value) : value;
}

export function reasonOf(error: unknown): string {
  return error instanceof BusFailure ? `No answer: ${error.message}` : String(error);
}
