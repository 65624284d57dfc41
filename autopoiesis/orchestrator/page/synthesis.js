// The log of synthesis cycles: why it was asked, what was answered, and what the gates said.

import { sql } from "/page/ask.js";
import { byId, h, show, when } from "/page/dom.js";
import { gain } from "/page/family.js";
import { brief, clock, number, plural, seconds } from "/page/format.js";

const FIRST = 8;
const MOST = 100;
const open = new Set();

export function drawSynthesis(model) {
  when(byId("synthesis"), [model.syntheses, model.arms.length], () =>
    model.syntheses.length
      ? model.syntheses.map((cycle) => drawCycle(model, cycle))
      : h("p", { class: "empty" }, "Nothing was asked for yet. New policies are asked for when regret or drift rises."),
  );
}

function drawCycle(model, cycle) {
  const body = h("div", { class: "cycle" });
  const details = h(
    "details",
    {
      open: open.has(cycle.synthesis),
      ontoggle: () => {
        if (!details.open) return open.delete(cycle.synthesis);
        open.add(cycle.synthesis);
        return answers(body, cycle, model);
      },
    },
    h(
      "summary",
      { "data-key": `cycle-${cycle.synthesis}` },
      h("time", {}, clock(cycle.started_s)),
      h("span", { class: cycle.promoted.length ? "tag promoted" : cycle.error ? "tag alarm" : "tag" }, cycle.promoted.length ? `${cycle.promoted.length} promoted` : cycle.error ? "failed" : "none promoted"),
      h("span", {}, cycle.error || cycle.conclusion),
    ),
    body,
  );
  return details;
}

async function answers(body, cycle, model) {
  try {
    const [window] = await sql(`select context from windows where window_id = ${cycle.window_id}`);
    const gates = await sql(`select gate, count(*) as count from candidates where synthesis = ${cycle.synthesis} group by gate order by count desc`);
    const candidates = await sql(
      `select position, arm_id, verdict, gate, gain, gain_low, gain_high, reason, parents, thought, source
       from candidates where synthesis = ${cycle.synthesis} order by verdict, gain desc nulls last limit ${MOST}`,
    );
    const drawn = candidates.map((candidate) => drawCandidate(candidate, model));
    show(
      body,
      theBrief(cycle, window, model),
      cost(cycle),
      h("p", { class: "quiet" }, "Decided at the gate: ", gates.map(({ gate, count }) => `${gate} ${count}`).join(", ")),
      drawn.slice(0, FIRST),
      drawn.length > FIRST && h("details", { class: "minor" }, h("summary", {}, h("span", {}, `the next ${drawn.length - FIRST}`)), drawn.slice(FIRST)),
    );
  } catch (error) {
    show(body, h("p", { class: "trouble", role: "alert" }, error.message));
  }
}

function theBrief(cycle, window, model) {
  const context = Object.entries(window?.context ?? {});
  return [
    h("h3", {}, "Brief"),
    h("p", {}, cycle.trigger, cycle.beaten && `. To be beaten: ${model.name(cycle.beaten)}.`),
    context.length > 0 &&
      h("details", { class: "minor" }, h("summary", {}, `the workload in window ${cycle.window_id}`), h("dl", { class: "facts" }, context.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, brief(value)))))),
    h("h3", {}, "Answers"),
  ];
}

function cost(cycle) {
  const parts = [plural(cycle.candidates, "candidate"), `by ${cycle.synthesizer}`, `in ${seconds(cycle.seconds)}`, `${seconds(cycle.cpu_seconds)} of CPU`];
  if (cycle.tokens) parts.push(`${number(cycle.tokens, 0)} tokens`, `$${number(cycle.cost_usd, 3)}`);
  return h("p", { class: "quiet" }, parts.join(", "));
}

function drawCandidate(candidate, model) {
  const parents = candidate.parents.map((id) => model.name(id)).join(", ");
  return h(
    "details",
    { class: "minor" },
    h("summary", {}, h("span", { class: `tag ${candidate.verdict}` }, candidate.gate), h("span", {}, `${gain(candidate)} `, h("span", { class: "quiet" }, candidate.reason))),
    parents && h("p", { class: "quiet" }, `made from ${parents}`),
    candidate.thought && h("p", {}, candidate.thought),
    h("pre", { class: "source", tabindex: "0", role: "region", "aria-label": "Policy" }, candidate.source),
  );
}
