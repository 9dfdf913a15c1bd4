// Compare token lists by their longest common subsequence.

// Maximum size of the table. For longer lists, everything between the common prefix and suffix counts as different.
const MAX_CELLS = 1 << 24;

// Return two arrays that are 1 at the indices of a and b that belong to the common subsequence, otherwise 0.
function matchTokens(a, b) {
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
  if (!rows || width === 1 || (rows + 1) * width > MAX_CELLS) return [inA, inB];
  // lengths[i * width + j]: length of the longest common subsequence of a[start + i ..] and b[start + j ..].
  const lengths = new Uint16Array((rows + 1) * width);
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = width - 2; j >= 0; j -= 1) {
      const cell = i * width + j;
      lengths[cell] =
        a[start + i] === b[start + j]
          ? lengths[cell + width + 1] + 1
          : Math.max(lengths[cell + width], lengths[cell + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < width - 1; ) {
    if (a[start + i] === b[start + j]) {
      inA[start + i] = inB[start + j] = 1;
      i += 1;
      j += 1;
    } else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return [inA, inB];
}

// Mark the tokens of each column that differ from the first column, and those of the first that differ from any other.
// While answers are growing, only their common length is compared.
function differences(columns, growing) {
  const shared = growing ? Math.min(...columns.map((column) => column.length)) : Infinity;
  const [first, ...rest] = columns.map((column) => column.slice(0, shared));
  const marks = columns.map((column) => new Uint8Array(column.length));
  rest.forEach((other, restIndex) => {
    const [inFirst, inOther] = matchTokens(first, other);
    inFirst.forEach((same, index) => (marks[0][index] |= 1 - same));
    inOther.forEach((same, index) => (marks[restIndex + 1][index] = 1 - same));
  });
  return marks;
}
