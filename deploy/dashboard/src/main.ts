/** The page: the form, the views, and when they are drawn. */
import type { Access, Bus } from "./bus";
import { commandsView, deadLettersView } from "./commands";
import { commandDetail, deadLetterDetail, hostDetail, instanceDetail, tenantDetail } from "./details";
import { byId, clock, el, say } from "./dom";
import { Fleet } from "./fleet";
import { Session } from "./session";
import { useTraceUrl } from "./trace";
import { fields } from "./wire";
import { eventsView, hostsView, instancesView, type View } from "./views";

const DRAW_MS = 250;
const KEPT = "hostd-dashboard";
const VIEWS: readonly (readonly [string, string, (fleet: Fleet, bus: Bus) => View])[] = [
  ["hosts", "Hosts", hostsView],
  ["instances", "Instances", instancesView],
  ["events", "Events", eventsView],
  ["commands", "Commands", commandsView],
  ["dead", "Dead letters", (_, bus) => deadLettersView(bus)],
];

const PARENTS: ReadonlyMap<string, string> = new Map([
  ["host", "hosts"],
  ["instance", "instances"],
  ["tenant", "instances"],
  ["command", "commands"],
  ["letter", "dead"],
]);

const form = byId("access", HTMLFormElement);
const section = byId("view", HTMLElement);
const tabs = byId("tabs", HTMLElement);
const link = byId("link", HTMLElement);
const leave = byId("leave", HTMLButtonElement);
const failure = byId("failure", HTMLElement);

let session: Session | null = null;
let view: View | null = null;
let pendingFrame = 0;

function accessOf(): Access {
  const data = new FormData(form);
  const get = (name: string): string => String(data.get(name) ?? "").trim();
  return {
    url: get("url"),
    cell: get("cell"),
    root: get("root"),
    jsDomain: get("jsDomain"),
    user: get("user"),
    password: String(data.get("password") ?? ""),
    token: get("token"),
    creds: get("creds"),
  };
}

/** Fills the form: what the deployment says, then what this browser was asked to remember; connects if told to. */
async function prepare(): Promise<void> {
  const sources: unknown[] = [];
  const answer = await fetch("config.json", { cache: "no-store" }).catch(() => null);
  if (answer?.ok) sources.push(await answer.json().catch(() => null));
  useTraceUrl(fields(sources[0])?.["traceUrl"]);
  const isToConnect = fields(sources[0])?.["connect"] === true;
  const kept = localStorage.getItem(KEPT);
  if (kept) sources.push(JSON.parse(kept), { remember: true });
  for (const source of sources) {
    for (const [name, value] of Object.entries(source ?? {})) {
      const field = form.elements.namedItem(name);
      if (field instanceof HTMLInputElement && field.type === "checkbox") field.checked = value === true;
      else if ((field instanceof HTMLInputElement || field instanceof HTMLTextAreaElement) && typeof value === "string") field.value = value;
    }
  }
  if (isToConnect) await enter();
}

async function enter(): Promise<void> {
  const access = accessOf();
  say(failure, "");
  show({ state: "reading", text: "Connecting" });
  const button = form.querySelector("button");
  if (button) button.disabled = true;
  try {
    session = await Session.open(access, new Fleet());
  } catch (error) {
    show({ state: "lost", text: "Not connected" });
    say(failure, `Cannot read the fleet: ${error instanceof Error ? error.message : String(error)}`);
    return;
  } finally {
    if (button) button.disabled = false;
  }
  const remember = form.elements.namedItem("remember");
  if (remember instanceof HTMLInputElement && remember.checked) localStorage.setItem(KEPT, JSON.stringify(access));
  else localStorage.removeItem(KEPT);
  form.reset();
  form.hidden = true;
  tabs.hidden = section.hidden = leave.hidden = false;
  route();
}

function show(state: { readonly state: string; readonly text: string }): void {
  link.dataset["state"] = state.state;
  say(link, state.text);
}

function route(): void {
  if (!session) return;
  const { fleet, bus } = session;
  const [name = "", id = "", ...more] = location.hash.split("/").slice(1).map(decoded);
  const [key, , make] = VIEWS.find(([each]) => each === name || each === PARENTS.get(name)) ?? VIEWS[0]!;
  view?.close();
  if (name === "host") view = hostDetail(fleet, bus, id);
  else if (name === "instance") view = instanceDetail(fleet, bus, id, more);
  else if (name === "tenant") view = tenantDetail(fleet, bus, id);
  else if (name === "command") view = commandDetail(bus, id, more[0] ?? "");
  else if (name === "letter") view = deadLetterDetail(bus, Number(id) || 0);
  else view = make(fleet, bus);
  section.replaceChildren(view.element);
  for (const each of tabs.children) {
    if (each.getAttribute("href") === `#/${key}`) each.setAttribute("aria-current", "page");
    else each.removeAttribute("aria-current");
  }
  view.draw();
}

function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function draw(): void {
  if (!session) return;
  const age = session.link.state === "lost" && session.currentMs ? `; shown is the state of ${clock(session.currentMs)}` : "";
  show({ state: session.link.state, text: session.link.text + age });
  view?.draw();
}

/** In the next frame, once: a hidden tab has no frames, and would keep each request until it is shown. */
function drawSoon(): void {
  if (document.hidden || pendingFrame) return;
  pendingFrame = requestAnimationFrame(() => {
    pendingFrame = 0;
    draw();
  });
}

tabs.append(...VIEWS.map(([key, title]) => el("a", { href: `#/${key}` }, title)));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  void enter();
});
leave.addEventListener("click", () => {
  void session?.close();
  localStorage.removeItem(KEPT);
  location.reload();
});
addEventListener("hashchange", () => {
  route();
  byId("main", HTMLElement).focus();
});
addEventListener("keydown", (event) => {
  const isTyping = event.target instanceof HTMLElement && event.target.matches("input, textarea, select");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const search = section.querySelector<HTMLInputElement>("input[type=search]");
  if (!search) return;
  event.preventDefault();
  search.focus();
});
document.addEventListener("visibilitychange", () => {
  cancelAnimationFrame(pendingFrame);
  pendingFrame = 0;
  drawSoon();
});
setInterval(drawSoon, DRAW_MS);
void prepare();
