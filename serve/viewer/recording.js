// Keeps what was received, byte for byte, so that it can be saved: live streams have no file of their own.

const MOST_BYTES = 256 << 20; // of a long stream the newest part

export class Recording {
  constructor() {
    this._head = null;
    this._chunks = [];
    this._bytes = 0;
  }

  get empty() {
    return this._chunks.length === 0;
  }

  /** A chunk as it came; the first one has the initialisation segment in front. */
  add(data) {
    if (this._head === null) {
      const at = firstFragment(data);
      this._head = data.slice(0, at);
      data = data.subarray(at);
    }
    this._chunks.push(data);
    this._bytes += data.length;
    while (this._bytes > MOST_BYTES) this._bytes -= this._chunks.shift().length;
  }

  blob() {
    return new Blob([this._head, ...this._chunks], { type: "video/mp4" });
  }
}

/** Where the first `moof` box begins. */
function firstFragment(data) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  for (let at = 0; at + 8 <= data.length; at += view.getUint32(at)) {
    if (String.fromCharCode(...data.subarray(at + 4, at + 8)) === "moof" || view.getUint32(at) < 8) return at;
  }
  return data.length;
}

/** Offers a file to the browser's own way of saving. */
export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
