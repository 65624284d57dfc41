// What an operator can do: only what the instance says it takes, and only with the token.

import { ORDERS, hasToken, order, ordersTaken, setToken } from "/page/ask.js";
import { byId, h, say, show } from "/page/dom.js";

let built = false;
let arms = null;

/** Show the panel if the instance takes orders. */
export async function drawOrders(model) {
  if (!built) {
    built = true;
    const taken = await ordersTaken().catch(() => new Set());
    const known = ORDERS.filter(({ path, name }) => taken.has(path) || taken.has(path.replace(new RegExp(`/${name}$`), "/{step}")));
    byId("controls").hidden = known.length === 0;
    if (known.length) show(byId("orders"), panel(known));
  }
  if (!arms) return;
  const before = arms.value;
  show(arms, [...model.arms].sort((a, b) => b.traffic_share - a.traffic_share || a.name.localeCompare(b.name)).map((arm) => h("option", { value: arm.id }, `${arm.name} (${arm.state}${arm.pinned ? ", pinned" : ""})`)));
  if (before) arms.value = before;
}

function panel(known) {
  const told = h("p", { role: "status", class: "answer" });
  const token = h("input", { id: "token", type: "password", autocomplete: "off", spellcheck: "false", placeholder: hasToken() ? "kept for this tab" : "content of control-token" });
  const why = h("input", { id: "order-why", maxlength: "300" });
  arms = h("select", { id: "order-arm" });
  const give = async ({ path, says }) => {
    if (token.value) setToken(token.value);
    token.value = "";
    try {
      const answer = await order(path.replace("{arm}", encodeURIComponent(arms.value)), { by: "the live page", why: why.value });
      say(told, answer.name ? `Done: ${answer.name} is ${answer.state}${answer.pinned ? ", pinned" : ""}.` : `Done: ${says}.`);
      told.classList.remove("trouble");
    } catch (error) {
      say(told, error.message);
      told.classList.add("trouble");
    }
  };
  const buttons = (those) => h("div", { class: "buttons" }, those.map((each) => h("button", { type: "button", title: each.about, onclick: () => give(each) }, each.says)));
  const [perArm, whole] = [known.filter(({ path }) => path.includes("{arm}")), known.filter(({ path }) => !path.includes("{arm}"))];
  return [
    h("div", { class: "fields" }, h("label", { for: "token" }, "Token", token), h("label", { for: "order-arm" }, "Arm", arms), h("label", { for: "order-why" }, "Why", why)),
    buttons(perArm),
    whole.length > 0 && buttons(whole),
    told,
  ];
}
