// What an operator can do: only what the instance says it takes, and only with the token.

import { ORDERS, give, hasToken, ordersTaken, setToken } from "/page/ask.js";
import { byId, h, say, show } from "/page/dom.js";

let taken = null;
let arms = null;

/** Show the panel if the instance takes orders; keep its list of arms up to date. */
export async function drawOrders(model) {
  if (!taken) {
    taken = [];
    const paths = await ordersTaken().catch(() => new Set());
    taken = ORDERS.filter((each) => paths.has(each.route));
    byId("controls").hidden = taken.length === 0;
    if (taken.length) show(byId("orders"), form(panel()));
  }
  if (!arms || document.activeElement === arms) return;
  const before = arms.value;
  const sorted = [...model.arms].sort((a, b) => b.traffic_share - a.traffic_share || a.name.localeCompare(b.name));
  show(arms, sorted.map((arm) => h("option", { value: arm.id }, `${arm.name} (${arm.state}${arm.pinned ? ", pinned" : ""})`)));
  if (before) arms.value = before;
}

/** Ask for the token, where even reading needs it. */
export function askForToken() {
  byId("controls").hidden = false;
  if (!byId("token")) show(byId("orders"), form(h("div", { class: "fields" }, tokenField())));
}

const form = (content) => h("form", { onsubmit: (event) => event.preventDefault() }, content);

function tokenField() {
  const input = h("input", {
    id: "token",
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    placeholder: hasToken() ? "kept for this tab" : "content of control-token",
    onchange: () => {
      setToken(input.value);
      input.value = "";
      input.placeholder = hasToken() ? "kept for this tab" : "content of control-token";
    },
  });
  return field("Token", input);
}

function field(text, control) {
  return h("div", { class: "field" }, h("label", { for: control.id }, text), control);
}

function panel() {
  const told = h("p", { role: "status", class: "answer" });
  const why = h("input", { id: "order-why", maxlength: "300" });
  arms = h("select", { id: "order-arm" });
  const answer = (text, isTrouble) => {
    say(told, text);
    told.classList.toggle("trouble", isTrouble);
  };
  const obey = async (each) => {
    if (!hasToken()) return answer("Give the token first: it lies in the file control-token in the data directory.", true);
    try {
      return answer(doneBy(each, await give(each, arms.value, { by: "the live page", why: why.value })), false);
    } catch (error) {
      return answer(error.message, true);
    }
  };
  const buttons = (those) =>
    those.length > 0 && h("div", { class: "buttons" }, those.map((each) => h("button", { type: "button", title: each.about, onclick: () => obey(each) }, each.says)));
  return [
    h("div", { class: "fields" }, tokenField(), field("Arm", arms), field("Why", why)),
    buttons(taken.filter((each) => each.isForArm)),
    buttons(taken.filter((each) => !each.isForArm)),
    told,
  ];
}

function doneBy({ says }, done) {
  if (done.state) return `Done: ${done.name} is ${done.state}${done.pinned ? ", pinned" : ""}.`;
  return `Done: ${says.toLowerCase()}. In force: ${done.in_force || "nothing"}.`;
}
