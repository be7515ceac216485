/* Packed weights of any width to whole numbers, a row at a time; as dq/packing.py packs them. */
#ifndef DQ_LEVELS_H
#define DQ_LEVELS_H

#include "common.h"

/* Inverts dq.packing.pack for one row of `n` codes. */
static inline void unpack(const uint8_t *restrict packed, int64_t n, int bits, uint8_t *restrict codes) {
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
static inline void dq_levels(const uint8_t *row, int64_t start, int64_t columns, int64_t groups,
                             int bits, int multiplier_bits, uint8_t *restrict multipliers,
                             int8_t *restrict values) {
  int64_t size = groups ? columns / groups : columns;
  uint8_t step = bits == 1 ? 2 : 1; /* a single bit is a sign */
  uint8_t offset = (uint8_t)(1 << (bits - 1));
  unpack(row, columns, bits, (uint8_t *)values);
  if (groups) unpack(row + start, groups, multiplier_bits, multipliers);
  for (int64_t at = 0, g = 0; at < columns; at += size, g++) {
    uint8_t multiplier = groups ? multipliers[g] + 1 : 1;
    for (int64_t i = at; i < at + size; i++)
      values[i] = (int8_t)(((uint8_t)values[i] * step - offset) * multiplier);
  }
}

#endif
