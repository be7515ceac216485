/* Attention in bfloat16 for processors with AVX512-BF16.

   Eight queries at a time meet all keys, or those of the blocks that count: scores stay in the
   cache, in float32; probabilities are rounded to bfloat16 before they meet the values, sums are
   float32. Lanes hold 16 keys in the first product and 16 features in the second, so that nothing
   is summed across lanes.

   Tokens may be put in another order on the way, by a table for each head that says which token
   comes to each place, -1 for none: operands are read, and outputs written, where the table says.
   Nothing else moves them. */

#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512VL__)

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>

int dq_has_attention(void) { return 1; }

enum { QUERIES = 8, LANES = 16, STEP = 2 * LANES };

/* 2 to the power of x <= 0. The polynomial errs by 2e-6, far below the bf16 it is rounded to. */
INLINE __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-126.f));
  __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.33335581e-3f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, whole);
}

INLINE __mmask16 first(int64_t count) {
  return count >= LANES ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

INLINE __m512bh pair(const uint16_t *at) { /* two neighbours, in every lane */
  int both;
  memcpy(&both, at, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}

INLINE __m512bh load(const uint32_t *at) { return (__m512bh)_mm512_loadu_si512(at); }

/* Which token comes to a place; -1 for none. */
INLINE int64_t token(const int32_t *table, int64_t place, int64_t tokens) {
  return table ? table[place] : place < tokens ? place : -1;
}

INLINE uint32_t number(const uint16_t *x, int64_t stride, int64_t row, int64_t f, int64_t depth) {
  return row >= 0 && f < depth ? x[row * stride + f] : 0;
}

/* Keys `(keys, depth)` to pairs of features `(depth / 2, padded)`; an odd last feature meets 0. */
static void pack_keys(const uint16_t *k, int64_t stride, const int32_t *table, int64_t keys,
                      int64_t padded, int64_t depth, uint32_t *out) {
  for (int64_t f = 0; f < depth; f += 2, out += padded)
    for (int64_t j = 0; j < padded; j++) {
      int64_t row = token(table, j, keys);
      out[j] = number(k, stride, row, f, depth) | number(k, stride, row, f + 1, depth) << 16;
    }
}

/* Values `(keys, depth)` to pairs of keys `(padded / 2, wide)`. */
static void pack_values(const uint16_t *v, int64_t stride, const int32_t *table, int64_t keys,
                        int64_t padded, int64_t depth, int64_t wide, uint32_t *out) {
  for (int64_t j = 0; j < padded; j += 2, out += wide) {
    int64_t low = token(table, j, keys), high = token(table, j + 1, keys);
    for (int64_t f = 0; f < wide; f++)
      out[f] = number(v, stride, low, f, depth) | number(v, stride, high, f, depth) << 16;
  }
}

/* A bit for each key that is there, 16 at a time. */
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
  const uint32_t *keys, *values;
  const uint16_t *there;
  int64_t padded, depth, even, wide;
  float scale;
} operands;

/* Scores of QUERIES queries and the keys of the blocks, side by side in rows of `row`; `top`: the
   largest of each query, lane by lane. */
INLINE void scores(operands n, blocks live, const uint16_t *q, float *s, int64_t row, __m512 *top) {
  for (int i = 0; i < QUERIES; i++) top[i] = _mm512_set1_ps(-INFINITY);
  for (int64_t which = 0; which < live.count; which++) {
    int64_t first = live.list[which] * live.size;
    float *to = s + which * live.size;
    for (int64_t j = first; j < first + live.size; j += STEP, to += STEP) {
      __m512 a[QUERIES], b[QUERIES];
      for (int i = 0; i < QUERIES; i++) a[i] = b[i] = _mm512_setzero_ps();
      const uint32_t *from = n.keys + j;
      for (int64_t f = 0; f < n.even; f += 2, from += n.padded) {
        __m512bh left = load(from), right = load(from + LANES);
        for (int i = 0; i < QUERIES; i++) {
          __m512bh query = pair(q + i * n.even + f);
          a[i] = _mm512_dpbf16_ps(a[i], left, query);
          b[i] = _mm512_dpbf16_ps(b[i], right, query);
        }
      }
      uint16_t low = n.there[j / LANES], high = n.there[j / LANES + 1];
      if ((low & high) != 0xffff) { /* what pads the keys must not be seen */
        __m512 never = _mm512_set1_ps(-INFINITY);
        for (int i = 0; i < QUERIES; i++) {
          a[i] = _mm512_mask_blend_ps(low, never, a[i]);
          b[i] = _mm512_mask_blend_ps(high, never, b[i]);
        }
      }
      for (int i = 0; i < QUERIES; i++) {
        _mm512_storeu_ps(to + i * row, a[i]);
        _mm512_storeu_ps(to + i * row + LANES, b[i]);
        top[i] = _mm512_max_ps(top[i], _mm512_max_ps(a[i], b[i]));
      }
    }
  }
}

/* exp(scale * (s - top)) in bfloat16; `scale` is in powers of two. Returns one over the sum. */
INLINE float probabilities(const float *s, int64_t row, float scale, __m512 top, uint16_t *p) {
  __m512 factor = _mm512_set1_ps(scale), sum0 = _mm512_setzero_ps(), sum1 = sum0;
  /* With a negative scale the largest product comes from elsewhere: callers pass positive ones. */
  __m512 shift = _mm512_set1_ps(-_mm512_reduce_max_ps(top) * scale);
  for (int64_t j = 0; j < row; j += STEP) {
    __m512 a = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(s + j), factor, shift));
    __m512 b = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(s + j + LANES), factor, shift));
    sum0 = _mm512_add_ps(sum0, a);
    sum1 = _mm512_add_ps(sum1, b);
    _mm512_storeu_si512(p + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  return 1.f / _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
}

/* Columns `[from, from + 16 * tiles)` of the output of QUERIES queries; `o`: where each one's row
   is, 0 for nowhere. */
INLINE void outputs(operands n, blocks live, const uint16_t *p, int64_t row, int64_t from,
                    int tiles, const float *scale, uint16_t *const *o) {
  __m512 sum[2][QUERIES];
  for (int i = 0; i < QUERIES; i++) sum[0][i] = sum[1][i] = _mm512_setzero_ps();
  for (int64_t which = 0; which < live.count; which++) {
    const uint32_t *values = n.values + live.list[which] * live.size / 2 * n.wide + from;
    const uint16_t *weights = p + which * live.size;
    for (int64_t j = 0; j < live.size; j += 2, values += n.wide) {
      __m512bh left = load(values), right = tiles == 2 ? load(values + LANES) : left;
      for (int i = 0; i < QUERIES; i++) {
        __m512bh weight = pair(weights + i * row + j);
        sum[0][i] = _mm512_dpbf16_ps(sum[0][i], left, weight);
        if (tiles == 2) sum[1][i] = _mm512_dpbf16_ps(sum[1][i], right, weight);
      }
    }
  }
  for (int i = 0; i < QUERIES; i++)
    for (int t = 0; t < tiles && o[i]; t++) {
      __m512 y = _mm512_mul_ps(sum[t][i], _mm512_set1_ps(scale[i]));
      _mm256_mask_storeu_epi16(o[i] + from + t * LANES, first(n.depth - from - t * LANES),
                               (__m256i)_mm512_cvtneps_pbh(y));
    }
}

/* QUERIES queries of one head. `q` is dense and even in depth; scratch: s, p. */
static void attend(operands n, blocks live, const uint16_t *q, float *s, uint16_t *p,
                   uint16_t *const *o) {
  __m512 top[QUERIES];
  float inverse[QUERIES];
  int64_t row = live.count * live.size;
  scores(n, live, q, s, row, top);
  for (int i = 0; i < QUERIES; i++)
    inverse[i] = probabilities(s + i * row, row, n.scale, top[i], p + i * row);
  for (int64_t f = 0; f < n.wide; f += STEP)
    if (f + LANES < n.wide)
      outputs(n, live, p, row, f, 2, inverse, o);
    else
      outputs(n, live, p, row, f, 1, inverse, o);
}

static int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static void *take(int64_t bytes) { return aligned_alloc(64, up(bytes, 64)); }

/* softmax(scale * q k^T) v for `batch * heads` heads, scale > 0. Strides of batch, head and token
   are in numbers; features lie side by side.

   With `table`, `(heads, places)`, tokens come to other places, and only some blocks of
   `block_queries` times `block_keys` places count: those of a row of blocks that `list`,
   `(heads, queries, keys)`, names, as many as `counts`, `(heads, queries)`, says. The same for all
   images of the batch. Places and keys of a block are multiples of 32, queries of 8; each row has
   a key that is there. Without `table` everything counts, in its place.

   Returns 0, or 1 without memory. */
int dq_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *o,
                 const int64_t *qs, const int64_t *ks, const int64_t *vs, const int64_t *os,
                 int64_t batch, int64_t heads, int64_t tokens, int64_t keys, int64_t depth,
                 float scale, const int32_t *table, int64_t places, int64_t block_queries,
                 int64_t block_keys, const int32_t *counts, const int32_t *list) {
  int64_t padded = table ? places : up(keys, STEP), rows = table ? places : tokens;
  int64_t wide = up(depth, LANES), even = up(depth, 2), all = batch * heads;
  int64_t key_size = even / 2 * padded, value_size = padded / 2 * wide;
  int64_t units = (rows + QUERIES - 1) / QUERIES, marks = padded / LANES;
  int64_t query_blocks = table ? places / block_queries : 1;
  int64_t key_blocks = table ? places / block_keys : 1;
  const int32_t everything = 0;
  uint32_t *packed_keys = take(all * key_size * 4), *packed_values = take(all * value_size * 4);
  uint16_t *there = take((table ? heads : 1) * marks * 2);
  int failed = !packed_keys || !packed_values || !there;
  if (!failed)
    for (int64_t a = 0; a < (table ? heads : 1); a++)
      mark_keys(table ? table + a * places : 0, keys, padded, there + a * marks);
#pragma omp parallel
  {
    float *s = take(QUERIES * padded * 4);
    uint16_t *p = take(QUERIES * padded * 2), *some = take(QUERIES * even * 2);
    if (!s || !p || !some) failed = 1;
#pragma omp barrier
    if (!failed) {
      memset(some, 0, QUERIES * even * 2);
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
        uint16_t *to[QUERIES];
        int some_are_there = 0;
        for (int i = 0; i < QUERIES; i++) {
          int64_t row = from + i < rows ? token(order, from + i, tokens) : -1;
          to[i] = row < 0 ? 0 : o + b * os[0] + a * os[1] + row * os[2];
          if (row < 0) continue;
          some_are_there = 1;
          memcpy(some + i * even, q + b * qs[0] + a * qs[1] + row * qs[2], depth * 2);
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

#else

int dq_has_attention(void) { return 0; }

int dq_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *o,
                 const int64_t *qs, const int64_t *ks, const int64_t *vs, const int64_t *os,
                 int64_t batch, int64_t heads, int64_t tokens, int64_t keys, int64_t depth,
                 float scale, const int32_t *table, int64_t places, int64_t block_queries,
                 int64_t block_keys, const int32_t *counts, const int32_t *list) {
  return 1;
}

#endif
