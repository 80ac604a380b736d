// Calls to the service in the viewer's name. The key lives in this tab alone, and never in an address.
import { ServiceError } from "./session.js";

const KEPT_AS = "diagonal-key";
const FILE_WITHIN_MS = 30000;

export const key = {
  get value() { return sessionStorage.getItem(KEPT_AS); },
  keep(text) { sessionStorage.setItem(KEPT_AS, text); },
  forget() { sessionStorage.removeItem(KEPT_AS); },
};

async function ask(path, options = {}) {
  const headers = { ...(options.body && { "Content-Type": "application/json" }) };
  if (key.value) headers.Authorization = `Bearer ${key.value}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("the server does not answer");
  }
  if (response.ok) return response;
  const { detail, error } = await response.json().catch(() => ({}));
  const retryS = response.headers.get("Retry-After");
  throw new ServiceError({
    message: detail ?? `the server answered ${response.status}`,
    code: error?.code,
    retry_after_seconds: retryS === null ? null : Number(retryS),
  });
}

export const models = async () => (await (await ask("v1/models")).json()).data;

/** A new socket; where a key is needed, by a secret that opens one. */
export async function connect() {
  const address = new URL("v1/realtime/video", location.href);
  address.protocol = address.protocol.replace("http", "ws");
  const protocols = ["realtime"];
  if (key.value) {
    const secret = await (await ask("v1/realtime/client_secrets", { method: "POST", body: "{}" })).json();
    protocols.push(`diagonal-client-secret.${secret.value}`);
  }
  return new WebSocket(address, protocols);
}

/** A link of a video for somebody without a key, with its QR code. */
export async function share(videoId, role) {
  const body = JSON.stringify({ role, qr_for: new URL("./", location.href).href });
  const made = await (await ask(`v1/videos/${videoId}/viewers`, { method: "POST", body })).json();
  return { link: new URL(made.watch_path, location.href).href, qr: made.qr };
}

/** The finished file, as soon as it is there. */
export async function finishedFile(videoId) {
  const giveUpAt = performance.now() + FILE_WITHIN_MS;
  for (;;) {
    try {
      return await (await ask(`v1/videos/${videoId}/content`)).blob();
    } catch (error) {
      if (error.code !== "video_not_ready" || performance.now() > giveUpAt) throw error;
    }
    await new Promise((done) => setTimeout(done, 300));
  }
}
