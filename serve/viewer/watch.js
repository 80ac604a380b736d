// The bare page of a viewer's link: it plays what the link leads to. The token in the address is all that it knows.
import { canPlay, Player } from "./player.js";
import { chunks } from "./playlist.js";

const AHEAD_S = 20;
const LOOK_EVERY_MS = 250;
const OVER = "this link is over";
const get = (id) => document.getElementById(id);
const video = get("video");
const link = new URL(`../v1/shared/${location.pathname.split("/").at(-1)}`, location.href);
const below = (name) => new URL(`${link.pathname}/${name}`, link);

let over = false;

function show(state, text = state) {
  get("state").dataset.state = state;
  if (get("state").textContent !== text) get("state").textContent = text;
}

function fail(error) {
  if (error.name === "NotAllowedError") {
    get("play").hidden = false; // this browser plays when it is touched, not before
    return;
  }
  over = true;
  show("failed", error.status === 404 ? OVER : String(error.message ?? error));
}

async function asked() {
  for (;;) {
    const response = await fetch(link);
    if (!response.ok) throw Object.assign(new Error(`the server answered ${response.status}`), { status: response.status });
    const about = await response.json();
    if (about.status !== "queued") return about;
    await new Promise((done) => setTimeout(done, 500));
  }
}

/** Feeds the browser's own buffer, chunk by chunk. */
async function feed(mime) {
  const player = new Player(video, fail);
  await player.open(mime);
  const room = async () => {
    while (player.aheadS > AHEAD_S) await new Promise((done) => setTimeout(done, LOOK_EVERY_MS));
  };
  for await (const data of chunks(below("index.m3u8"), room)) player.append(data);
  player.end();
}

async function watch() {
  const about = await asked();
  const [width, height] = about.size.split("x");
  document.documentElement.style.setProperty("--shape", `${width} / ${height}`);
  document.documentElement.style.setProperty("--ratio", width / height);
  get("form").hidden = about.role !== "steer";
  if (canPlay(about.mime)) return feed(about.mime);
  video.src = below("index.m3u8"); // phones whose browser plays HLS itself, and nothing piece by piece
  await video.play();
}

async function steer(prompt) {
  const response = await fetch(below("interactions"), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ interaction: { event: { prompt } } }),
  });
  const answer = await response.json().catch(() => ({}));
  get("note").textContent = response.ok ? "it changes with the next chunk" : answer.detail ?? "the server does not answer";
}

function toggle() {
  if (video.paused) video.play().catch(fail);
  else video.pause();
}

function full() {
  if (document.fullscreenElement) document.exitFullscreen();
  else if (get("stage").requestFullscreen) get("stage").requestFullscreen();
  else video.webkitEnterFullscreen?.(); // phones that show nothing but a video so
}

video.addEventListener("playing", () => { get("play").hidden = true; if (!over) show("playing", "live"); });
video.addEventListener("waiting", () => { if (!over) show("waiting", "waiting…"); });
video.addEventListener("pause", () => { if (!video.ended) get("play").hidden = false; });
video.addEventListener("ended", () => { over = true; get("form").hidden = true; show("idle", "finished"); });
video.addEventListener("error", () => { if (video.src && !over) fail(video.error); });
video.addEventListener("click", toggle);
get("play").addEventListener("click", toggle);
get("full").addEventListener("click", full);
get("form").addEventListener("submit", (event) => {
  event.preventDefault();
  steer(get("prompt").value.trim());
});
watch().catch(fail);
