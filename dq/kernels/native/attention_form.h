/* Operands of attention in the form that kernels read: keys and values by lanes, in the order of a
   table. Before it is included: ELEMENT, type of a number; LANE, what a lane holds; TOGETHER, how
   many numbers that are; JOIN(a, b), a lane of two; LANES; QUERIES.

   Tokens may be put in another order on the way, by a table for each head that says which token
   comes to each place, -1 for none: operands are read, and outputs written, where the table says.
   Nothing else moves them. */

#define STEP (2 * LANES)

/* Which token comes to a place; -1 for none. */
INLINE int64_t token(const int32_t *table, int64_t place, int64_t tokens) {
  return table ? table[place] : place < tokens ? place : -1;
}

INLINE ELEMENT number(const ELEMENT *x, int64_t stride, int64_t row, int64_t f, int64_t depth) {
  return row >= 0 && f < depth ? x[row * stride + f] : 0;
}

/* Keys `(keys, depth)` to lanes of neighbouring features `(depth / TOGETHER, padded)`; where the
   last has no neighbour it meets 0. */
static void pack_keys(const ELEMENT *k, int64_t stride, const int32_t *table, int64_t keys,
                      int64_t padded, int64_t depth, LANE *out) {
  for (int64_t f = 0; f < depth; f += TOGETHER, out += padded)
    for (int64_t j = 0; j < padded; j++) {
      int64_t row = token(table, j, keys);
      out[j] = JOIN(number(k, stride, row, f, depth), number(k, stride, row, f + 1, depth));
    }
}

/* Values `(keys, depth)` to lanes of neighbouring keys `(padded / TOGETHER, wide)`. */
static void pack_values(const ELEMENT *v, int64_t stride, const int32_t *table, int64_t keys,
                        int64_t padded, int64_t depth, int64_t wide, LANE *out) {
  for (int64_t j = 0; j < padded; j += TOGETHER, out += wide) {
    int64_t low = token(table, j, keys);
    int64_t high = TOGETHER == 2 ? token(table, j + 1, keys) : -1;
    for (int64_t f = 0; f < wide; f++)
      out[f] = JOIN(number(v, stride, low, f, depth), number(v, stride, high, f, depth));
  }
}

/* A bit for each key that is there, LANES at a time. */
static void mark_keys(const int32_t *table, int64_t keys, int64_t padded, uint16_t *out) {
  for (int64_t j = 0; j < padded; j += LANES) {
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint32_t)(token(table, j + i, keys) >= 0) << i;
    out[j / LANES] = (uint16_t)bits;
  }
}

/* Which keys are looked at: `count` blocks of `size` places, at `size * list[i]`. */
typedef struct {
  const int32_t *list;
  int64_t count, size;
} blocks;

/* One head's keys and values as they are packed. */
typedef struct {
  const LANE *keys, *values;
  const uint16_t *there;
  int64_t padded, depth, even, wide;
  float scale;
} operands;
