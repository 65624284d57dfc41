// Questions and orders to the control API. Every path of it that this page uses stands here.

export const LIVE = "/live";
const SQL = "/sql";
const OPENAPI = "/openapi.json";

/** What an operator can order. `path` takes an arm's id where it has `{arm}`. */
export const ORDERS = [
  { name: "pin", path: "/arms/{arm}/pin", says: "Pin", about: "keep it from being retired" },
  { name: "unpin", path: "/arms/{arm}/unpin", says: "Unpin", about: "let it be retired again" },
  { name: "promote", path: "/arms/{arm}/promote", says: "Promote", about: "one step nearer to full traffic" },
  { name: "quarantine", path: "/arms/{arm}/quarantine", says: "Quarantine", about: "no traffic until it has another chance" },
  { name: "retire", path: "/arms/{arm}/retire", says: "Retire", about: "no traffic any more" },
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

/** Give an order; throws an Error with the server's sentence. */
export const order = (path, body) => post(path, body);

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
