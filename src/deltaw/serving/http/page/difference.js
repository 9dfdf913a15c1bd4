// Which tokens of two texts belong together: the longest common subsequence. Knows only lists of texts.

// A table of more cells than this is not made; what lies between the common beginning and end then counts as
// different.
const MOST_CELLS = 1 << 24;

// For lists of texts a and b: which places of each have a partner in the other, as two arrays of 0 and 1.
function matched(a, b) {
  const inA = new Uint8Array(a.length);
  const inB = new Uint8Array(b.length);
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let endA = a.length;
  let endB = b.length;
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) {
    endA -= 1;
    endB -= 1;
  }
  inA.fill(1, 0, start).fill(1, endA);
  inB.fill(1, 0, start).fill(1, endB);
  const rows = endA - start;
  const width = endB - start + 1;
  if (!rows || width === 1 || (rows + 1) * width > MOST_CELLS) return [inA, inB];
  // longest[i * width + j]: the length of the longest common subsequence of a[start + i ..] and b[start + j ..].
  const longest = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = width - 2; j >= 0; j -= 1) {
      const here = i * width + j;
      longest[here] =
        a[start + i] === b[start + j]
          ? longest[here + width + 1] + 1
          : Math.max(longest[here + width], longest[here + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < width - 1; ) {
    if (a[start + i] === b[start + j]) {
      inA[start + i] = inB[start + j] = 1;
      i += 1;
      j += 1;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return [inA, inB];
}

// For the lists of several columns: which places differ, each column against the first, and the first against
// all others. While answers are being written, only as much is compared as all of them have.
function differences(columns, growing) {
  const shared = growing ? Math.min(...columns.map((column) => column.length)) : Infinity;
  const [first, ...others] = columns.map((column) => column.slice(0, shared));
  const marks = columns.map((column) => new Uint8Array(column.length));
  others.forEach((other, number) => {
    const [inFirst, inOther] = matched(first, other);
    inFirst.forEach((same, place) => (marks[0][place] |= 1 - same));
    inOther.forEach((same, place) => (marks[number + 1][place] = 1 - same));
  });
  return marks;
}
