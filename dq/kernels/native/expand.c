/* Packed weights of few bits to the int8 layout that a product reads.

   Where a weight belongs in that layout is the sum of an offset of its row and one of its column;
   dq/kernels/layout.py finds both by asking oneDNN. Rows are packed as in dq/packing.py. */

#include <stdlib.h>

#include "common.h"

/* Inverts dq.packing.pack for one row of `n` codes. */
static void unpack(const uint8_t *restrict packed, int64_t n, int bits, uint8_t *restrict codes) {
  if (bits == 8) {
    memcpy(codes, packed, n);
    return;
  }
  int shift = 0;
  for (int width = 4; width; width >>= 1) {
    if (!(bits & width)) continue;
    int64_t parts = 8 / width, count = (n + parts - 1) / parts;
    uint8_t mask = (uint8_t)((1 << width) - 1);
    for (int64_t part = 0; part < parts; part++) {
      uint8_t *to = codes + part * count;
      int64_t here = smaller(count, n - part * count);
      int right = (int)part * width;
      if (shift == 0)
        for (int64_t i = 0; i < here; i++) to[i] = (packed[i] >> right) & mask;
      else
        for (int64_t i = 0; i < here; i++) to[i] |= ((packed[i] >> right) & mask) << shift;
    }
    packed += count;
    shift += width;
  }
}

/* The levels of one row, times their multipliers. `multipliers`: scratch for `groups` bytes. */
static void levels(const uint8_t *row, int64_t start, int64_t columns, int64_t groups, int bits,
                   int multiplier_bits, uint8_t *restrict multipliers, int8_t *restrict values) {
  int64_t size = groups ? columns / groups : columns;
  uint8_t offset = (uint8_t)(1 << (bits - 1));
  unpack(row, columns, bits, (uint8_t *)values);
  if (groups) unpack(row + start, groups, multiplier_bits, multipliers);
  for (int64_t at = 0, g = 0; at < columns; at += size, g++) {
    uint8_t multiplier = groups ? multipliers[g] + 1 : 1;
    for (int64_t i = at; i < at + size; i++)
      values[i] = (int8_t)(((uint8_t)values[i] - offset) * multiplier);
  }
}

enum { ROWS = 16 }; /* written together: in blocked layouts their weights share cache lines */

static void scatter(const int8_t *restrict values, int64_t stride, int64_t rows, int64_t columns,
                    const int32_t *restrict row_offsets, const int32_t *restrict column_offsets,
                    int8_t *restrict out) {
  int32_t offsets[ROWS] = {0};
  memcpy(offsets, row_offsets, rows * sizeof *offsets);
  for (int64_t i = 0; i < columns; i++) {
    int8_t *to = out + column_offsets[i];
    if (rows == ROWS)
      for (int r = 0; r < ROWS; r++) to[offsets[r]] = values[r * stride + i];
    else
      for (int64_t r = 0; r < rows; r++) to[offsets[r]] = values[r * stride + i];
  }
}

/* `packed`: rows of `stride` bytes, each `columns` codes and, from byte `start`, `groups`
   multipliers minus one (0: none). Of the columns, `count` from `first` on are written. `sums`:
   where minus the sum of each row goes; NULL: nowhere. Returns 0, or 1 without memory. */
int dq_expand(const uint8_t *packed, int64_t stride, int64_t start, int64_t rows, int64_t columns,
              int64_t groups, int bits, int multiplier_bits, int64_t first, int64_t count,
              const int32_t *row_offsets, const int32_t *column_offsets, int8_t *out,
              int32_t *sums) {
  int failed = 0;
#pragma omp parallel
  {
    uint8_t *multipliers = malloc(groups + 1);
    int8_t *values = malloc(ROWS * columns);
    if (!multipliers || !values) failed = 1;
#pragma omp for schedule(static)
    for (int64_t from = 0; from < rows; from += ROWS) {
      if (failed) continue;
      int64_t here = smaller(ROWS, rows - from);
      for (int64_t r = 0; r < here; r++) {
        int8_t *mine = values + r * columns;
        levels(packed + (from + r) * stride, start, columns, groups, bits, multiplier_bits,
               multipliers, mine);
        int32_t sum = 0;
        for (int64_t i = 0; i < count; i++) sum += mine[first + i];
        if (sums) sums[from + r] = -sum;
      }
      scatter(values + first, columns, here, count, row_offsets + from, column_offsets, out);
    }
    free(multipliers);
    free(values);
  }
  return failed;
}
