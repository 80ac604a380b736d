// The page: starts a video, shows it, changes its prompt, and says how long each took.
import { Player } from "./player.js";

const EXAMPLES = [
  "a red circle moving right slowly",
  "a blue square moving up quickly",
  "a green triangle moving left slowly",
];
const LOOK_EVERY_MS = 150;
const get = (id) => document.getElementById(id);
const video = get("video");

/** What runs now; null when nothing does. */
let run = null;
let model = null;

async function call(method, path, body) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: body ? { "Content-Type": "application/json" } : {},
      body: body && JSON.stringify(body),
    });
  } catch {
    throw new Error("the server does not answer");
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  const wait = response.headers.get("Retry-After");
  throw new Error((answer.detail ?? `the server answered ${response.status}`) + (wait ? ` (again in ${wait} s)` : ""));
}

function show(state, text = state) {
  get("state").dataset.state = state;
  get("state").textContent = text;
}

function showError(error) {
  get("error").textContent = error ? String(error.message ?? error) : "";
  get("error").hidden = !error;
}

function showControls() {
  const busy = run !== null;
  get("start").textContent = busy ? "Change prompt" : "Start";
  get("start").disabled = model === null || (busy && !run.id);
  get("stop").disabled = !busy;
  get("prompt-label").textContent = busy ? "What shall it show next?" : "What shall it show?";
  for (const id of ["seconds", "seed"]) get(id).disabled = busy;
  if (!busy) get("lead-bar").style.width = "0";
}

async function start(prompt) {
  const seed = get("seed").value;
  const mine = { id: null, clickedAt: performance.now(), firstFrameMs: null, changes: [], frames: [] };
  run = mine;
  showError(null);
  get("download").hidden = true;
  get("hint").hidden = true;
  get("timeline").replaceChildren();
  for (const id of ["first-frame", "fps", "ahead", "delay", "shown", "stalls"]) get(id).textContent = "–";
  show("starting", "starting…");
  showControls();
  try {
    const body = { prompt, seconds: Number(get("seconds").value), extra: { pacing: "realtime" } };
    const made = await call("POST", "v1/videos", seed === "" ? body : { ...body, seed: Number(seed) });
    if (run !== mine) return void call("DELETE", `v1/videos/${made.id}`);
    Object.assign(mine, { id: made.id, fps: made.fps, frameCount: made.num_frames });
    addToTimeline(prompt, "on screen", 0);
    mine.player = new Player(video, (error) => fail(mine, error));
    watchFrames(mine);
    await mine.player.open(`v1/videos/${made.id}/stream`, made.mime);
  } catch (error) {
    fail(mine, error);
  }
  showControls();
}

async function change(prompt) {
  const mine = run;
  const askedAt = performance.now();
  const row = addToTimeline(prompt, "sent", null);
  showError(null);
  try {
    const interaction = { event: { prompt }, transition_chunks: Number(get("transition").value) };
    const { event_id: id } = await call("POST", `v1/videos/${mine.id}/interactions`, { interaction });
    note(row, "queued");
    mine.changes.push({ id, row, askedAt, frame: null, seen: false });
    look(mine);
  } catch (error) {
    note(row, "refused");
    showError(error);
  }
}

/** Asks where queued prompt changes took effect, until all are known. */
async function look(mine) {
  if (mine.looking) return;
  mine.looking = true;
  while (run === mine && mine.changes.some((one) => one.frame === null)) {
    await new Promise((done) => setTimeout(done, LOOK_EVERY_MS));
    const told = await call("GET", `v1/videos/${mine.id}`).catch(() => null);
    if (!told) break;
    for (const one of mine.changes) {
      const known = told.interactions.find((other) => other.event_id === one.id);
      if (one.frame !== null || !known || known.status !== "applied") continue;
      one.frame = known.pixel_frame;
      note(one.row, "drawn", one.frame / mine.fps);
    }
    if (told.status !== "in_progress") break;
  }
  mine.looking = false;
}

async function stop() {
  const mine = run;
  if (!mine) return;
  run = null;
  mine.player?.close();
  show("idle", "stopped");
  get("hint").hidden = false;
  showControls();
  get("prompt").focus();
  if (mine.id) await call("DELETE", `v1/videos/${mine.id}`).catch(showError);
}

function fail(mine, error) {
  if (run !== mine) return;
  run = null;
  show("failed", "failed");
  showError(mine.id && error instanceof TypeError ? new Error("the stream broke off") : error);
  showControls();
}

function finish(mine) {
  if (run !== mine) return;
  run = null;
  show("idle", "finished");
  get("download").href = `v1/videos/${mine.id}/content`;
  get("download").download = "diagonal.mp4";
  get("download").hidden = false;
  showControls();
}

/** Notes each frame that reaches the screen: the first one, the rate, and the first one of a new prompt. */
function watchFrames(mine) {
  video.requestVideoFrameCallback((now, frame) => {
    if (run !== mine) return;
    mine.firstFrameMs ??= now - mine.clickedAt;
    mine.frames.push(now);
    mine.frames = mine.frames.filter((at) => now - at < 1000);
    for (const one of mine.changes) {
      if (one.seen || one.frame === null || frame.mediaTime * mine.fps < one.frame - 0.5) continue;
      one.seen = true;
      note(one.row, "on screen");
      get("delay").textContent = `${((now - one.askedAt) / 1000).toFixed(2)} s`;
    }
    watchFrames(mine);
  });
}

function showReadouts() {
  const mine = run;
  if (!mine?.player) return;
  const { aheadS, stalls, started } = mine.player;
  const waiting = started && video.readyState < HTMLMediaElement.HAVE_FUTURE_DATA && !video.ended;
  if (started) show(waiting ? "waiting" : "playing");
  get("lead-bar").style.width = `${Math.min(100, (100 * aheadS) / 2)}%`;
  get("ahead").textContent = `${aheadS.toFixed(2)} s`;
  get("stalls").textContent = String(stalls);
  get("shown").textContent = `${video.currentTime.toFixed(1)} of ${(mine.frameCount / mine.fps).toFixed(1)} s`;
  if (mine.firstFrameMs !== null) get("first-frame").textContent = `${Math.round(mine.firstFrameMs)} ms`;
  if (mine.frames.length > 1) {
    const spanMs = mine.frames.at(-1) - mine.frames[0];
    get("fps").textContent = `${((1000 * (mine.frames.length - 1)) / spanMs).toFixed(1)} fps`;
  }
}

function addToTimeline(text, state, atS) {
  const row = document.createElement("li");
  for (const name of ["at", "text", "note"]) row.append(Object.assign(document.createElement("span"), { className: name }));
  row.querySelector(".text").textContent = text;
  get("timeline").prepend(row);
  note(row, state, atS);
  return row;
}

function note(row, state, atS = undefined) {
  row.dataset.state = state;
  row.querySelector(".note").textContent = state;
  if (atS !== undefined) row.querySelector(".at").textContent = atS === null ? "next" : `${atS.toFixed(2)} s`;
}

function submit() {
  const prompt = get("prompt").value.trim();
  if (get("start").disabled || !get("form").reportValidity()) return;
  if (!prompt) return showError("the prompt is empty: say what it shall show");
  if (run) change(prompt);
  else start(prompt);
}

async function connect() {
  try {
    model = (await call("GET", "v1/models")).data[0];
  } catch (error) {
    get("model").textContent = `${error.message}; trying again…`;
    setTimeout(connect, 1000);
    return;
  }
  const [width, height] = model.sizes[0].split("x");
  document.documentElement.style.setProperty("--shape", `${width} / ${height}`);
  get("model").textContent = `${model.id} · ${model.sizes[0]} · ${model.fps} fps`;
  get("seconds").max = model.limits.max_seconds;
  get("seconds").value = Math.min(get("seconds").value, model.limits.max_seconds);
  get("prompt").maxLength = model.limits.max_prompt_characters;
  showControls();
}

for (const text of EXAMPLES) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.addEventListener("click", () => { get("prompt").value = text; submit(); });
  get("examples").append(button);
}
get("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
get("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
get("stop").addEventListener("click", stop);
video.addEventListener("ended", () => { if (run) finish(run); });
// A page that is left may be kept by the browser with its stream open: say that nobody watches any more.
addEventListener("pagehide", () => {
  if (run?.id) fetch(`v1/videos/${run.id}`, { method: "DELETE", keepalive: true });
  run?.player?.close();
  run = null;
});
setInterval(showReadouts, 200);
connect();
