// What an operator would want to know, newest first.

import { byId, h, when } from "/page/dom.js";
import { clock } from "/page/format.js";

const SHOWN = 100;

export function drawEvents(model) {
  const events = model.events.slice(0, SHOWN);
  when(byId("events"), events.map((event) => [event.at_s, event.message]), () =>
    events.length
      ? h("ol", { class: "list" }, events.map((event) => h("li", {}, h("time", {}, clock(event.at_s)), h("span", { class: `tag kind-${event.kind}` }, event.kind), ` ${subject(event)}${event.message}`)))
      : h("p", { class: "empty" }, "Nothing has happened yet."),
  );
}

const subject = ({ kind, subject, message }) => (kind === "arm" && subject && !message.includes(subject) ? `${subject}: ` : "");
