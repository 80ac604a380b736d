// Plays a fragmented MP4 that arrives piece by piece. Nothing here knows of prompts, sockets or the page.

const START_CHUNKS = 2; // the first chunk is short: playing at once would stall before the second
const START_S = 0.9;
const KEEP_PLAYED_S = 20; // a browser's buffer is bounded; what was played longer ago is dropped
const GAP_S = 0.1; // media that begins later than this behind what is played is jumped to
const LEAST_PLAYED_S = 2; // and when it is full all the same, what was played longer ago than this

const Source = window.MediaSource ?? window.ManagedMediaSource; // phones of one maker have the second one alone

/** Whether this browser plays such pieces as they arrive. */
export const canPlay = (mime) => Boolean(Source?.isTypeSupported(mime));

/** `append` pieces to `video`, each a chunk; `onError` gets the reason when it cannot play them. */
export class Player {
  constructor(video, onError) {
    this.video = video;
    this.onError = onError;
    this.stalls = 0;
    this.stallMs = 0;
    this.started = false;
    this.paused = false;
    this._chunks = 0;
    this._ended = false;
    this._stalledAt = null;
    this._queue = [];
    this._listeners = new AbortController();
    const on = (name, react) => video.addEventListener(name, react, { signal: this._listeners.signal });
    on("waiting", () => { this._skipGap(); this._stall(); });
    on("playing", () => this._flow());
    on("timeupdate", () => this._flow());
  }

  /** Seconds of media that are there but not played. */
  get aheadS() {
    const { buffered, currentTime } = this.video;
    return buffered.length ? Math.max(0, buffered.end(buffered.length - 1) - currentTime) : 0;
  }

  get waiting() {
    return this._stalledAt !== null;
  }

  /** Milliseconds of all stalls, one that goes on included. */
  get stalledMs() {
    return this.stallMs + (this.waiting ? performance.now() - this._stalledAt : 0);
  }

  async open(mime) {
    if (!canPlay(mime)) throw new Error(`this browser cannot play ${mime} while it arrives`);
    this._source = new Source();
    this._address = URL.createObjectURL(this._source);
    this.video.disableRemotePlayback = true; // a managed source opens only then
    this.video.src = this._address;
    await new Promise((done) => this._source.addEventListener("sourceopen", done, { once: true }));
    if (this._listeners.signal.aborted) return;
    this._buffer = this._source.addSourceBuffer(mime);
    this._buffer.addEventListener("updateend", () => this._next());
    this._next();
  }

  append(data) {
    this._queue.push(data);
    this._chunks += 1;
    this._next();
  }

  /** There will be no more pieces. */
  end() {
    this._ended = true;
    this._next();
  }

  pause() {
    this.paused = true;
    this._flow();
    this.video.pause();
  }

  resume() {
    this.paused = false;
    if (this.started) this._play();
    else this._next();
  }

  close() {
    this._listeners.abort();
    this._flow();
    this.video.removeAttribute("src");
    this.video.load();
    if (this._address) URL.revokeObjectURL(this._address);
  }

  _play() {
    this.video.play().catch((error) => {
      if (error.name !== "AbortError") this.onError(error); // it was paused again at once
    });
  }

  _stall() {
    if (!this.started || this.paused || this._ended || this.waiting || this.video.ended) return;
    this.stalls += 1;
    this._stalledAt = performance.now();
  }

  _flow() {
    if (!this.waiting) return;
    this.stallMs += performance.now() - this._stalledAt;
    this._stalledAt = null;
  }

  _next() {
    if (!this._buffer || this._buffer.updating || this._source.readyState !== "open") return;
    this._skipGap();
    this._startWhenReady();
    if (this._queue.length) this._take();
    else if (this._ended) this._source.endOfStream();
    else this._drop(2 * KEEP_PLAYED_S, KEEP_PLAYED_S);
  }

  _take() {
    try {
      this._buffer.appendBuffer(this._queue[0]);
      this._queue.shift();
    } catch (error) {
      if (error.name !== "QuotaExceededError" || !this._drop(LEAST_PLAYED_S, LEAST_PLAYED_S)) this.onError(error);
    }
  }

  /** Removes what was played more than `keepS` ago, when that is more than `overS` long; says whether it did. */
  _drop(overS, keepS) {
    const { buffered, currentTime } = this.video;
    if (!buffered.length || currentTime - buffered.start(0) <= overS) return false;
    this._buffer.remove(buffered.start(0), currentTime - keepS);
    return true;
  }

  /** Goes on where media is: whoever comes into a stream late, or paused for long, has none where he stands. */
  _skipGap() {
    const { buffered, currentTime } = this.video;
    const range = [...Array(buffered.length).keys()].find((at) => buffered.end(at) > currentTime + GAP_S);
    if (range !== undefined && buffered.start(range) > currentTime + GAP_S) this.video.currentTime = buffered.start(range);
  }

  _startWhenReady() {
    if (this.started || this.paused || !this.video.buffered.length) return;
    if (!(this._chunks >= START_CHUNKS || this.aheadS >= START_S || this._ended)) return;
    this.started = true;
    this._play();
  }
}
