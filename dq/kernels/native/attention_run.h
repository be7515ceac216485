/* Attention of all heads, once `scores`, `probabilities` and `outputs` are there for the type; see
   attention_form.h. FUNCTION is its name. */

static int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static void *take(int64_t bytes) { return aligned_alloc(64, up(bytes, 64)); }

/* QUERIES queries of one head. `q` is dense and even in depth; scratch: s, p. */
static void attend(operands n, blocks live, const ELEMENT *q, float *s, ELEMENT *p,
                   ELEMENT *const *o) {
  VECTOR top[QUERIES];
  float inverse[QUERIES];
  int64_t count = live.count * live.size, row = up(count, STEP);
  for (int i = 0; i < QUERIES; i++) {
    top[i] = (VECTOR){0} - INFINITY;
    for (int64_t j = count; j < row; j++) s[i * row + j] = -INFINITY;
  }
  for (int64_t which = 0; which < live.count; which++) {
    int64_t first = live.list[which] * live.size, end = first + live.size;
    float *to = s + which * live.size;
    for (int64_t j = first; j < end; j += STEP, to += STEP)
      if (j + LANES < end) /* tiles as a constant: each case is compiled for itself */
        scores(n, j, 2, q, to, row, top);
      else
        scores(n, j, 1, q, to, row, top);
  }
  for (int i = 0; i < QUERIES; i++)
    inverse[i] = probabilities(s + i * row, row, n.scale, top[i], p + i * row);
  for (int64_t f = 0; f < n.wide; f += STEP)
    if (f + LANES < n.wide)
      outputs(n, live, p, row, f, 2, inverse, o);
    else
      outputs(n, live, p, row, f, 1, inverse, o);
}

/* softmax(scale * q k^T) v for `batch * heads` heads, scale > 0. Strides of batch, head and token
   are in numbers; features lie side by side.

   With `table`, `(heads, places)`, tokens come to other places, and only some blocks of
   `block_queries` times `block_keys` places count: those of a row of blocks that `list`,
   `(heads, queries, keys)`, names, as many as `counts`, `(heads, queries)`, says. The same for all
   images of the batch. Keys of a block are a multiple of LANES, queries of QUERIES; each row has a
   key that is there. Without `table` everything counts, in its place.

   Returns 0, or 1 without memory. */
int FUNCTION(const ELEMENT *q, const ELEMENT *k, const ELEMENT *v, ELEMENT *o,
                 const int64_t *qs, const int64_t *ks, const int64_t *vs, const int64_t *os,
                 int64_t batch, int64_t heads, int64_t tokens, int64_t keys, int64_t depth,
                 float scale, const int32_t *table, int64_t places, int64_t block_queries,
                 int64_t block_keys, const int32_t *counts, const int32_t *list) {
  int64_t padded = table ? places : up(keys, STEP), rows = table ? places : tokens;
  int64_t wide = up(depth, LANES), even = up(depth, TOGETHER), all = batch * heads;
  int64_t key_size = even / TOGETHER * padded, value_size = padded / TOGETHER * wide;
  int64_t units = (rows + QUERIES - 1) / QUERIES, marks = padded / LANES;
  int64_t query_blocks = table ? places / block_queries : 1;
  int64_t key_blocks = table ? places / block_keys : 1;
  const int32_t everything = 0;
  LANE *packed_keys = take(all * key_size * sizeof(LANE));
  LANE *packed_values = take(all * value_size * sizeof(LANE));
  uint16_t *there = take((table ? heads : 1) * marks * 2);
  int failed = !packed_keys || !packed_values || !there;
  if (!failed)
    for (int64_t a = 0; a < (table ? heads : 1); a++)
      mark_keys(table ? table + a * places : 0, keys, padded, there + a * marks);
#pragma omp parallel
  {
    float *s = take(QUERIES * up(padded, STEP) * 4);
    ELEMENT *p = take(QUERIES * up(padded, STEP) * sizeof *p);
    ELEMENT *some = take(QUERIES * even * sizeof *p);
    if (!s || !p || !some) failed = 1;
#pragma omp barrier
    if (!failed) {
      memset(some, 0, QUERIES * even * sizeof *some);
#pragma omp for schedule(static)
      for (int64_t h = 0; h < all; h++) {
        int64_t b = h / heads, a = h % heads;
        const int32_t *order = table ? table + a * places : 0;
        pack_keys(k + b * ks[0] + a * ks[1], ks[2], order, keys, padded, depth,
                  packed_keys + h * key_size);
        pack_values(v + b * vs[0] + a * vs[1], vs[2], order, keys, padded, depth, wide,
                    packed_values + h * value_size);
      }
#pragma omp for schedule(dynamic, 8)
      for (int64_t unit = 0; unit < all * units; unit++) {
        int64_t h = unit / units, from = unit % units * QUERIES, b = h / heads, a = h % heads;
        const int32_t *order = table ? table + a * places : 0;
        ELEMENT *to[QUERIES];
        int some_are_there = 0;
        for (int i = 0; i < QUERIES; i++) {
          int64_t row = from + i < rows ? token(order, from + i, tokens) : -1;
          to[i] = row < 0 ? 0 : o + b * os[0] + a * os[1] + row * os[2];
          if (row < 0) continue;
          some_are_there = 1;
          memcpy(some + i * even, q + b * qs[0] + a * qs[1] + row * qs[2],
                 depth * sizeof *some);
        }
        if (!some_are_there) continue;
        operands n = {packed_keys + h * key_size, packed_values + h * value_size,
                      there + (table ? a * marks : 0), padded, depth, even, wide,
                      scale * 1.44269504f};
        blocks live = {&everything, 1, padded};
        if (table) {
          int64_t home = a * query_blocks + from / block_queries;
          live = (blocks){list + home * key_blocks, counts[home], block_keys};
        }
        attend(n, live, some, s, p, to);
      }
    }
    free(s);
    free(p);
    free(some);
  }
  free(packed_keys);
  free(packed_values);
  free(there);
  return failed;
}

