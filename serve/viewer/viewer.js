// The page: starts a stream, shows it, changes its prompt, and says how long each took.
import { Player } from "./player.js";
import { Recording, save } from "./recording.js";
import { connect, finishedFile, key, models, share } from "./service.js";
import { Session } from "./session.js";

const EXAMPLES = [
  "a red circle moving right slowly",
  "a blue square moving up quickly",
  "a green triangle moving left slowly",
];
const READOUTS = ["first-frame", "fps", "ahead", "delay", "shown", "stalls"];
const LOOK_EVERY_MS = 100;
const ASK_AGAIN_MS = 1000;
const get = (id) => document.getElementById(id);
const video = get("video");

/** What runs now, null when nothing does; and what was seen last, which may be saved. */
let run = null;
let seen = null;
let model = null;
let known = [];

/** One stream, from the click to its end. */
class Run {
  constructor(prompt) {
    this.clickedAt = performance.now();
    this.firstFrameMs = null;
    this.shownAt = []; // when the frames of the last second reached the screen
    this.changes = new Map(); // by event id: row, when it was asked for, first pixel frame
    this.framesReceived = 0;
    this.firstRow = addToTimeline(prompt, "drawing", 0);
    this.recording = new Recording();
    this.player = new Player(video, (error) => fail(this, error));
    this.session = new Session(connect, {
      started: (answer) => this.begin(answer),
      chunk: (about, data) => this.take(about, data),
      told: (eventId, error) => this.told(eventId, error),
      link: (up) => this.link(up),
      done: () => this.player.end(),
      failed: (error) => fail(this, error),
    });
  }

  begin({ request_id: id, mime, config }) {
    Object.assign(this, { id, fps: config.fps, frameCount: config.num_frames });
    this.player.open(mime).catch((error) => fail(this, error));
    watchFrames(this);
    showControls();
  }

  take(about, data) {
    this.recording.add(data);
    this.player.append(data);
    for (const eventId of about.started_event_ids) {
      const change = this.changes.get(eventId);
      if (!change) continue;
      change.frame = this.framesReceived;
      note(change.row, "drawn", change.frame / this.fps);
    }
    this.framesReceived += about.num_frames;
    get("save").disabled = false;
  }

  change(prompt) {
    const row = addToTimeline(prompt, "sent", null);
    const askedAt = performance.now();
    const eventId = this.session.change(prompt, Number(get("transition").value));
    this.changes.set(eventId, { row, askedAt, frame: null, onScreen: false });
  }

  told(eventId, error) {
    const change = this.changes.get(eventId);
    if (change && change.frame === null) note(change.row, error ? "refused" : "queued");
    if (error && (change || error.code !== "video_over")) showError(error); // a pause after the last chunk is no error
  }

  link(up) {
    this.linkLost = !up;
    showState(this);
  }

  pause(wanted) {
    this.paused = wanted;
    this.session.pause(wanted);
    if (wanted) this.player.pause();
    else this.player.resume();
  }

  close() {
    this.player.close();
    this.session.stop();
  }
}

function show(state, text = state) {
  if (get("state").textContent === text) return; // who listens to the page is told once
  get("state").dataset.state = state;
  get("state").textContent = text;
}

function showState(mine) {
  if (run !== mine) return;
  if (mine.linkLost) show("waiting", "reconnecting…");
  else if (mine.paused) show("paused");
  else if (!mine.player.started) show("starting", "starting…");
  else show(mine.player.waiting ? "waiting" : "playing");
}

function showError(error, where = "error") {
  get(where).textContent = error ? String(error.message ?? error) : "";
  get(where).hidden = !error;
}

function showControls() {
  const busy = run !== null;
  get("start").textContent = busy ? "Change prompt" : "Start";
  get("start").disabled = model === null || (busy && !run.id);
  get("stop").disabled = !busy;
  get("pause").disabled = !run?.id;
  get("share").disabled = !run?.id;
  get("pause").textContent = run?.paused ? "Resume" : "Pause";
  get("pause").setAttribute("aria-pressed", String(Boolean(run?.paused)));
  get("prompt-label").textContent = busy ? "What shall it show next?" : "What shall it show?";
  for (const id of ["seed", "endless", "model-choice"]) get(id).disabled = busy;
  get("seconds").disabled = busy || get("endless").checked;
  if (!busy) get("lead-bar").style.width = "0";
}

function wish(prompt) {
  const length = get("endless").checked ? { extra: { endless: true } }
    : { seconds: Number(get("seconds").value), extra: { pacing: "realtime" } };
  const seed = get("seed").value === "" ? {} : { seed: Number(get("seed").value) };
  return { prompt, model: model.id, ...length, ...seed };
}

async function start(prompt) {
  showError(null);
  get("timeline").replaceChildren();
  for (const id of READOUTS) get(id).textContent = "–";
  get("hint").hidden = true;
  get("save").disabled = true;
  const mine = new Run(prompt);
  run = seen = mine;
  show("starting", "starting…");
  showControls();
  try {
    await mine.session.start(wish(prompt));
  } catch (error) {
    fail(mine, error);
  }
}

function togglePause() {
  if (!run?.id) return;
  run.pause(!run.paused);
  showState(run);
  showControls();
}

/** Nothing runs any more; the picture that was last on screen stays where it can. */
function end(state, text) {
  const mine = run;
  run = null;
  mine.close();
  show(state, text);
  showControls();
}

function stop() {
  if (!run) return;
  end("idle", "stopped");
  get("hint").hidden = false;
  get("prompt").focus();
}

function fail(mine, error) {
  if (run !== mine) return;
  end("failed", "failed");
  if (error.code === "invalid_api_key") askForKey(error);
  else showError(error);
}

function finish() {
  if (!run) return;
  run.finished = run.frameCount !== null;
  const mine = run;
  run = null;
  mine.session.stop();
  show("idle", "finished");
  showControls();
}

async function saveVideo() {
  const mine = seen;
  get("save").disabled = true;
  try {
    save(mine.finished ? await finishedFile(mine.id) : mine.recording.blob(), `diagonal-${mine.id.slice(-8)}.mp4`);
  } catch (error) {
    showError(error);
  }
  get("save").disabled = mine.recording.empty;
}

/** Notes each frame that reaches the screen: the first one, the rate, and the first one of a new prompt. */
function watchFrames(mine) {
  video.requestVideoFrameCallback((now, frame) => {
    if (run !== mine) return;
    if (mine.firstFrameMs === null) note(mine.firstRow, "on screen");
    mine.firstFrameMs ??= now - mine.clickedAt;
    mine.shownAt.push(now);
    for (const change of mine.changes.values()) {
      if (change.onScreen || change.frame === null || frame.mediaTime * mine.fps < change.frame - 0.5) continue;
      change.onScreen = true;
      note(change.row, "on screen");
      get("delay").textContent = `${((now - change.askedAt) / 1000).toFixed(2)} s`;
    }
    watchFrames(mine);
  });
}

function look() {
  const mine = run;
  if (!mine?.id) return;
  mine.session.tellPosition(video.currentTime);
  showState(mine);
  const { aheadS, stalls, stalledMs } = mine.player;
  get("lead-bar").style.width = `${Math.min(100, (100 * aheadS) / 2)}%`;
  get("ahead").textContent = `${aheadS.toFixed(2)} s`;
  get("stalls").textContent = stalls ? `${stalls} · ${(stalledMs / 1000).toFixed(1)} s` : "0";
  get("shown").textContent = clock(video.currentTime) + (mine.frameCount ? ` of ${clock(mine.frameCount / mine.fps)}` : "");
  if (mine.firstFrameMs !== null) get("first-frame").textContent = `${Math.round(mine.firstFrameMs)} ms`;
  mine.shownAt = mine.shownAt.filter((at) => performance.now() - at < 1000);
  if (mine.firstFrameMs !== null) get("fps").textContent = `${mine.shownAt.length} fps`;
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  const parts = whole < 3600 ? [Math.floor(whole / 60), whole % 60] : [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return parts.map((part, index) => (index ? String(part).padStart(2, "0") : part)).join(":");
}

function addToTimeline(text, state, atS) {
  const row = document.createElement("li");
  for (const name of ["at", "text", "note"]) row.append(Object.assign(document.createElement("span"), { className: name }));
  row.querySelector(".text").textContent = text;
  get("timeline").prepend(row);
  get("prompts-title").hidden = false;
  note(row, state, atS);
  return row;
}

function note(row, state, atS = undefined) {
  row.dataset.state = state;
  row.querySelector(".note").textContent = state;
  if (atS !== undefined) row.querySelector(".at").textContent = atS === null ? "next" : `${atS.toFixed(2)} s`;
}

/** Makes a link that watches, or one that steers, too. */
async function shareVideo() {
  if (!run?.id) return;
  get("share-link").value = "";
  get("share-qr").replaceChildren();
  showError(null, "share-error");
  if (!get("share-dialog").open) get("share-dialog").showModal();
  try {
    const { link, qr } = await share(run.id, get("share-role").value);
    get("share-link").value = link;
    get("share-qr").replaceChildren(new DOMParser().parseFromString(qr, "image/svg+xml").documentElement);
  } catch (error) {
    showError(error, "share-error");
  }
}

async function copyLink() {
  get("share-link").select();
  try {
    await navigator.clipboard.writeText(get("share-link").value);
    get("share-copy").textContent = "Copied";
  } catch {
    get("share-copy").textContent = "Press Ctrl-C"; // the link is selected
  }
  setTimeout(() => { get("share-copy").textContent = "Copy"; }, 2000);
}

function submit() {
  const prompt = get("prompt").value.trim();
  if (get("start").disabled || !get("form").reportValidity()) return;
  if (!prompt) return showError("the prompt is empty: say what it shall show");
  showError(null);
  if (run) run.change(prompt);
  else start(prompt);
}

function askForKey(error) {
  key.forget();
  model = null;
  const missing = error?.code === "missing_api_key";
  if (missing) get("key-hint").textContent = `${error.message}. It stays in this tab and is forgotten with it.`;
  showError(missing ? null : error, "key-error");
  get("main").hidden = true;
  get("model").textContent = "needs a key";
  get("key-form").hidden = false;
  get("forget-key").hidden = true;
  get("key").focus();
  showControls();
}

/** A link like /#key=... opens the page with its key, which is gone from the address before anything is asked. */
function takeKeyFromAddress() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) key.keep(given);
  if (location.hash) history.replaceState(null, "", location.pathname + location.search);
}

async function load() {
  try {
    known = await models();
  } catch (error) {
    if (["missing_api_key", "invalid_api_key"].includes(error.code)) {
      return askForKey(error);
    }
    get("model").textContent = `${error.message}; trying again…`;
    setTimeout(load, ASK_AGAIN_MS);
    return;
  }
  get("key-form").hidden = true;
  get("main").hidden = false;
  get("forget-key").hidden = !key.value;
  get("model-choice").replaceChildren(...known.map(({ id }) => new Option(id, id)));
  get("model-field").hidden = known.length < 2;
  chooseModel();
  get("prompt").focus();
}

function chooseModel() {
  model = known.find(({ id }) => id === get("model-choice").value) ?? known[0];
  const [width, height] = model.sizes[0].split("x");
  const longestS = model.limits.max_seconds;
  document.documentElement.style.setProperty("--shape", `${width} / ${height}`);
  video.classList.toggle("enlarged", model.sizes.length > 1);
  get("model").textContent = `${model.id} · ${width}×${height} · ${model.fps} fps`;
  get("seconds").max = longestS;
  get("seconds").value = Math.min(get("seconds").value, longestS);
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
get("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.keep(get("key").value.trim());
  get("key").value = "";
  load();
});
get("forget-key").addEventListener("click", () => { stop(); askForKey(null); });
get("model-choice").addEventListener("change", chooseModel);
get("endless").addEventListener("change", showControls);
get("pause").addEventListener("click", togglePause);
get("stop").addEventListener("click", stop);
get("save").addEventListener("click", saveVideo);
get("share").addEventListener("click", shareVideo);
get("share-role").addEventListener("change", shareVideo);
get("share-copy").addEventListener("click", copyLink);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !get("share-dialog").open) stop();
  if (event.altKey && event.code === "KeyP") { event.preventDefault(); togglePause(); }
});
video.addEventListener("ended", finish);
video.addEventListener("timeupdate", look); // comes in a hidden tab, too, where timers are slow
addEventListener("pagehide", () => { if (run) end("idle", "stopped"); }); // the browser may keep the page: nobody watches
setInterval(look, LOOK_EVERY_MS);
takeKeyFromAddress();
load();
