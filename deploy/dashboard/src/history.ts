/** The kept events of a subject, newest first, without a consumer: in windows that grow backwards. */
import type { Bus } from "./bus";
import { hostEvent, type HostEvent } from "./wire";

const FIRST_WINDOW = 512;
const GROWTH = 4;
const WANTED = 100;

export class History {
  /** Whether the stream has been read to its beginning. */
  isComplete = false;
  readonly events = new Map<string, HostEvent>();
  private before = 0;
  private window = FIRST_WINDOW;

  /** `filter` is a subject of the events stream, with wildcards. */
  constructor(private readonly bus: Bus, private readonly filter: string) {}

  /** Reads some 100 more, or all that there are. Raises BusFailure. */
  async older(): Promise<void> {
    const { bus } = this;
    const { first, last } = await bus.bounds(bus.events);
    this.before ||= last + 1;
    const wanted = this.events.size + WANTED;
    while (this.events.size < wanted && this.before > first) {
      const from = Math.max(first, this.before - this.window);
      const found = new Map<string, HostEvent>();
      for (let seq = from; ; ) {
        const kept = await bus.next(bus.events, seq, this.filter);
        if (!kept || kept.seq >= this.before) break;
        const event = hostEvent(bus.root, kept.subject, kept.data);
        if (event) found.set(event.key, event);
        seq = kept.seq + 1;
      }
      found.forEach((event, key) => this.events.set(key, event)); // a window as a whole: no gap if a read fails
      this.before = from;
      this.window *= GROWTH;
    }
    this.isComplete = this.before <= first;
  }
}
