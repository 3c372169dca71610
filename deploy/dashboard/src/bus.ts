/**
 * NATS over WebSocket, with a credential that may only read. It creates no consumer: state and history
 * are read message by message with JetStream's direct get, which every server since 2.9 has.
 */
import {
  credsAuthenticator,
  tokenAuthenticator,
  usernamePasswordAuthenticator,
  wsconnect,
  type Authenticator,
  type Msg,
  type NatsConnection,
  type Subscription,
} from "@nats-io/nats-core";
import { encode } from "@msgpack/msgpack";
import { fields, list, number, text, unpack, type Fields } from "./wire";

const TIMEOUT_MS = 5000;
const AT_ONCE = 64;
const PING_MS = 5000;
const utf8 = new TextEncoder();

export interface Access {
  readonly url: string;
  readonly cell: string;
  readonly root: string;
  readonly jsDomain: string;
  readonly user: string;
  readonly password: string;
  readonly token: string;
  readonly creds: string;
}

export interface Kept {
  readonly seq: number;
  readonly subject: string;
  readonly atMs: number;
  readonly header: (name: string) => string;
  readonly data: Uint8Array;
}

export class BusFailure extends Error {}

function authenticator(access: Access): Authenticator[] {
  if (access.creds) return [credsAuthenticator(utf8.encode(access.creds))];
  if (access.token) return [tokenAuthenticator(access.token)];
  return access.user ? [usernamePasswordAuthenticator(access.user, access.password)] : [];
}

export class Bus {
  readonly root: string;
  readonly bucket: string;
  readonly events: string;
  readonly deadLetters: string;
  private readonly api: string;

  private constructor(readonly nats: NatsConnection, access: Access) {
    this.root = access.root || `hostd.v1.${access.cell}`;
    this.bucket = `HOSTD_STATE_${access.cell}`;
    this.events = `HOSTD_EVT_${access.cell}`;
    this.deadLetters = `HOSTD_DEAD_${access.cell}`;
    this.api = access.jsDomain ? `$JS.${access.jsDomain}.API` : "$JS.API";
  }

  /** Connects, and stays connected: it tries again for ever, with the servers of the URL alone. */
  static async open(access: Access): Promise<Bus> {
    const nats = await wsconnect({
      servers: access.url,
      authenticator: authenticator(access),
      name: "hostd dashboard",
      timeout: TIMEOUT_MS,
      maxReconnectAttempts: -1,
      reconnectTimeWait: 500,
      reconnectJitter: 500,
      ignoreAuthErrorAbort: true,
      ignoreClusterUpdates: true,
      pingInterval: PING_MS,
      maxPingOut: 2,
    });
    return new Bus(nats, access);
  }

  /** `ended` is told why, if the server refuses or withdraws the subscription: no message arrives any more. */
  subscribe(subject: string, got: (message: Msg) => void, ended: (why: string) => void): Subscription {
    return this.nats.subscribe(subject, {
      callback: (error, message) => {
        if (error) ended(`${subject}: ${error.message}`);
        else got(message);
      },
    });
  }

  /** How many messages each subject has, of those that match. */
  async subjects(stream: string, filter: string): Promise<Map<string, number>> {
    const found = new Map<string, number>();
    for (;;) {
      const info = await this.info(stream, { subjects_filter: filter, offset: found.size });
      const page = Object.entries(fields(fields(info["state"])?.["subjects"]) ?? {});
      for (const [subject, count] of page) found.set(subject, number(count));
      if (!page.length || found.size >= number(info["total"])) return found;
    }
  }

  /** The first and last sequence of a stream. */
  async bounds(stream: string): Promise<{ first: number; last: number }> {
    const state = fields((await this.info(stream, {}))["state"]) ?? {};
    return { first: number(state["first_seq"]), last: number(state["last_seq"]) };
  }

  /** The bounds of a stream, and which sequences between them were deleted one by one. */
  async holes(stream: string): Promise<{ first: number; last: number; deleted: ReadonlySet<number> }> {
    const state = fields((await this.info(stream, { deleted_details: true }))["state"]) ?? {};
    return { first: number(state["first_seq"]), last: number(state["last_seq"]), deleted: new Set(list(state["deleted"]).map(number)) };
  }

  /** When a mirror last heard its original, ago; null: the stream is no mirror. */
  async mirrorSilentMs(stream: string): Promise<number | null> {
    const mirror = fields((await this.info(stream, {}))["mirror"]);
    if (!mirror) return null;
    const active = number(mirror["active"]); // nanoseconds; negative: never
    return active < 0 ? Infinity : active / 1e6;
  }

  /** The last message of a subject; null: there is none. */
  last(stream: string, subject: string): Promise<Kept | null> {
    return this.get(`${this.api}.DIRECT.GET.${stream}.${subject}`, "");
  }

  /** The first message at or after `seq` whose subject matches `filter`; null: there is none. */
  next(stream: string, seq: number, filter: string): Promise<Kept | null> {
    return this.get(`${this.api}.DIRECT.GET.${stream}`, JSON.stringify({ seq, next_by_subj: filter }));
  }

  /** The message with this sequence; null: it is gone. */
  at(stream: string, seq: number): Promise<Kept | null> {
    return this.get(`${this.api}.DIRECT.GET.${stream}`, JSON.stringify({ seq }));
  }

  /** A question to a host's worker. Raises BusFailure with what it answered. */
  async ask(host: string, verb: string, body: Fields = {}): Promise<Fields> {
    const answer = await this.request(`${this.root}.${host}.ask.${verb}`, encode(body));
    const map = unpack(answer.data);
    if (!map) throw new BusFailure(`${host}: the answer to ${verb} cannot be read`);
    const error = fields(map["error"]);
    if (error) throw new BusFailure(`${text(error["code"])}: ${text(error["message"])}`);
    return map;
  }

  private async info(stream: string, body: Fields): Promise<Fields> {
    const answer = await this.request(`${this.api}.STREAM.INFO.${stream}`, utf8.encode(JSON.stringify(body)));
    const info = fields(answer.json()) ?? {};
    const error = fields(info["error"]);
    if (error) throw new BusFailure(`${stream}: ${text(error["description"])}`);
    return info;
  }

  private async get(subject: string, body: string): Promise<Kept | null> {
    const answer = await this.request(subject, utf8.encode(body));
    const header = (name: string): string => answer.headers?.get(name) ?? "";
    if (answer.headers?.code === 404) return null;
    if (answer.headers?.code) throw new BusFailure(`${answer.headers.code} ${answer.headers.description}`);
    return {
      seq: Number(header("Nats-Sequence")),
      subject: header("Nats-Subject"),
      atMs: Date.parse(header("Nats-Time-Stamp")) || 0,
      header,
      data: answer.data,
    };
  }

  private async request(subject: string, data: Uint8Array): Promise<Msg> {
    try {
      return await this.nats.request(subject, data, { timeout: TIMEOUT_MS });
    } catch (error) {
      const why = error instanceof Error ? error.message : String(error);
      throw new BusFailure(`${subject}: ${why}`);
    }
  }
}

/** Runs `work` for each item, at most 64 at once; the first failure ends it. */
export async function each<T>(items: Iterable<T>, work: (item: T) => Promise<void>): Promise<void> {
  const left = items[Symbol.iterator]();
  const run = async (): Promise<void> => {
    for (let next = left.next(); !next.done; next = left.next()) await work(next.value);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, run));
}
