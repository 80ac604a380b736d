// Plays a fragmented MP4 while it arrives. Nothing here knows of prompts or of the page.

const START_CHUNKS = 2; // the first chunk is short: playing at once would stall before the second
const START_S = 0.9;
const KEEP_PLAYED_S = 20; // a browser's buffer is bounded; what was played longer ago is dropped

/** Appends `url` to `video` as it comes. `onError` gets the reason when the stream breaks. */
export class Player {
  constructor(video, onError) {
    this.video = video;
    this.onError = onError;
    this.chunks = 0;
    this.stalls = 0;
    this.ended = false;
    this.started = false;
    this._queue = [];
    this._tail = new Uint8Array(0);
    this._abort = new AbortController();
    this._onWaiting = () => { if (this.started && !this.ended && !this.video.ended) this.stalls += 1; };
    video.addEventListener("waiting", this._onWaiting);
  }

  /** Seconds of media that are there but not played. */
  get aheadS() {
    const { buffered, currentTime } = this.video;
    return buffered.length ? Math.max(0, buffered.end(buffered.length - 1) - currentTime) : 0;
  }

  async open(url, mime) {
    if (!("MediaSource" in window) || !MediaSource.isTypeSupported(mime)) {
      throw new Error(`this browser cannot play ${mime} while it arrives`);
    }
    this._source = new MediaSource();
    this._address = URL.createObjectURL(this._source);
    this.video.src = this._address;
    await new Promise((done) => this._source.addEventListener("sourceopen", done, { once: true }));
    this._buffer = this._source.addSourceBuffer(mime);
    this._buffer.addEventListener("updateend", () => this._next());
    const response = await fetch(url, { signal: this._abort.signal });
    if (!response.ok) throw new Error((await response.json()).detail);
    this._read(response.body.getReader()); // goes on by itself
  }

  close() {
    this.ended = true;
    this._abort.abort();
    this.video.removeEventListener("waiting", this._onWaiting);
    this.video.removeAttribute("src");
    this.video.load();
    if (this._address) URL.revokeObjectURL(this._address);
  }

  async _read(reader) {
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        this._count(value);
        this._queue.push(value);
        this._next();
      }
      this.ended = true;
      this._next();
    } catch (error) {
      if (!this._abort.signal.aborted) this.onError(error);
    }
  }

  /** Counts whole top-level boxes: each `mdat` ends a chunk. */
  _count(part) {
    let data = new Uint8Array(this._tail.length + part.length);
    data.set(this._tail);
    data.set(part, this._tail.length);
    for (;;) {
      if (data.length < 8) break;
      const size = new DataView(data.buffer, data.byteOffset).getUint32(0);
      if (data.length < size || size < 8) break;
      if (String.fromCharCode(...data.subarray(4, 8)) === "mdat") this.chunks += 1;
      data = data.subarray(size);
    }
    this._tail = data.slice();
  }

  _next() {
    if (!this._buffer || this._buffer.updating || this._source.readyState !== "open") return;
    this._startWhenReady();
    if (this._queue.length) {
      this._buffer.appendBuffer(this._queue.shift());
    } else if (this.ended) {
      this._source.endOfStream();
    } else {
      this._dropPlayed();
    }
  }

  _startWhenReady() {
    if (this.started || !(this.chunks >= START_CHUNKS || this.aheadS >= START_S || this.ended)) return;
    if (!this.video.buffered.length) return;
    this.started = true;
    this.video.play().catch((error) => this.onError(error));
  }

  _dropPlayed() {
    const { buffered, currentTime } = this.video;
    if (buffered.length && currentTime - buffered.start(0) > 2 * KEEP_PLAYED_S) {
      this._buffer.remove(buffered.start(0), currentTime - KEEP_PLAYED_S);
    }
  }
}
