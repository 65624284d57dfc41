// Panels over time: who serves, utility, regret, workload and latency against the objective, the twin.

import { Chart } from "/page/chart.js";
import { colour } from "/page/colours.js";
import { byId, h, say, show, when } from "/page/dom.js";
import { ago, brief, clock, missing, number, percent, plural, seconds } from "/page/format.js";

const FIGURES = [
  ["requests/s", (now) => number(now.traffic.requests_rps, 1), null],
  ["output tokens/s", (now) => number(now.traffic.tokens_s, 0), null],
  ["in flight", (now) => number(now.traffic.in_flight, 0), null],
  ["TTFT median", (now) => seconds(now.traffic.ttft_p50_s), (now) => over(now.traffic.ttft_p50_s, now.objective.slo_ttft_s)],
  ["TTFT 99 %", (now) => seconds(now.traffic.ttft_p99_s), (now) => over(now.traffic.ttft_p99_s, now.objective.slo_ttft_s)],
  ["TPOT median", (now) => seconds(now.traffic.tpot_p50_s), (now) => over(now.traffic.tpot_p50_s, now.objective.slo_tpot_s)],
  ["utility", (_, last) => number(last?.utility, 3), null],
  ["regret", (_, last) => number(last?.regret, 3), null],
];

const over = (value, limit) => !missing(value) && value > limit;

/** Make the panels; return the function that draws them from the model. */
export function trafficPanels() {
  const axis = (value, isTick) => (isTick ? String(Number(value.toPrecision(3))) : brief(value));
  const time = (value, isTick) => (isTick ? (value < 1 && value > 0 ? `${Number((value * 1000).toPrecision(3))} ms` : `${Number(value.toPrecision(3))} s`) : seconds(value));
  const charts = {
    allocation: new Chart(byId("allocation"), { title: "Who serves", format: percent, height: 240, stacked: true, range: [0, 1] }),
    utility: new Chart(byId("utility"), { title: "Utility", format: axis, range: [0, 1] }),
    regret: new Chart(byId("regret"), { title: "Regret", format: axis, floor: 0.05 }),
    rate: new Chart(byId("rate"), { title: "Requests a second", format: axis }),
    tokens: new Chart(byId("tokens"), { title: "Output tokens a second", format: axis }),
    ttft: new Chart(byId("ttft"), { title: "Time to first token", format: time }),
    tpot: new Chart(byId("tpot"), { title: "Time per output token", format: time }),
  };
  const twins = new Map();
  const figures = FIGURES.map(([name]) => {
    const value = h("dd", {}, "–");
    return { box: h("div", { class: "figure" }, h("dt", {}, name), value), value };
  });
  show(byId("figures"), h("dl", {}, figures.map((figure) => figure.box)));

  return {
    now(model) {
      FIGURES.forEach(([, text, warns], i) => {
        say(figures[i].value, text(model.now, model.windows.at(-1)));
        figures[i].box.classList.toggle("over", Boolean(warns?.(model.now)));
      });
      byId("rails").hidden = !model.now.guard_rails;
      say(byId("rails"), model.now.guard_rails);
      say(byId("in-force"), `In force: ${model.now.guard_rails || "nothing"}.`);
      say(byId("why"), model.now.allocation || "Waiting for the first window.");
      say(
        byId("instance"),
        `window ${model.now.window ?? "–"} of ${number(model.now.window_s, 0)} s, up ${ago(model.now.uptime_s)}` +
          (model.now.synthesis.running ? ", writing policies" : ""),
      );
    },
    windows(model) {
      const rows = model.windows;
      const column = (name) => rows.map((row) => row[name]);
      const marks = rows.flatMap((row, index) => (row.drift ? [{ index, text: `drift: ${row.drift}` }] : []));
      const base = { from: column("started_s"), to: column("ended_s"), names: rows.map((row) => `window ${row.window_id}`), marks };
      const span = rows.map((row) => row.ended_s - row.started_s || 1);
      const { slo_ttft_s, slo_tpot_s } = model.now.objective;
      charts.allocation.draw({ ...base, series: layers(model, rows) });
      charts.utility.draw({ ...base, series: [{ name: "utility", colour: "var(--cool-1)", values: column("utility") }] });
      charts.regret.draw({
        ...base,
        series: [{ name: "regret", colour: "var(--warm-1)", values: column("regret"), low: column("regret_low"), high: column("regret_high") }],
      });
      charts.rate.draw({
        ...base,
        series: [
          { name: "all", colour: "var(--cool-3)", values: rows.map((row, i) => row.requests / span[i]) },
          { name: "within the objective", colour: "var(--cool-1)", values: column("goodput_rps") },
          { name: "shed or failed", colour: "var(--warm-2)", values: rows.map((row, i) => (row.shed + row.failed) / span[i]) },
        ],
      });
      charts.tokens.draw({ ...base, series: [{ name: "tokens/s", colour: "var(--cool-2)", values: column("throughput_tokens_s") }] });
      charts.ttft.draw({ ...base, series: quantiles(column, "ttft"), limit: { value: slo_ttft_s, text: `objective ${seconds(slo_ttft_s)}` } });
      charts.tpot.draw({ ...base, series: quantiles(column, "tpot"), limit: { value: slo_tpot_s, text: `objective ${seconds(slo_tpot_s)}` } });
      drawTwin(model, twins, time, axis);
      drawAlarms(rows);
    },
  };
}

function quantiles(column, name) {
  return [
    { name: "median", colour: "var(--cool-1)", values: column(`${name}_p50_s`) },
    { name: "99 %", colour: "var(--warm-1)", values: column(`${name}_p99_s`) },
  ];
}

/** One layer per arm that served in the time shown, people's arms below. */
function layers(model, rows) {
  const shares = rows.map((row) => model.shares.get(row.window_id) ?? new Map());
  const served = [...new Set(shares.flatMap((window) => [...window.keys()]))];
  const rank = (id) => (model.origin(id) === "human" ? 0 : 1);
  served.sort((a, b) => rank(a) - rank(b));
  return served.map((id) => ({
    name: model.name(id),
    colour: colour(id, model.origin(id)),
    values: shares.map((window) => window.get(id) ?? 0),
  }));
}

const METRICS = { ttft_mean_s: "mean TTFT", tpot_mean_s: "mean TPOT", e2e_mean_s: "mean end-to-end time", utility: "utility" };

function drawTwin(model, twins, time, axis) {
  const times = new Map(model.windows.map((row) => [row.window_id, row]));
  for (const [metric, all] of model.twin) {
    const rows = all.filter((row) => times.has(row.window_id));
    if (!twins.has(metric)) {
      const error = h("p", { class: "quiet" });
      const host = h("div", { class: "multiple" }, h("h3", {}, METRICS[metric] ?? metric), error);
      byId("twin").append(host);
      const format = metric.endsWith("_s") ? time : axis;
      twins.set(metric, { error, chart: new Chart(host, { title: `Twin: ${METRICS[metric] ?? metric}`, format, height: 140 }) });
    }
    const { error, chart } = twins.get(metric);
    const size = rows.reduce((sum, row) => sum + Math.abs(row.observed), 0);
    const wrong = rows.reduce((sum, row) => sum + Math.abs(row.twin - row.observed), 0);
    say(error, size ? `off by ${percent(wrong / size)} on average over ${plural(rows.length, "window")}` : "nothing to compare yet");
    chart.draw({
      from: rows.map((row) => times.get(row.window_id).started_s),
      to: rows.map((row) => times.get(row.window_id).ended_s),
      names: rows.map((row) => `window ${row.window_id}`),
      series: [
        { name: "observed", colour: "var(--cool-1)", values: rows.map((row) => row.observed) },
        { name: "twin", colour: "var(--warm-1)", values: rows.map((row) => row.twin) },
      ],
    });
  }
}

function drawAlarms(rows) {
  const alarms = rows.filter((row) => row.drift).reverse().slice(0, 20);
  when(byId("alarms"), [rows.length > 0, alarms.map((row) => row.window_id)], () =>
    alarms.length
      ? h("ol", { class: "list" }, alarms.map((row) => h("li", {}, h("time", {}, clock(row.started_s)), h("span", { class: "tag alarm" }, row.drift), ` window ${row.window_id}`)))
      : h("p", { class: "empty" }, `No drift in the last ${plural(rows.length, "window")}.`),
  );
}
