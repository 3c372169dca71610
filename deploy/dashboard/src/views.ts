/** The tables: hosts, instances, events, commands. A view reads the fleet each time it is drawn. */
import { clock, el, gib, say, tone } from "./dom";
import type { Fleet, Host, Instance } from "./fleet";
import { inOrder, VirtualTable, type Column } from "./table";
import { traceHref, traceId } from "./trace";
import { text, type HostEvent } from "./wire";

export interface View {
  readonly element: HTMLElement;
  draw(): void;
  close(): void;
}

export const hostHref = (host: string): string => `#/host/${encodeURIComponent(host)}`;
export const laneHref = (host: string, lane: string): string => {
  const ids = lane.split(".").slice(1).map(encodeURIComponent);
  return lane.startsWith("instance.") ? `#/instance/${[encodeURIComponent(host), ...ids].join("/")}` : hostHref(host);
};
/** The IDs in a lane: T/P/I, T, or nothing for the host's. */
export const laneText = (lane: string): string => lane.split(".").slice(1).join("/");

/** A table below a search field and a choice; `all` gives the rows, in the order of rest. */
export class TableView<T> implements View {
  readonly element: HTMLElement;
  private readonly table: VirtualTable<T>;
  private readonly search = el("input", { type: "search", "aria-keyshortcuts": "/" });
  private readonly choice = el("select");
  private readonly count = el("p", { class: "faint" });
  private options = "";

  constructor(
    title: string,
    columns: readonly Column<T>[],
    private readonly all: () => readonly T[],
    private readonly words: (row: T) => string,
    private readonly group: { readonly name: string; readonly of: (row: T) => string },
  ) {
    this.table = new VirtualTable(title, columns, () => this.draw());
    this.search.addEventListener("input", () => this.draw());
    this.choice.addEventListener("change", () => this.draw());
    const filters = el("div", { class: "filters", role: "search", "aria-label": `Filter of ${title}` }, el("label", {}, "Search", this.search), el("label", {}, group.name, this.choice), this.count);
    this.element = el("div", {}, el("h2", {}, title), filters, this.table.element);
  }

  draw(): void {
    const all = this.all();
    const counts = new Map<string, number>();
    const wanted = this.search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = this.choice.value;
    const rows = all.filter((row) => {
      const group = this.group.of(row);
      counts.set(group, (counts.get(group) ?? 0) + 1);
      if (chosen && group !== chosen) return false;
      return !wanted.length || wanted.every((word) => this.words(row).includes(word));
    });
    this.offer(counts, chosen);
    say(this.count, rows.length === all.length ? `${all.length}` : `${rows.length} of ${all.length}`);
    const { sorted } = this.table;
    this.table.show(sorted?.column.sort ? inOrder(rows, sorted.column.sort, sorted.down) : rows);
  }

  close(): void {
    this.table.close();
  }

  private offer(counts: ReadonlyMap<string, number>, chosen: string): void {
    const names = [...new Set([...counts.keys(), ...(chosen ? [chosen] : [])])].filter(Boolean).sort();
    const options = names.join("\n");
    if (options !== this.options) {
      this.options = options;
      this.choice.replaceChildren(el("option", { value: "" }, "any"), ...names.map((name) => el("option", { value: name }, name)));
      this.choice.value = chosen;
    }
    for (const option of this.choice.options) {
      if (option.value) say(option, `${option.value} (${counts.get(option.value) ?? 0})`);
    }
  }
}

export function hostsView(fleet: Fleet): View {
  const lease = (host: Host): string => {
    if (!fleet.isLive(host)) return host.value.leaseUntilMs ? `ended, renewed ${clock(host.value.atMs)}` : "released";
    return "valid";
  };
  const columns: Column<Host>[] = [
    { title: "Host", text: (host) => host.id, href: (host) => hostHref(host.id), sort: (host) => host.id },
    { title: "State", text: (host) => fleet.stateOf(host), tone: (host) => tone(fleet.stateOf(host)), sort: (host) => fleet.stateOf(host) },
    { title: "Degraded by", text: (host) => host.value.degradedBy.join(", ") },
    { title: "Lease", text: lease, sort: lease },
    { title: "Instances", isNumber: true, text: (host) => `${host.value.running}`, sort: (host) => host.value.running },
    { title: "vCPUs used", isNumber: true, text: (host) => `${host.value.vcpusUsed} / ${host.value.vcpus}`, sort: (host) => host.value.vcpusUsed },
    { title: "Memory free, GiB", isNumber: true, text: (host) => `${gib(host.value.memFreeMib)} / ${gib(host.value.memMib)}`, sort: (host) => host.value.memFreeMib },
    { title: "Disk free, GiB", isNumber: true, text: (host) => gib(host.value.diskFreeMib), sort: (host) => host.value.diskFreeMib },
    { title: "Version", text: (host) => host.value.version, sort: (host) => host.value.version },
    { title: "Firecracker", text: (host) => host.value.vmmVersions.join(", ") },
    { title: "Hostname", text: (host) => host.value.hostname, sort: (host) => host.value.hostname },
  ];
  const all = (): Host[] => inOrder([...fleet.hosts.values()], (host) => host.id, false);
  return new TableView("Hosts", columns, all, (host) => `${host.id} ${host.value.hostname}`.toLowerCase(), { name: "State", of: (host) => fleet.stateOf(host) });
}

export function instancesView(fleet: Fleet): View {
  const columns: Column<Instance>[] = [
    { title: "Instance", text: (row) => `${row.tenant}/${row.pool}/${row.id}`, href: (row) => laneHref(row.host, row.lane), sort: (row) => row.lane },
    { title: "Status", text: (row) => row.value.status, tone: (row) => tone(row.value.status), sort: (row) => row.value.status },
    { title: "Host", text: (row) => row.host, href: (row) => hostHref(row.host), sort: (row) => row.host },
    { title: "Since", text: (row) => clock(row.value.sinceMs), sort: (row) => row.value.sinceMs },
    { title: "Launch", isNumber: true, text: (row) => `${row.value.launch}`, sort: (row) => row.value.launch },
    { title: "Revision", text: (row) => row.value.revision, sort: (row) => row.value.revision },
    { title: "Reason", text: (row) => row.value.reason },
  ];
  let population = -1;
  let rows: Instance[] = [];
  const all = (): Instance[] => {
    if (population !== fleet.population) rows = inOrder([...fleet.instances.values()], (row) => row.lane, false);
    population = fleet.population;
    return rows;
  };
  return new TableView("Instances", columns, all, (row) => row.words, { name: "Status", of: (row) => row.value.status });
}

export function change(event: HostEvent): string {
  const outcome = event.kind === "command" ? [text(event.detail["type"]), text(event.detail["code"])] : [];
  const to = event.to && (event.from ? `${event.from} → ${event.to}` : `→ ${event.to}`);
  return [...outcome, to].filter(Boolean).join(" ");
}

export const traceColumn: Column<HostEvent> = {
  title: "Trace",
  text: (event) => traceId(event.traceparent).slice(0, 8),
  href: (event) => traceHref(event.traceparent),
  isOutside: true,
};

export const eventColumns: readonly Column<HostEvent>[] = [
  { title: "Time", text: (event) => clock(event.atMs) },
  { title: "Host", text: (event) => event.host, href: (event) => hostHref(event.host) },
  { title: "Kind", text: (event) => event.kind },
  { title: "About", text: (event) => laneText(event.lane) || event.host, href: (event) => laneHref(event.host, event.lane) },
  { title: "Change", text: change, tone: (event) => tone(event.to || text(event.detail["code"])) },
  { title: "Reason", text: (event) => event.reason || text(event.detail["message"]) || text(event.detail["reason"]) },
  traceColumn,
];

export function eventsView(fleet: Fleet): View {
  const words = (event: HostEvent): string => `${event.host} ${laneText(event.lane)} ${event.kind} ${change(event)} ${event.commandId} ${event.reason}`.toLowerCase();
  return new TableView("Events", eventColumns, () => fleet.events.toReversed(), words, { name: "Kind", of: (event) => event.kind });
}
