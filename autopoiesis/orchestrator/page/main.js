// The page: a model that the stream fills, and panels drawn from it at most once a frame.

import { drawArms } from "/page/arms.js";
import { LIVE, headers } from "/page/ask.js";
import { byId, say } from "/page/dom.js";
import { drawEvents } from "/page/events.js";
import { drawFamily } from "/page/family.js";
import { drawFleet } from "/page/fleet.js";
import { follow } from "/page/live.js";
import { Model } from "/page/model.js";
import { askForToken, drawOrders } from "/page/orders.js";
import { drawSynthesis } from "/page/synthesis.js";
import { themeButton } from "/page/theme.js";
import { trafficPanels } from "/page/traffic.js";

const SAYS = { connecting: "connecting", live: "live", lost: "server away, trying again", locked: "a token is needed" };

const model = new Model();
const panels = trafficPanels();
let waiting = false;
let stale = false;
let state = "connecting";

function draw() {
  waiting = false;
  if (!model.now) return;
  panels.now(model);
  if (!stale) return;
  stale = false;
  panels.windows(model);
  for (const panel of [drawFleet, drawArms, drawFamily, drawSynthesis, drawEvents, drawOrders]) panel(model);
}

function told(part, value) {
  if (part === "trouble") {
    say(byId("why"), value.message);
    return;
  }
  stale = model.take(part, value) || stale;
  if (!waiting) requestAnimationFrame(draw);
  waiting = true;
}

function changed(now) {
  if (now === "live" && state !== "live") model.restart();
  state = now;
  const pill = byId("connection");
  pill.dataset.state = now;
  say(pill, SAYS[now]);
  if (now === "locked") askForToken();
}

themeButton(byId("theme"));
follow(LIVE, headers, told, changed);
