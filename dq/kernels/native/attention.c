/* Attention in bfloat16 for processors with AVX512-BF16.

   Eight queries at a time meet all keys, or those of the blocks that count: scores stay in the
   cache, in float32; probabilities are rounded to bfloat16 before they meet the values, sums are
   float32. Lanes hold 16 keys in the first product and 16 features in the second, so that nothing
   is summed across lanes. */

#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512VL__)

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>

int dq_has_attention(void) { return 1; }

#define ELEMENT uint16_t
#define LANE uint32_t
#define TOGETHER 2
#define JOIN(a, b) ((uint32_t)(a) | (uint32_t)(b) << 16)
#define LANES 16
#define QUERIES 8
#define VECTOR __m512
#define FUNCTION dq_attention

#include "attention_form.h"

/* 2 to the power of x <= 0. The polynomial errs by 2e-6, far below the bf16 it is rounded to. */
INLINE __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.f), x); /* in this order NaN stays NaN */
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

/* Scores of QUERIES queries and LANES * tiles keys from `j` on, in rows of `row`; `top`: the
   largest of each query, lane by lane. */
INLINE void scores(operands n, int64_t j, int tiles, const uint16_t *q, float *s, int64_t row,
                   __m512 *top) {
  __m512 sum[2][QUERIES];
  for (int i = 0; i < QUERIES; i++) sum[0][i] = sum[1][i] = _mm512_setzero_ps();
  const uint32_t *from = n.keys + j;
  for (int64_t f = 0; f < n.even; f += 2, from += n.padded) {
    __m512bh left = load(from), right = tiles == 2 ? load(from + LANES) : left;
    for (int i = 0; i < QUERIES; i++) {
      __m512bh query = pair(q + i * n.even + f);
      sum[0][i] = _mm512_dpbf16_ps(sum[0][i], left, query);
      if (tiles == 2) sum[1][i] = _mm512_dpbf16_ps(sum[1][i], right, query);
    }
  }
  for (int t = 0; t < tiles; t++) {
    uint16_t there = n.there[j / LANES + t];
    for (int i = 0; i < QUERIES; i++) {
      if (there != 0xffff) /* what pads the keys must not be seen */
        sum[t][i] = _mm512_mask_blend_ps(there, _mm512_set1_ps(-INFINITY), sum[t][i]);
      _mm512_storeu_ps(s + i * row + t * LANES, sum[t][i]);
      top[i] = _mm512_max_ps(top[i], sum[t][i]);
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

#include "attention_run.h"

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
