// Two texts line by line: the longest common subsequence stays level, the rest faces what it replaced.

/** Return rows [left, right, same]; a side without a line is null. */
export function linesSideBySide(left, right) {
  const lengths = Array.from({ length: left.length + 1 }, () => new Uint16Array(right.length + 1));
  for (let i = left.length - 1; i >= 0; i--) {
    for (let j = right.length - 1; j >= 0; j--) {
      lengths[i][j] = left[i] === right[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const rows = [];
  let [i, j, gone, fresh] = [0, 0, [], []];
  const settle = () => {
    for (let k = 0; k < Math.max(gone.length, fresh.length); k++) rows.push([gone[k] ?? null, fresh[k] ?? null, false]);
    [gone, fresh] = [[], []];
  };
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i] === right[j]) {
      settle();
      rows.push([left[i++], right[j++], true]);
    } else if (j >= right.length || (i < left.length && lengths[i + 1][j] >= lengths[i][j + 1])) gone.push(left[i++]);
    else fresh.push(right[j++]);
  }
  settle();
  return rows;
}
