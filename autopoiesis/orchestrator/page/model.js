// What the page knows: the parts that the stream has told, joined window by window.

const KEPT_WINDOWS = 360;

/** Turn a table of columns and rows into objects. */
function objects({ columns, rows }) {
  return rows.map((row) => Object.fromEntries(row.map((value, i) => [columns[i], value])));
}

export class Model {
  now = null;
  windows = [];
  arms = [];
  armById = new Map();
  cells = [];
  replicas = [];
  syntheses = [];
  events = [];
  /** window → Map of arm → share */
  shares = new Map();
  /** metric → [{window_id, observed, twin}] */
  twin = new Map();

  /** Take in one part; return whether anything but the figures of now has changed. */
  take(part, value) {
    if (part === "now") {
      this.now = value;
      return false;
    }
    const rows = objects(value);
    if (part === "windows") this.windows = joined(this.windows, rows);
    else if (part === "allocations") this.#takeShares(rows);
    else if (part === "twin_errors") this.#takeTwin(rows);
    else this[part] = rows;
    if (part === "arms") this.armById = new Map(rows.map((arm) => [arm.id, arm]));
    return true;
  }

  /** Forget everything: the stream begins anew, perhaps from another instance. */
  restart() {
    this.windows = [];
    this.shares = new Map();
    this.twin = new Map();
  }

  name(armId) {
    return this.armById.get(armId)?.name ?? armId.slice(0, 6);
  }

  origin(armId) {
    return this.armById.get(armId)?.origin ?? "human";
  }

  #takeShares(rows) {
    const fresh = new Map();
    for (const { window_id, arm_id, share } of rows) {
      if (!fresh.has(window_id)) fresh.set(window_id, new Map());
      fresh.get(window_id).set(arm_id, share);
    }
    const all = [...this.shares, ...fresh].sort((a, b) => a[0] - b[0]);
    this.shares = new Map(all.slice(-KEPT_WINDOWS - 1));
  }

  #takeTwin(rows) {
    for (const row of rows) {
      const known = this.twin.get(row.metric) ?? [];
      if (!known.length || known.at(-1).window_id < row.window_id) known.push(row);
      this.twin.set(row.metric, known.slice(-KEPT_WINDOWS));
    }
  }
}

function joined(known, fresh) {
  const last = known.length ? known.at(-1).window_id : -1;
  return [...known, ...fresh.filter((row) => row.window_id > last)].slice(-KEPT_WINDOWS);
}
