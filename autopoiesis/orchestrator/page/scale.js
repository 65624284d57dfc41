// From values to pixels, and where the ticks of an axis go.

export function linear([from, to], [start, end]) {
  const factor = to === from ? 0 : (end - start) / (to - from);
  return (value) => start + (value - from) * factor;
}

/** Round tick values that cover [low, high] in about `count` steps. */
export function ticks(low, high, count) {
  const span = high - low || 1;
  const raw = span / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step + 0);
  return found;
}

const TIME_STEPS_S = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];

/** Whole seconds, minutes or hours of local time within [from_s, to_s]. */
export function timeTicks(from_s, to_s, count) {
  const raw = (to_s - from_s) / count;
  const step = TIME_STEPS_S.find((s) => s >= raw) ?? Math.ceil(raw / 86400) * 86400;
  const offset = new Date(from_s * 1000).getTimezoneOffset() * 60;
  const found = [];
  for (let t = Math.ceil((from_s - offset) / step) * step + offset; t <= to_s; t += step) found.push(t);
  return found;
}

export function timeLabel(unix_s, span_s) {
  const shape = { hour: "2-digit", minute: "2-digit", ...(span_s < 600 ? { second: "2-digit" } : {}) };
  return new Date(unix_s * 1000).toLocaleTimeString("en-GB", shape);
}
