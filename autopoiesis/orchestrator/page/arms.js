// The table of arms.

import { colour } from "/page/colours.js";
import { byId, h, when } from "/page/dom.js";
import { number, percent } from "/page/format.js";

const COLUMNS = ["arm", "origin", "state", "traffic", "utility", "belief", "requests", "why in this state"];
let showAll = false;

export function drawArms(model) {
  const sorted = [...model.arms].sort((a, b) => b.traffic_share - a.traffic_share || (b.posterior_mean ?? -9) - (a.posterior_mean ?? -9));
  const shown = showAll ? sorted : sorted.filter(serves);
  const hidden = sorted.length - shown.length;
  when(byId("arms"), [shown, hidden, showAll], () => [
    h(
      "table",
      {},
      h("caption", { class: "hidden" }, "Arms, those with the most traffic first"),
      h("thead", {}, h("tr", {}, COLUMNS.map((name, i) => h("th", { scope: "col", class: i > 2 && i < 7 ? "right" : null }, name)))),
      h("tbody", {}, shown.map((arm) => drawRow(arm))),
    ),
    (hidden > 0 || showAll) &&
      h("button", {
        type: "button",
        class: "plain",
        "data-key": "all-arms",
        onclick: () => {
          showAll = !showAll;
          drawArms(model);
        },
      }, showAll ? "Show only those that serve" : `Show ${hidden} that do not serve`),
  ]);
}

function serves(arm) {
  return arm.traffic_share > 0 || (arm.kind !== "slow" && (arm.state === "live" || arm.state === "canary"));
}

function drawRow(arm) {
  const dot = h("span", { class: "dot" });
  dot.style.background = colour(arm.id, arm.origin);
  const belief = arm.posterior_mean === null ? "–" : `${number(arm.posterior_mean, 3)} ± ${number(arm.posterior_sd, 3)}`;
  return h(
    "tr",
    {},
    h("th", { scope: "row" }, dot, arm.name, arm.kind !== "fast" && h("span", { class: "tag", title: "decides on plans" }, arm.kind), arm.pinned && h("span", { class: "tag", title: "pinned" }, "pinned"), h("code", { class: "quiet" }, arm.id.slice(0, 6))),
    h("td", {}, arm.origin),
    h("td", {}, h("span", { class: `tag ${arm.state}` }, arm.state)),
    h("td", { class: "right" }, arm.traffic_share ? percent(arm.traffic_share) : "–"),
    h("td", { class: "right" }, number(arm.utility, 3)),
    h("td", { class: "right" }, belief),
    h("td", { class: "right" }, number(arm.requests, 0)),
    h("td", { class: "reason" }, arm.reason),
  );
}
