// One colour per arm for as long as the page is open: cool for people's arms, warm for synthesized ones.
// The colours themselves are in style.css, for light and dark.

const KINDS = 8;
const given = new Map();
const counts = { cool: 0, warm: 0 };

/** Return the arm's colour as a CSS value. */
export function colour(armId, origin) {
  if (!given.has(armId)) {
    const kind = origin === "human" ? "cool" : "warm";
    given.set(armId, `var(--${kind}-${(counts[kind]++ % KINDS) + 1})`);
  }
  return given.get(armId);
}
