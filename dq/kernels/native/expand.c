/* Packed weights of few bits to the int8 layout that a product reads.

   Where a weight belongs in that layout is the sum of an offset of its row and one of its column;
   dq/kernels/layout.py finds both by asking oneDNN. */

#include <stdlib.h>

#include "levels.h"

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
        dq_levels(packed + (from + r) * stride, start, columns, groups, bits, multiplier_bits,
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
