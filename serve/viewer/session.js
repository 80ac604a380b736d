// A live session over WebSocket. A connection that breaks is not its end: it goes on by its resume token.

export const BUFFER_S = 1.0; // a chunk is made while less than this is ahead: it is the delay of a prompt change
const RETURN_WITHIN_MS = 15000;
const TRY_AGAIN_MS = [0, 150, 300, 600, 1000];
const PING_MS = 2000;
const SILENT_MS = 7000; // nothing heard for so long: the connection is dead, though nobody closed it
const RESTART = 1012;
const FINAL = new Set(["session_not_found", "session_taken_over", "generation_failed", "video_not_found", "chunk_gone"]);

/** An error of the service: `code` is for programs, `retryS` when it may be tried again. */
export class ServiceError extends Error {
  constructor({ message, code = "", retry_after_seconds: retryS = null }) {
    super(retryS === null ? message : `${message} (again in ${Math.ceil(retryS)} s)`);
    this.code = code;
  }
}

/**
 * `connect` gives a new WebSocket. Handlers: `started(answer)`, `chunk(about, data)`, `told(eventId, error | null)`,
 * `link(up)` when the connection is lost and found, `done(stopped)`, `failed(error)`; after the last two nothing comes.
 */
export class Session {
  constructor(connect, handlers) {
    this._connect = connect;
    this._on = handlers;
    this._token = null;
    this._unheard = new Map(); // interactions that the server has not yet answered, by event id
    this._over = false;
    this._positionS = 0;
    this.reconnects = 0;
    this._timer = setInterval(() => this._beat(), PING_MS);
  }

  async start(fields) {
    this._fields = fields;
    await this._open();
  }

  change(prompt, transitionChunks) {
    return this._interact({ event: { prompt }, transition_chunks: transitionChunks });
  }

  pause(wanted) {
    return this._interact({ event: { action: wanted ? "pause" : "resume" } });
  }

  /** How far the viewer has played: his credit for more chunks. */
  tellPosition(seconds) {
    if (seconds <= this._positionS || !this._live) return;
    this._positionS = seconds;
    this._say({ type: "session.playback", position_seconds: seconds });
  }

  /** Ends the session: the server frees its place within a chunk. */
  stop() {
    this._say({ type: "session.stop" });
    this._finish();
  }

  _interact(body) {
    const eventId = crypto.getRandomValues(new Uint32Array(2)).join("-");
    const message = { type: "session.interaction", interaction: { event_id: eventId, ...body } };
    this._unheard.set(eventId, message);
    if (this._live) this._say(message); // otherwise it is said when the connection is back
    return eventId;
  }

  async _open() {
    const socket = await this._connect();
    if (this._over) return socket.close(1000);
    this._socket = socket;
    this._about = null;
    this._live = false;
    this._heardAt = performance.now();
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this._say(this._opening());
    socket.onmessage = ({ data }) => this._hear(socket, data);
    socket.onclose = ({ code }) => this._closed(socket, code);
  }

  _opening() {
    const credits = { streaming_buffer_seconds: BUFFER_S };
    if (this._token) return { type: "session.start", resume_token: this._token, ...credits };
    return { type: "session.start", ...this._fields, ...credits };
  }

  _say(message) {
    if (this._socket?.readyState === WebSocket.OPEN) this._socket.send(JSON.stringify(message));
  }

  _hear(socket, data) {
    if (this._over || socket !== this._socket) return;
    this._heardAt = performance.now();
    if (typeof data !== "string") {
      this._on.chunk(this._about, new Uint8Array(data));
      this._token = this._about.resume_token; // only now: a chunk whose frame was lost is asked for again
      return;
    }
    const message = JSON.parse(data);
    const react = {
      "video.start": () => this._begun(message),
      "video.chunk_metadata": () => { this._about = message; },
      "session.interaction.queued": () => this._answered(message.event_id, null),
      "session.draining": () => { this._token = message.resume_token; },
      "session.done": () => { this._finish(); this._on.done(message.stopped); },
      error: () => this._refused(message),
    }[message.type];
    react?.();
  }

  _begun(message) {
    const first = this._token === null;
    this._token = message.resume_token;
    this._live = true;
    if (first) this._on.started(message);
    else this._on.link(true);
    if (this._positionS) this._say({ type: "session.playback", position_seconds: this._positionS });
    for (const unheard of this._unheard.values()) this._say(unheard); // the same event again is no second change
  }

  _answered(eventId, error) {
    if (this._unheard.delete(eventId)) this._on.told(eventId, error);
  }

  _refused(message) {
    const error = new ServiceError(message);
    if (message.event_id) this._answered(message.event_id, error);
    else this._refusal = error; // the connection is closed next
  }

  _closed(socket, code) {
    if (this._over || socket !== this._socket) return;
    const refusal = this._refusal;
    this._refusal = null;
    if (this._token === null || (refusal && FINAL.has(refusal.code))) return this._fail(refusal);
    if (this._live) {
      this._live = false;
      this._lostAt = performance.now();
      this._tries = 0;
      this.reconnects += 1;
      this._on.link(false);
    }
    this._again(code === RESTART ? 0 : TRY_AGAIN_MS[Math.min(this._tries, TRY_AGAIN_MS.length - 1)], refusal);
  }

  _again(waitMs, refusal) {
    if (performance.now() - this._lostAt > RETURN_WITHIN_MS) return this._fail(refusal);
    this._tries += 1;
    setTimeout(() => {
      if (this._over) return;
      this._open().catch((error) => (error.code === "invalid_api_key" ? this._fail(error) : this._again(1000, error)));
    }, waitMs);
  }

  _beat() {
    if (!this._socket || this._over) return;
    this._say({ type: "session.ping" });
    if (performance.now() - this._heardAt < SILENT_MS || this._socket.readyState > WebSocket.OPEN) return;
    const socket = this._socket;
    socket.onclose = null;
    socket.close();
    this._closed(socket, 1006);
  }

  _fail(error) {
    this._finish();
    this._on.failed(error ?? new Error(this._token ? "the connection is lost" : "the server does not answer"));
  }

  _finish() {
    this._over = true;
    clearInterval(this._timer);
    this._socket?.close(1000);
  }
}
