// A time chart in SVG: lines with bands, or areas stacked on each other. A pointer or the arrow keys read it.

import { h, s, say, show } from "/page/dom.js";
import { clock, missing } from "/page/format.js";
import { linear, ticks, timeLabel, timeTicks } from "/page/scale.js";

const LEFT = 44;
const RIGHT = 12;
const TOP = 14;
const BOTTOM = 22;

/**
 * `data`: {from: [s], to: [s], names: [window label], series: [{name, colour, values, low, high, dashed}],
 * limit: {value, text}, marks: [{index, text}]}. All arrays have one entry per window; null is nothing.
 */
export class Chart {
  #data = null;
  #cursor = -1;
  #width = 0;

  constructor(host, { title, format, height = 180, stacked = false, range = null, floor = 0 }) {
    Object.assign(this, { title, format, height, stacked, range, floor });
    this.legend = h("ul", { class: "legend" });
    this.canvas = s("svg", { "aria-hidden": "true", height, width: "100%" });
    this.tip = h("div", { class: "tip", hidden: true });
    this.frame = h(
      "div",
      {
        class: "chart",
        tabindex: "0",
        role: "group",
        "aria-roledescription": "chart",
        onpointermove: (event) => this.#point(event),
        onpointerleave: () => this.#move(-1),
        onblur: () => this.#move(-1),
        onkeydown: (event) => this.#key(event),
      },
      this.canvas,
      this.tip,
    );
    host.append(this.legend, this.frame);
    new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (width && width !== this.#width) {
        this.#width = width;
        this.#paint();
      }
    }).observe(this.frame);
  }

  draw(data) {
    this.#data = data;
    this.#drawLegend();
    this.#paint();
  }

  #drawLegend() {
    const items = this.#data.series.filter((line) => line.name);
    const key = JSON.stringify(items.map((line) => [line.name, line.colour]));
    if (this.legend.dataset.made === key) return;
    this.legend.dataset.made = key;
    show(
      this.legend,
      items.map((line) => {
        const swatch = h("span", { class: line.dashed ? "swatch thin" : "swatch" });
        swatch.style.background = line.colour;
        return h("li", {}, swatch, line.name);
      }),
    );
  }

  #paint() {
    const data = this.#data;
    if (!data || !this.#width) return;
    const label = data.from.length ? this.#summary() : "nothing measured yet";
    this.frame.setAttribute("aria-label", `${this.title}: ${label}. Arrow keys read single windows.`);
    this.canvas.setAttribute("viewBox", `0 0 ${this.#width} ${this.height}`);
    if (!data.from.length) {
      show(this.canvas, s("text", { x: LEFT, y: this.height / 2, class: "axis" }, "Nothing measured yet."));
      return;
    }
    const start_s = data.from[0];
    const end_s = Math.max(data.to.at(-1), start_s + 1);
    this.x = linear([start_s, end_s], [LEFT, this.#width - RIGHT]);
    const [low, high] = this.range ?? this.#extent();
    this.y = linear([low, high], [this.height - BOTTOM, TOP]);
    const layers = this.stacked ? this.#areas() : data.series.map((line) => this.#line(line));
    show(
      this.canvas,
      this.#axes(low, high, start_s, end_s),
      layers,
      this.#limit(low, high),
      this.#marks(),
      s("line", { class: "cursor", y1: TOP, y2: this.height - BOTTOM, visibility: "hidden" }),
    );
    if (this.#cursor >= 0) this.#move(Math.min(this.#cursor, data.from.length - 1));
  }

  #extent() {
    const values = this.#data.series.flatMap((line) => [line.values, line.low ?? [], line.high ?? []].flat());
    const real = values.filter((value) => !missing(value));
    const top = Math.max(...real, this.#data.limit?.value ?? 0, this.floor);
    const bottom = Math.min(0, ...real);
    const steps = ticks(bottom, top * 1.05 || 1, 4);
    return [Math.min(bottom, steps[0]), Math.max(top * 1.05, steps.at(-1)) || 1];
  }

  #axes(low, high, start_s, end_s) {
    const right = this.#width - RIGHT;
    const span = end_s - start_s;
    const across = ticks(low, high, this.height > 200 ? 5 : 4).map((value) => [
      s("line", { class: value === 0 ? "base" : "grid", x1: LEFT, x2: right, y1: this.y(value), y2: this.y(value) }),
      s("text", { class: "axis", x: LEFT - 6, y: this.y(value) + 4, "text-anchor": "end" }, this.format(value, true)),
    ]);
    const along = timeTicks(start_s, end_s, Math.max(2, Math.floor(this.#width / 110))).map((t) => {
      const anchor = this.x(t) > right - 26 ? "end" : this.x(t) < LEFT + 26 ? "start" : "middle";
      return s("text", { class: "axis", x: this.x(t), y: this.height - 5, "text-anchor": anchor }, timeLabel(t, span));
    });
    return [across, along];
  }

  /** Middle of each window, where its value is drawn. */
  #middle(index) {
    return this.x((this.#data.from[index] + this.#data.to[index]) / 2);
  }

  #line(line) {
    const points = line.values.map((value, i) => (missing(value) ? null : [this.#middle(i), this.y(value)]));
    const shapes = [];
    if (line.low) {
      for (const run of runs(line.low.map((v, i) => !missing(v) && !missing(line.high[i])))) {
        const upper = run.map((i) => `${this.#middle(i).toFixed(1)},${this.y(line.high[i]).toFixed(1)}`);
        const lower = run.map((i) => `${this.#middle(i).toFixed(1)},${this.y(line.low[i]).toFixed(1)}`).reverse();
        shapes.push(s("polygon", { class: "band", points: [...upper, ...lower].join(" "), fill: line.colour }));
      }
    }
    for (const run of runs(points.map(Boolean))) {
      const path = run.map((i) => `${points[i][0].toFixed(1)},${points[i][1].toFixed(1)}`).join(" ");
      const attributes = { class: line.dashed ? "line thin" : "line", stroke: line.colour };
      shapes.push(
        run.length === 1
          ? s("circle", { cx: points[run[0]][0], cy: points[run[0]][1], r: 2, fill: line.colour })
          : s("polyline", { ...attributes, points: path }),
      );
    }
    return shapes;
  }

  /** Areas with steps: an allocation is the same for a whole window. Where no window was, nothing is drawn. */
  #areas() {
    const { from, to } = this.#data;
    const joins = from.map((start, i) => i > 0 && start - to[i - 1] < (to[i] - start) / 2);
    const base = from.map(() => 0);
    return this.#data.series.map((layer) => {
      const pieces = [];
      layer.values.forEach((value, i) => {
        const [x0, x1] = [this.x(from[i]).toFixed(1), this.x(to[i]).toFixed(1)];
        const [y0, y1] = [this.y(base[i]).toFixed(1), this.y(base[i] + (value ?? 0)).toFixed(1)];
        if (!joins[i]) pieces.push({ out: [], back: [] });
        pieces.at(-1).out.push(`${x0},${y1}`, `${x1},${y1}`);
        pieces.at(-1).back.push(`${x0},${y0}`, `${x1},${y0}`);
        base[i] += value ?? 0;
      });
      return pieces.map(({ out, back }) => s("polygon", { class: "area", fill: layer.colour, points: [...out, ...back.reverse()].join(" ") }));
    });
  }

  #limit(low, high) {
    const limit = this.#data.limit;
    if (!limit || limit.value < low || limit.value > high) return null;
    const [y, right] = [this.y(limit.value), this.#width - RIGHT];
    return [
      s("line", { class: "limit", x1: LEFT, x2: right, y1: y, y2: y }),
      s("text", { class: "axis halo", x: LEFT + 4, y: y - 4 }, limit.text),
    ];
  }

  #marks() {
    return (this.#data.marks ?? []).map(({ index, text }) => {
      const x = this.x(this.#data.from[index]);
      return s(
        "g",
        { class: "mark" },
        s("line", { x1: x, x2: x, y1: TOP - 4, y2: this.height - BOTTOM }),
        s("path", { d: `M${x - 5} ${TOP - 12}h10l-5 8z` }, s("title", {}, text)),
      );
    });
  }

  #summary() {
    return this.#data.series
      .map((line) => {
        const real = line.values.filter((value) => !missing(value));
        if (!real.length) return null;
        const [least, most] = [Math.min(...real), Math.max(...real)];
        return `${line.name} now ${this.format(line.values.at(-1))}, from ${this.format(least)} to ${this.format(most)}`;
      })
      .filter(Boolean)
      .join("; ");
  }

  #point(event) {
    if (!this.#data?.from.length || !this.x) return;
    const at = event.clientX - this.frame.getBoundingClientRect().left;
    this.tip.setAttribute("aria-live", "off");
    let nearest = 0;
    this.#data.from.forEach((_, i) => {
      if (Math.abs(this.#middle(i) - at) < Math.abs(this.#middle(nearest) - at)) nearest = i;
    });
    this.#move(nearest);
  }

  #key(event) {
    const last = (this.#data?.from.length ?? 0) - 1;
    if (last < 0) return;
    const from = this.#cursor < 0 ? last + 1 : this.#cursor;
    const moves = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last, Escape: -1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.tip.setAttribute("aria-live", "polite");
    this.#move(event.key === "Escape" ? -1 : Math.max(0, Math.min(last, moves[event.key])));
  }

  #move(index) {
    this.#cursor = index;
    const cursor = this.canvas.querySelector(".cursor");
    this.tip.hidden = index < 0;
    cursor?.setAttribute("visibility", index < 0 ? "hidden" : "visible");
    if (index < 0 || !cursor) return;
    const x = this.#middle(index);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    const rows = this.#data.series
      .filter((line) => !missing(line.values[index]) && !(this.stacked && !line.values[index]))
      .map((line) => {
        const swatch = h("span", { class: "swatch" });
        swatch.style.background = line.colour;
        const interval = line.low && !missing(line.low[index]) ? ` (${this.format(line.low[index])} to ${this.format(line.high[index])})` : "";
        return h("div", { class: "row" }, swatch, h("span", {}, line.name), h("b", {}, this.format(line.values[index]) + interval));
      });
    const mark = (this.#data.marks ?? []).find((m) => m.index === index);
    const head = h("div", { class: "when" });
    say(head, `${this.#data.names[index]}, ${clock(this.#data.from[index])}`);
    show(this.tip, head, rows, mark && h("div", { class: "drift" }, mark.text));
    const width = this.tip.offsetWidth;
    const left = x + 14 + width > this.#width ? Math.max(0, x - 14 - width) : x + 14;
    this.tip.style.transform = `translate(${left}px, 8px)`;
  }
}

/** Split the indices that hold into runs of neighbours. */
function runs(holds) {
  const found = [];
  holds.forEach((held, i) => {
    if (!held) return;
    if (i && holds[i - 1] && found.length) found.at(-1).push(i);
    else found.push([i]);
  });
  return found;
}
