// Questions and orders to the control API. Every path of it that this page uses stands here.

export const LIVE = "/live";
const SQL = "/sql";
const OPENAPI = "/openapi.json";

const STEP = "/arms/{arm}/{step}";
const CONTROL = "/control/{order}";

/** What an operator can order; `isForArm`: it needs the arm that is chosen. */
export const ORDERS = [
  { route: STEP, name: "pin", says: "Pin", about: "keep it from being retired", isForArm: true },
  { route: STEP, name: "unpin", says: "Unpin", about: "let it be retired again", isForArm: true },
  { route: STEP, name: "promote", says: "Promote", about: "one step nearer to full traffic", isForArm: true },
  { route: STEP, name: "quarantine", says: "Quarantine", about: "no traffic until it has another chance", isForArm: true },
  { route: STEP, name: "retire", says: "Retire", about: "no traffic any more", isForArm: true },
  { route: CONTROL, name: "allocate", says: "All traffic", about: "it has all traffic, as long as it serves", isForArm: true },
  { route: CONTROL, name: "freeze", says: "Freeze", about: "allocation and arms stay as they are; learning goes on" },
  { route: CONTROL, name: "unfreeze", says: "Unfreeze", about: "the loop decides again" },
  { route: CONTROL, name: "rollback", says: "Roll back", about: "to the last allocation that was good, and freeze it" },
  { route: CONTROL, name: "human-only", says: "Human only", about: "only arms that people wrote have traffic", on: true },
  { route: CONTROL, name: "human-only", says: "End human only", about: "synthesized arms may serve again", on: false },
  { route: CONTROL, name: "dry-run", says: "Dry run", about: "the loop says what it would do, and nothing is done", on: true },
  { route: CONTROL, name: "dry-run", says: "End dry run", about: "what the loop decides is done again", on: false },
  { route: CONTROL, name: "release", says: "Release", about: "lift all of these orders" },
];

let token = sessionStorage.getItem("token") ?? "";

export const hasToken = () => Boolean(token);

export function setToken(given) {
  token = given.trim();
  sessionStorage.setItem("token", token);
}

export const headers = () => (token ? { Authorization: `Bearer ${token}` } : {});

/** Ask the telemetry with one SELECT; rows come as objects. Throws an Error with the server's sentence. */
export async function sql(query) {
  const { columns, rows } = await post(SQL, { query });
  return rows.map((row) => Object.fromEntries(row.map((value, i) => [columns[i], value])));
}

/** Give one of ORDERS, for an arm's id; throws an Error with the server's sentence. */
export function give({ route, name, isForArm, on }, arm, said) {
  const path = route.replace("{arm}", encodeURIComponent(arm)).replace(/\{(step|order)\}/, name);
  const more = route === CONTROL ? { ...(isForArm ? { arm } : {}), ...(on === undefined ? {} : { on }) } : {};
  return post(path, { ...said, ...more });
}

/** Return which paths the instance takes orders on, as OpenAPI names them; none where it describes nothing. */
export async function ordersTaken() {
  const answer = await fetch(OPENAPI, { headers: headers() });
  if (!answer.ok) return new Set();
  const { paths } = await answer.json();
  return new Set(Object.keys(paths).filter((path) => "post" in paths[path]));
}

async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
  });
  const told = await answer.json().catch(() => null);
  if (!answer.ok) throw new Error(told?.error?.message ?? `${path} answered ${answer.status}`);
  return told;
}
