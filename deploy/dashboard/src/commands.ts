/** Commands in flight with their outcomes, and dead letters: both are asked for while they are shown. */
import { each, type Bus } from "./bus";
import { reasonOf } from "./details";
import { clock, el, say, tone } from "./dom";
import type { Fleet } from "./fleet";
import { repeat } from "./repeat";
import { hostHref, laneHref, laneText, TableView, traceColumn, type View } from "./views";
import { fields, number, text, type HostEvent } from "./wire";

const LETTERS_MAX = 500;

interface Unfinished {
  readonly host: string;
  readonly lane: string;
  readonly count: number;
}

/** A dead letter without its body: of 500, up to 1 MiB each, only the size is shown. */
interface Letter {
  readonly seq: number;
  readonly atMs: number;
  readonly where: readonly string[];
  readonly reason: string;
  readonly id: string;
  readonly bytes: number;
}

export const commandHref = (host: string, id: string): string => `#/command/${host}/${encodeURIComponent(id)}`;

export function commandsView(fleet: Fleet, bus: Bus): View {
  let rows: Unfinished[] = [];
  const instance = (row: Unfinished) => fleet.instances.get(`${row.host}.${row.lane}`)?.value;
  const inFlight = new TableView<Unfinished>(
    "In flight",
    [
      { title: "Lane", text: (row) => laneText(row.lane) || "host", href: (row) => laneHref(row.host, row.lane) },
      { title: "Host", text: (row) => row.host, href: (row) => hostHref(row.host) },
      { title: "Unfinished commands", isNumber: true, text: (row) => `${row.count}`, sort: (row) => row.count },
      { title: "Status now", text: (row) => instance(row)?.status ?? "", tone: (row) => tone(instance(row)?.status ?? "") },
      { title: "Running command", text: (row) => instance(row)?.commandId ?? "" },
    ],
    () => rows,
    (row) => `${row.host} ${laneText(row.lane)}`.toLowerCase(),
    { name: "On host", of: (row) => row.host },
  );
  const outcomes = new TableView<HostEvent>(
    "Outcomes",
    [
      { title: "Command", text: (event) => event.commandId, href: (event) => commandHref(event.host, event.commandId) },
      { title: "Finished", text: (event) => clock(event.atMs) },
      { title: "Type", text: (event) => text(event.detail["type"]) },
      { title: "Code", text: (event) => text(event.detail["code"]), tone: (event) => tone(text(event.detail["code"])) },
      { title: "About", text: (event) => laneText(event.lane) || "host", href: (event) => laneHref(event.host, event.lane) },
      { title: "Host", text: (event) => event.host, href: (event) => hostHref(event.host) },
      { title: "Attempts", isNumber: true, text: (event) => `${number(event.detail["attempts"])}` },
      { title: "Message", text: (event) => text(event.detail["message"]) },
      traceColumn,
    ],
    () => fleet.outcomes.toReversed(),
    (event) => `${event.host} ${laneText(event.lane)} ${event.commandId} ${text(event.detail["type"])}`.toLowerCase(),
    { name: "Code", of: (event) => text(event.detail["code"]) },
  );
  const ask = async (): Promise<void> => {
    const found: Unfinished[] = [];
    const live = [...fleet.hosts.values()].filter((host) => fleet.isLive(host));
    await each(live, async ({ id }) => {
      const answer = await bus.ask(id, "status").catch(() => null);
      for (const [lane, count] of Object.entries(fields(answer?.["lanes"]) ?? {})) found.push({ host: id, lane: text(lane), count: number(count) });
    });
    rows = found.sort((a, b) => (a.host + a.lane < b.host + b.lane ? -1 : 1));
  };
  return together([inFlight, outcomes], ask);
}

export function deadLettersView(bus: Bus): View {
  let letters: Letter[] = [];
  const known = new Map<number, Letter>();
  const note = el("p", { class: "faint", "aria-live": "polite" });
  const table = new TableView<Letter>(
    "Dead letters",
    [
      { title: "Number", text: (letter) => `${letter.seq}`, href: (letter) => `#/letter/${letter.seq}` },
      { title: "Time", text: (letter) => clock(letter.atMs) },
      { title: "Host", text: (letter) => letter.where[0] ?? "", href: (letter) => hostHref(letter.where[0] ?? "") },
      { title: "Lane", text: (letter) => laneText(letter.where.slice(2).join(".")) || "host" },
      { title: "Reason", text: (letter) => letter.reason },
      { title: "ID", text: (letter) => letter.id },
      { title: "Bytes", isNumber: true, text: (letter) => `${letter.bytes}` },
    ],
    () => letters,
    (letter) => `${letter.where.join(".")} ${letter.reason} ${letter.id}`.toLowerCase(),
    { name: "On host", of: (letter) => letter.where[0] ?? "" },
  );
  const ask = async (): Promise<void> => {
    try {
      const { first, last, deleted } = await bus.holes(bus.deadLetters);
      const from = Math.max(first, last - LETTERS_MAX + 1, 1);
      const wanted = Array.from({ length: Math.max(0, last - from + 1) }, (_, at) => last - at);
      await each(wanted.filter((seq) => !known.has(seq) && !deleted.has(seq)), async (seq) => {
        const kept = await bus.at(bus.deadLetters, seq);
        if (!kept) return;
        const where = kept.subject.slice(bus.root.length + 1).split(".").map(text);
        const reason = text(kept.header("Hostd-Reason"));
        known.set(seq, { seq, atMs: kept.atMs, where, reason, id: text(kept.header("Nats-Msg-Id")), bytes: kept.data.length });
      });
      for (const seq of known.keys()) if (seq < from || deleted.has(seq)) known.delete(seq);
      letters = [...known.values()].sort((a, b) => b.seq - a.seq);
      say(note, "");
    } catch (error) {
      say(note, `${reasonOf(error)}. This credential may not be allowed to read dead letters.`);
    }
  };
  return together([table], ask, note);
}

/** Views below each other, and a question that is asked again while they are shown. */
function together(views: readonly View[], ask: () => Promise<void>, ...more: Node[]): View {
  const draw = (): void => views.forEach((view) => view.draw());
  let isClosed = false;
  const end = repeat(async () => {
    await ask();
    if (!isClosed) draw();
    return false;
  });
  const close = (): void => {
    isClosed = true;
    end();
    views.forEach((view) => view.close());
  };
  return { element: el("div", { class: views.length > 1 ? "halves" : "" }, ...more, ...views.map((view) => view.element)), draw, close };
}
