/** Elements. Text is always a text node: nothing that arrives is ever parsed as HTML. */

type Child = Node | string;

export function el<K extends keyof HTMLElementTagNameMap>(
  name: K,
  attributes: Readonly<Record<string, string>> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function byId<T extends HTMLElement>(id: string, type: abstract new () => T): T {
  const found = document.getElementById(id);
  if (!(found instanceof type)) throw new Error(`no element ${id}`);
  return found;
}

/** Sets text only if it differs: an unchanged node costs no layout. */
export function say(node: Node, text: string): void {
  if (node.textContent !== text) node.textContent = text;
}

/** A list of names and texts; a missing text is left out. */
export function facts(rows: readonly (readonly [string, string])[]): HTMLDListElement {
  const shown = rows.filter(([, text]) => text);
  return el("dl", {}, ...shown.flatMap(([name, text]) => [el("dt", {}, name), el("dd", {}, text)]));
}

/** Of a link to another site, which learns nothing of this page. */
export const OUTSIDE: Readonly<Record<string, string>> = { target: "_blank", rel: "noopener noreferrer" };

export function clock(ms: number): string {
  if (!ms) return "";
  const at = new Date(ms);
  if (Number.isNaN(at.getTime())) return "";
  const pad = (value: number): string => String(value).padStart(2, "0");
  const day = `${at.getFullYear()}-${pad(at.getMonth() + 1)}-${pad(at.getDate())}`;
  return `${day} ${pad(at.getHours())}:${pad(at.getMinutes())}:${pad(at.getSeconds())}`;
}

export function gib(mib: number): string {
  return (mib / 1024).toFixed(1);
}

const TONES: ReadonlyMap<string, string> = new Map([
  ...["ready", "running", "ok"].map((word) => [word, "good"] as const),
  ...["failed", "unknown", "stale", "degraded", "host_fault", "internal"].map((word) => [word, "bad"] as const),
  ...["draining", "recovering", "starting", "stopping", "waking", "snapshotting", "destroying"].map((word) => [word, "warn"] as const),
]);

export function tone(word: string): string {
  return TONES.get(word) ?? "";
}
