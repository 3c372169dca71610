/** Links from a command or an event to its trace, in whatever shows traces here: `traceUrl` of config.json. */
const PARENT = /^00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})$/;
const HERE = "{traceId}";

let template = "";

/** Takes an http or https URL with `{traceId}` in it; anything else is no template. */
export function useTraceUrl(value: unknown): void {
  template = "";
  if (typeof value !== "string" || !value.includes(HERE)) return;
  const [one, other] = ["a", "b"].map((id) => originOf(value.replaceAll(HERE, id)));
  if (one && one === other) template = value; // the ID chooses no site
}

/** Of an http or https URL; else empty. */
function originOf(text: string): string {
  const url = URL.canParse(text) ? new URL(text) : null;
  return url?.protocol === "https:" || url?.protocol === "http:" ? url.origin : "";
}

/** The trace of a `traceparent` that was sampled; empty if there is none, or no place that shows it. */
export function traceId(traceparent: string): string {
  const [, id = "", flags = "0"] = PARENT.exec(traceparent) ?? [];
  return template && Number.parseInt(flags, 16) & 1 ? id : "";
}

export function traceHref(traceparent: string): string {
  const id = traceId(traceparent);
  return id && template.replaceAll(HERE, id);
}
