// Numbers and times as people read them.

const cache = new Map();

function formatter(digits) {
  if (!cache.has(digits)) {
    cache.set(digits, new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  }
  return cache.get(digits);
}

export const missing = (value) => value === null || value === undefined || Number.isNaN(value);

export const number = (value, digits = 2) => (missing(value) ? "–" : formatter(digits).format(value));

export const percent = (share) => (missing(share) ? "–" : `${formatter(0).format(100 * share)} %`);

/** Three significant digits: 0.0123, 1.23, 123, 12,345. */
export function brief(value) {
  if (missing(value)) return "–";
  const size = Math.abs(value);
  return number(value, size === 0 || size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 ? 2 : 3);
}

/** A duration: milliseconds below a second. */
export function seconds(value) {
  if (missing(value)) return "–";
  return value < 1 ? `${number(value * 1000, value < 0.01 ? 1 : 0)} ms` : `${number(value, value < 10 ? 2 : 1)} s`;
}

export function clock(unix_s) {
  return new Date(unix_s * 1000).toLocaleTimeString("en-GB");
}

export function ago(duration_s) {
  if (duration_s < 90) return `${Math.round(duration_s)} s`;
  if (duration_s < 5400) return `${Math.round(duration_s / 60)} min`;
  return duration_s < 172800 ? `${Math.round(duration_s / 3600)} h` : `${Math.round(duration_s / 86400)} days`;
}

export const plural = (count, word) => `${number(count, 0)} ${word}${count === 1 ? "" : "s"}`;
