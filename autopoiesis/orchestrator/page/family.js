// The family tree of arms, and two policies side by side with how the younger did in its races.

import { sql } from "/page/ask.js";
import { colour } from "/page/colours.js";
import { linesSideBySide } from "/page/difference.js";
import { byId, h, s, show, when } from "/page/dom.js";
import { number } from "/page/format.js";

const COLUMN = 210;
const ROW = 34;
const BOX = 176;
let chosen = { left: null, right: null };

export function drawFamily(model) {
  const nodes = placed(model.arms);
  const key = [nodes.map((node) => [node.arm.id, node.arm.state, node.arm.name]), chosen];
  when(byId("family"), key, () => (nodes.some((node) => node.depth) ? tree(model, nodes) : [tree(model, nodes), h("p", { class: "empty" }, "No synthesized arm yet.")]));
}

/** Give each arm that has family its place: depth by generation, rows in order of the first parent. */
function placed(arms) {
  const byArm = new Map(arms.map((arm) => [arm.id, arm]));
  const children = new Map(arms.map((arm) => [arm.id, []]));
  for (const arm of arms) for (const parent of arm.parents) children.get(parent)?.push(arm);
  const related = arms.filter((arm) => children.get(arm.id).length || arm.parents.length || arm.origin !== "human");
  const depths = new Map();
  const depth = (arm, seen = new Set()) => {
    if (depths.has(arm.id) || seen.has(arm.id)) return depths.get(arm.id) ?? 0;
    const parents = arm.parents.map((id) => byArm.get(id)).filter(Boolean);
    const found = parents.length ? 1 + Math.max(...parents.map((p) => depth(p, new Set([...seen, arm.id])))) : arm.origin === "human" ? 0 : 1;
    depths.set(arm.id, found);
    return found;
  };
  const nodes = [];
  const done = new Set();
  let row = 0;
  const place = (arm) => {
    if (done.has(arm.id)) return;
    done.add(arm.id);
    const first = row;
    children.get(arm.id).forEach(place);
    if (row === first) row++;
    nodes.push({ arm, depth: depth(arm), row: (first + row - 1) / 2 });
  };
  related.filter((arm) => !arm.parents.some((id) => byArm.has(id))).forEach(place);
  related.forEach(place);
  return nodes;
}

function tree(model, nodes) {
  if (!nodes.length) return null;
  const width = (Math.max(...nodes.map((node) => node.depth)) + 1) * COLUMN;
  const height = (Math.max(...nodes.map((node) => node.row)) + 1) * ROW + 8;
  const at = new Map(nodes.map((node) => [node.arm.id, { x: node.depth * COLUMN + 4, y: node.row * ROW + 4 }]));
  const edges = nodes.flatMap(({ arm }) =>
    arm.parents.filter((id) => at.has(id)).map((id) => {
      const [a, b] = [at.get(id), at.get(arm.id)];
      const [x0, y0, x1, y1] = [a.x + BOX, a.y + 13, b.x, b.y + 13];
      return s("path", { class: "edge", d: `M${x0} ${y0}C${x0 + 20} ${y0} ${x1 - 20} ${y1} ${x1} ${y1}` });
    }),
  );
  return h("div", { class: "tree" }, s("svg", { width, height, "aria-hidden": "true" }, edges), boxes(model, nodes, at, width, height));
}

function boxes(model, nodes, at, width, height) {
  const list = h("ul", { "aria-label": "Arms with relatives" });
  list.style.width = `${width}px`;
  list.style.height = `${height}px`;
  for (const { arm } of nodes) {
    const button = h(
      "button",
      {
        type: "button",
        class: `node ${arm.state}`,
        "data-key": arm.id,
        "aria-pressed": String(arm.id === chosen.right),
        title: `${arm.name}: ${arm.state}. ${arm.reason}`,
        onclick: () => choose(model, arm, arm.parents.find((id) => model.armById.has(id)) ?? null),
      },
      arm.name,
    );
    button.style.setProperty("--arm", colour(arm.id, arm.origin));
    const item = h("li", {}, button);
    item.style.transform = `translate(${at.get(arm.id).x}px, ${at.get(arm.id).y}px)`;
    list.append(item);
  }
  return list;
}

/** Show an arm beside another one, its parent unless another was picked. */
async function choose(model, arm, otherId) {
  chosen = { left: otherId, right: arm.id };
  drawFamily(model);
  const host = byId("diff");
  try {
    const ids = [arm.id, otherId].filter(Boolean).map((id) => `'${id}'`).join(", ");
    const sources = new Map((await sql(`select id, source, thought from arms where id in (${ids})`)).map((row) => [row.id, row]));
    const races = await sql(
      `select synthesis, gate, verdict, gain, gain_low, gain_high, candidates.reason, trigger
       from candidates join syntheses using (synthesis) where arm_id = '${arm.id}' order by synthesis`,
    );
    if (chosen.right !== arm.id) return;
    show(host, h("h3", {}, `${arm.name} `, h("span", { class: `tag ${arm.state}` }, arm.state)), h("p", { class: "quiet" }, arm.reason), sources.get(arm.id)?.thought && h("p", {}, sources.get(arm.id).thought), raceList(races), picker(model, arm, otherId), sideBySide(model, sources.get(otherId), sources.get(arm.id), arm));
  } catch (error) {
    show(host, h("p", { class: "trouble", role: "alert" }, error.message));
  }
}

function picker(model, arm, otherId) {
  const select = h(
    "select",
    { onchange: (event) => choose(model, arm, event.target.value || null) },
    h("option", { value: "" }, "nothing"),
    model.arms.filter((other) => other.id !== arm.id).map((other) => h("option", { value: other.id, selected: other.id === otherId }, other.name)),
  );
  return h("label", { class: "inline" }, "Beside: ", select);
}

function raceList(races) {
  if (!races.length) return null;
  return h(
    "ul",
    { class: "list" },
    races.map((race) =>
      h("li", {}, h("span", { class: `tag ${race.verdict}` }, race.verdict), ` cycle ${race.synthesis}, gate ${race.gate}: ${gain(race)} `, h("span", { class: "quiet" }, race.reason)),
    ),
  );
}

export function gain(row) {
  if (row.gain === null) return "no gain measured.";
  const interval = row.gain_low === null ? "" : ` (${number(row.gain_low, 3)} to ${number(row.gain_high, 3)})`;
  return `gain ${row.gain > 0 ? "+" : ""}${number(row.gain, 3)}${interval}.`;
}

function sideBySide(model, left, right, arm) {
  if (!right) return h("p", { class: "empty" }, "Its policy is not stored.");
  if (!left) return h("pre", { class: "source", tabindex: "0", role: "region", "aria-label": `Policy of ${arm.name}` }, right.source);
  const rows = linesSideBySide(left.source.trimEnd().split("\n"), right.source.trimEnd().split("\n"));
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": `${model.name(left.id)} beside ${arm.name}` },
    h(
      "table",
      { class: "diff" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, model.name(left.id)), h("th", { scope: "col" }, arm.name))),
      h("tbody", {}, rows.map(([before, after, same]) => h("tr", {}, side(before, same, "gone"), side(after, same, "new")))),
    ),
  );
}

function side(line, same, kind) {
  if (line === null) return h("td", { class: "none" });
  if (same) return h("td", {}, h("code", {}, line));
  return h("td", { class: kind }, h("code", {}, h("span", { class: "hidden" }, kind === "gone" ? "removed: " : "added: "), line));
}
