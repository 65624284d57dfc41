// Elements without markup strings: nothing that comes from the server is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

/** Make an HTML element. Attributes that are functions are listeners, `on` in front of their event. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Make an SVG element. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Put children in place of what an element holds. */
export function show(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter(Boolean));
}

/** Set text only where it differs, so that screen readers hear changes and nothing else. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Rebuild an element's content only when what it is made from has changed; focus stays where it was. */
export function when(element, made, build) {
  const key = JSON.stringify(made);
  if (element.dataset.made === key) return;
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  element.dataset.made = key;
  show(element, build());
  if (focused) element.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}
