// Reads an HLS playlist as it grows, and its chunks: what a browser without native HLS needs, and no more.

const FROM_THE_END = 3; // whoever comes into a live stream begins so many chunks before its end
const TRY_AGAIN_MS = [250, 500, 1000, 2000];
const TRIES = 20; // in a row without an answer: half a minute

/** An answer that is no success, by its status. */
export class AnswerError extends Error {
  constructor(response) {
    super(`the server answered ${response.status}`);
    this.status = response.status;
  }
}

/** First number, addresses and whether there will be no more, of a playlist's text. */
export function parsed(text) {
  const lines = text.split("\n").map((line) => line.trim());
  const first = lines.find((line) => line.startsWith("#EXT-X-MEDIA-SEQUENCE:"));
  return {
    first: Number(first?.split(":")[1] ?? 0),
    addresses: lines.filter((line) => line && !line.startsWith("#")),
    ended: lines.includes("#EXT-X-ENDLIST"),
  };
}

/**
 * The initialisation segment, then each chunk as soon as it is there. `room` is waited for before each: it keeps what
 * is fetched just ahead of what is played. Throws `AnswerError` 404 when the link is over.
 */
export async function* chunks(address, room) {
  const part = async (name) => new Uint8Array(await (await got(new URL(name, address))).arrayBuffer());
  let next = null;
  for (;;) {
    const list = new URL(address);
    if (next !== null) list.searchParams.set("_HLS_msn", next);
    const { first, addresses, ended } = parsed(await (await got(list)).text());
    if (next === null) {
      yield await part("init.mp4");
      next = ended ? first : Math.max(first, first + addresses.length - FROM_THE_END);
    }
    next = Math.max(next, first); // what a long pause missed is gone
    while (next < first + addresses.length) {
      await room();
      try {
        yield await part(addresses[next - first]);
      } catch (error) {
        if (error.status === 410) break; // it went meanwhile: the playlist says where to go on
        throw error;
      }
      next += 1;
    }
    if (ended && next >= first + addresses.length) return;
  }
}

/** Asks until there is an answer. A chunk that is not there yet, and a server that is full, are asked again. */
async function got(address) {
  for (let tries = 0; ; tries += 1) {
    let response = null;
    try {
      response = await fetch(address);
    } catch (error) {
      if (tries >= TRIES) throw error;
    }
    if (response?.ok) return response;
    if (response && response.status < 500 && response.status !== 429) throw new AnswerError(response);
    if (response?.status === 503) tries = 0; // a paused stream waits for as long as it likes
    const askedS = Number(response?.headers.get("Retry-After") ?? 0);
    const waitMs = Math.max(1000 * askedS, TRY_AGAIN_MS[Math.min(tries, TRY_AGAIN_MS.length - 1)]);
    await new Promise((done) => setTimeout(done, waitMs));
  }
}
