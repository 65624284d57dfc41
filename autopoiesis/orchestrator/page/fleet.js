// Replicas, grouped by the cells of the allocation that serves now.

import { colour } from "/page/colours.js";
import { byId, h, when } from "/page/dom.js";
import { number, percent, plural } from "/page/format.js";

export function drawFleet(model) {
  const states = new Map(model.replicas.map((replica) => [replica.replica, replica]));
  when(byId("fleet"), [model.cells, model.replicas, model.arms.map((arm) => arm.name)], () =>
    model.cells.length
      ? h("ul", { class: "cells" }, model.cells.map((cell) => drawCell(model, cell, states)))
      : h("p", { class: "empty" }, "No allocation yet."),
  );
}

function drawCell(model, cell, states) {
  const arm = model.armById.get(cell.arm_id);
  const element = h(
    "li",
    { class: "cell" },
    h("h3", {}, model.name(cell.arm_id), " ", h("span", { class: "tag" }, arm?.origin ?? "")),
    h("p", { class: "quiet" }, `${percent(cell.share)} of the traffic, drawn with probability ${number(cell.propensity, 2)}`),
    h("ul", { class: "replicas" }, cell.replicas.map((name) => drawReplica(name, states.get(name)))),
  );
  element.style.setProperty("--arm", colour(cell.arm_id, model.origin(cell.arm_id)));
  return element;
}

function drawReplica(name, state) {
  if (!state) return h("li", { class: "replica" }, h("b", {}, name), h("span", { class: "quiet" }, "not seen yet"));
  const bar = h("span", { class: "fill" });
  bar.style.width = `${Math.min(100, 100 * state.kv_usage)}%`;
  return h(
    "li",
    { class: state.healthy ? "replica" : "replica ill" },
    h("b", {}, name),
    h("span", {}, state.healthy ? `${plural(state.in_flight, "request")}` : "does not answer"),
    h("span", { class: "quiet" }, `running ${number(state.running, 0)}, waiting ${number(state.waiting, 0)}`),
    h("span", { class: "meter", role: "img", "aria-label": `KV cache ${percent(state.kv_usage)} full` }, bar),
    h("span", { class: "quiet" }, `KV ${percent(state.kv_usage)}, prefix hits ${percent(state.hit_rate)}`),
  );
}
