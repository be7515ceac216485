/* Attention in bfloat16 for processors with AVX512-BF16.

   Eight queries at a time meet all keys: scores stay in the cache, in float32; probabilities are
   rounded to bfloat16 before they meet the values, sums are float32. Lanes hold 16 keys in the
   first product and 16 features in the second, so that nothing is summed across lanes. */

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

/* Keys `(keys, depth)` to pairs of features `(depth / 2, padded)`; an odd last feature meets 0. */
static void pack_keys(const uint16_t *k, int64_t stride, int64_t keys, int64_t padded,
                      int64_t depth, uint32_t *out) {
  for (int64_t f = 0; f < depth; f += 2, out += padded)
    for (int64_t j = 0; j < padded; j++) {
      uint32_t low = j < keys ? k[j * stride + f] : 0;
      uint32_t high = j < keys && f + 1 < depth ? k[j * stride + f + 1] : 0;
      out[j] = low | high << 16;
    }
}

/* Values `(keys, depth)` to pairs of keys `(padded / 2, wide)`. */
static void pack_values(const uint16_t *v, int64_t stride, int64_t keys, int64_t padded,
                        int64_t depth, int64_t wide, uint32_t *out) {
  for (int64_t j = 0; j < padded; j += 2, out += wide)
    for (int64_t f = 0; f < wide; f++) {
      uint32_t low = j < keys && f < depth ? v[j * stride + f] : 0;
      uint32_t high = j + 1 < keys && f < depth ? v[(j + 1) * stride + f] : 0;
      out[f] = low | high << 16;
    }
}

/* Scores of QUERIES queries and all keys; `top`: the largest of each query, lane by lane. */
INLINE void scores(const uint16_t *q, int64_t depth, const uint32_t *keys, int64_t count,
                   int64_t padded, float *s, __m512 *top) {
  for (int i = 0; i < QUERIES; i++) top[i] = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < padded; j += STEP) {
    __m512 a[QUERIES], b[QUERIES];
    for (int i = 0; i < QUERIES; i++) a[i] = b[i] = _mm512_setzero_ps();
    const uint32_t *from = keys + j;
    for (int64_t f = 0; f < depth; f += 2, from += padded) {
      __m512bh left = load(from), right = load(from + LANES);
      for (int i = 0; i < QUERIES; i++) {
        __m512bh query = pair(q + i * depth + f);
        a[i] = _mm512_dpbf16_ps(a[i], left, query);
        b[i] = _mm512_dpbf16_ps(b[i], right, query);
      }
    }
    if (j + STEP > count) { /* what pads the last keys must not be seen */
      __m512 never = _mm512_set1_ps(-INFINITY);
      for (int i = 0; i < QUERIES; i++) {
        a[i] = _mm512_mask_blend_ps(first(count - j), never, a[i]);
        b[i] = _mm512_mask_blend_ps(first(count - j - LANES), never, b[i]);
      }
    }
    for (int i = 0; i < QUERIES; i++) {
      _mm512_storeu_ps(s + i * padded + j, a[i]);
      _mm512_storeu_ps(s + i * padded + j + LANES, b[i]);
      top[i] = _mm512_max_ps(top[i], _mm512_max_ps(a[i], b[i]));
    }
  }
}

/* exp(scale * (s - top)) in bfloat16; `scale` is in powers of two. Returns one over the sum. */
INLINE float probabilities(const float *s, int64_t padded, float scale, __m512 top, uint16_t *p) {
  __m512 factor = _mm512_set1_ps(scale), sum0 = _mm512_setzero_ps(), sum1 = sum0;
  /* With a negative scale the largest product comes from elsewhere: callers pass positive ones. */
  __m512 shift = _mm512_set1_ps(-_mm512_reduce_max_ps(top) * scale);
  for (int64_t j = 0; j < padded; j += STEP) {
    __m512 a = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(s + j), factor, shift));
    __m512 b = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(s + j + LANES), factor, shift));
    sum0 = _mm512_add_ps(sum0, a);
    sum1 = _mm512_add_ps(sum1, b);
    _mm512_storeu_si512(p + j, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
  return 1.f / _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
}

/* Columns `[0, 16 * tiles)` of the output of QUERIES queries. */
INLINE void outputs(const uint16_t *p, int64_t padded, const uint32_t *values, int64_t wide,
                    int tiles, const float *scale, int queries, int64_t depth, uint16_t *o,
                    int64_t stride) {
  __m512 sum[2][QUERIES];
  for (int i = 0; i < QUERIES; i++) sum[0][i] = sum[1][i] = _mm512_setzero_ps();
  for (int64_t j = 0; j < padded; j += 2, values += wide) {
    __m512bh left = load(values), right = tiles == 2 ? load(values + LANES) : left;
    for (int i = 0; i < QUERIES; i++) {
      __m512bh weight = pair(p + i * padded + j);
      sum[0][i] = _mm512_dpbf16_ps(sum[0][i], left, weight);
      if (tiles == 2) sum[1][i] = _mm512_dpbf16_ps(sum[1][i], right, weight);
    }
  }
  for (int i = 0; i < queries; i++)
    for (int t = 0; t < tiles; t++) {
      __m512 y = _mm512_mul_ps(sum[t][i], _mm512_set1_ps(scale[i]));
      _mm256_mask_storeu_epi16(o + i * stride + t * LANES, first(depth - t * LANES),
                               (__m256i)_mm512_cvtneps_pbh(y));
    }
}

typedef struct {
  int64_t keys, padded, depth, wide;
  float scale;
} shape;

/* Up to QUERIES queries of one head. `q` is dense and even in depth; scratch: s, p. */
static void attend(shape n, const uint16_t *q, const uint32_t *keys, const uint32_t *values,
                   int queries, float *s, uint16_t *p, uint16_t *o, int64_t stride) {
  __m512 top[QUERIES];
  float inverse[QUERIES];
  int64_t even = (n.depth + 1) & ~(int64_t)1;
  scores(q, even, keys, n.keys, n.padded, s, top);
  for (int i = 0; i < QUERIES; i++)
    inverse[i] = probabilities(s + i * n.padded, n.padded, n.scale, top[i], p + i * n.padded);
  for (int64_t f = 0; f < n.wide; f += STEP) {
    if (f + LANES < n.wide)
      outputs(p, n.padded, values + f, n.wide, 2, inverse, queries, n.depth - f, o + f, stride);
    else
      outputs(p, n.padded, values + f, n.wide, 1, inverse, queries, n.depth - f, o + f, stride);
  }
}

static int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

static void *take(int64_t bytes) { return aligned_alloc(64, up(bytes, 64)); }

/* softmax(scale * q k^T) v for `batch * heads` heads, scale > 0. Strides of batch, head and token
   are in numbers; features lie side by side. Returns 0, or 1 without memory. */
int dq_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *o,
                 const int64_t *qs, const int64_t *ks, const int64_t *vs, const int64_t *os,
                 int64_t batch, int64_t heads, int64_t tokens, int64_t keys, int64_t depth,
                 float scale) {
  int64_t padded = up(keys, STEP), wide = up(depth, LANES), even = up(depth, 2);
  int64_t key_size = even / 2 * padded, value_size = padded / 2 * wide, all = batch * heads;
  int64_t blocks = (tokens + QUERIES - 1) / QUERIES;
  shape n = {keys, padded, depth, wide, scale * 1.44269504f};
  uint32_t *packed_keys = take(all * key_size * 4), *packed_values = take(all * value_size * 4);
  int failed = !packed_keys || !packed_values;
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
        pack_keys(k + b * ks[0] + a * ks[1], ks[2], keys, padded, depth,
                  packed_keys + h * key_size);
        pack_values(v + b * vs[0] + a * vs[1], vs[2], keys, padded, depth, wide,
                    packed_values + h * value_size);
      }
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < all * blocks; unit++) {
        int64_t h = unit / blocks, from = unit % blocks * QUERIES, b = h / heads, a = h % heads;
        int count = (int)smaller(QUERIES, tokens - from);
        const uint16_t *rows = q + b * qs[0] + a * qs[1] + from * qs[2];
        for (int i = 0; i < count; i++) memcpy(some + i * even, rows + i * qs[2], depth * 2);
        attend(n, some, packed_keys + h * key_size, packed_values + h * value_size, count, s, p,
               o + b * os[0] + a * os[1] + from * os[2], os[2]);
      }
    }
    free(s);
    free(p);
    free(some);
  }
  free(packed_keys);
  free(packed_values);
  return failed;
}

#else

int dq_has_attention(void) { return 0; }

int dq_attention(const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *o,
                 const int64_t *qs, const int64_t *ks, const int64_t *vs, const int64_t *os,
                 int64_t batch, int64_t heads, int64_t tokens, int64_t keys, int64_t depth,
                 float scale) {
  return 1;
}

#endif
