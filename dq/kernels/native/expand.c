/* Packed weights of few bits to the int8 layout that a product reads.

   Where a weight belongs in that layout is the sum of an offset of its row and one of its column;
   dq/kernels/layout.py finds both by asking oneDNN. Rows are packed as in dq/packing.py. */

#include <stdlib.h>

#include "common.h"

/* Inverts dq.packing.pack for one row of `n` codes. */
static void unpack(const uint8_t *packed, int64_t n, int bits, uint8_t *codes) {
  if (bits == 8) {
    memcpy(codes, packed, n);
    return;
  }
  memset(codes, 0, n);
  int shift = 0;
  for (int width = 4; width; width >>= 1) {
    if (!(bits & width)) continue;
    int64_t parts = 8 / width, count = (n + parts - 1) / parts;
    uint8_t mask = (uint8_t)((1 << width) - 1);
    for (int64_t part = 0; part < parts; part++) {
      int64_t start = part * count, here = smaller(count, n - start);
      for (int64_t i = 0; i < here; i++)
        codes[start + i] |= (uint8_t)(((packed[i] >> (part * width)) & mask) << shift);
    }
    packed += count;
    shift += width;
  }
}

/* `packed`: rows of `stride` bytes, each `columns` codes and, from byte `start`, `groups`
   multipliers minus one (0: none). Of the columns, `count` from `first` on are written. `sums`:
   where minus the sum of each row goes; NULL: nowhere. Returns 0, or 1 without memory. */
int dq_expand(const uint8_t *packed, int64_t stride, int64_t start, int64_t rows, int64_t columns,
              int64_t groups, int bits, int multiplier_bits, int64_t first, int64_t count,
              const int32_t *row_offsets, const int32_t *column_offsets, int8_t *out,
              int32_t *sums) {
  int64_t size = groups ? columns / groups : columns;
  int offset = 1 << (bits - 1), failed = 0;
#pragma omp parallel
  {
    uint8_t *codes = malloc(columns + groups);
    int8_t *values = malloc(columns);
    if (!codes || !values) failed = 1;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      if (failed) continue;
      const uint8_t *row = packed + r * stride;
      uint8_t *multipliers = codes + columns;
      unpack(row, columns, bits, codes);
      if (groups) unpack(row + start, groups, multiplier_bits, multipliers);
      for (int64_t at = 0, g = 0; at < columns; at += size, g++) {
        int multiplier = groups ? multipliers[g] + 1 : 1;
        for (int64_t i = at; i < at + size; i++)
          values[i] = (int8_t)(((int)codes[i] - offset) * multiplier);
      }
      int8_t *to = out + row_offsets[r];
      int32_t sum = 0;
      for (int64_t i = 0; i < count; i++) sum += values[first + i];
      for (int64_t i = 0; i < count; i++) to[column_offsets[i]] = values[first + i];
      if (sums) sums[r] = -sum;
    }
    free(codes);
    free(values);
  }
  return failed;
}
