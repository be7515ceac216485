/* Attention in float32, on any processor: vectors are those of the compiler. As in attention.c, but
   that nothing is rounded on the way. */

#include "common.h"

#include <math.h>
#include <stdlib.h>

#define ELEMENT float
#define LANE float
#define TOGETHER 1
#define JOIN(a, b) (a)
#if defined(__AVX512F__)
#define LANES 16
#define QUERIES 8
#else /* half as many registers, of half the size */
#define LANES 8
#define QUERIES 4
#endif
#define VECTOR vector
#define FUNCTION dq_attention_float

#include "attention_form.h"

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t whole __attribute__((vector_size(4 * LANES)));

INLINE vector all(float x) { return x - (vector){0}; }

INLINE vector load(const float *at) {
  vector x;
  memcpy(&x, at, sizeof x);
  return x;
}

INLINE void store(float *at, vector x) { memcpy(at, &x, sizeof x); }

INLINE vector larger(vector a, vector b) {
  whole which = a > b;
  return (vector)(((whole)a & which) | ((whole)b & ~which));
}

/* 2 to the power of x <= 0, to 2e-7. */
INLINE vector power_of_two(vector x) {
  x = larger(all(-126.f), x); /* in this order NaN stays NaN */
  vector nearest = (x + 12582912.f) - 12582912.f, rest = x - nearest; /* 1.5 * 2 ** 23 */
  vector p = rest * 1.54035304e-4f + 1.33335581e-3f;
  p = p * rest + 9.61812911e-3f;
  p = p * rest + 5.55041087e-2f;
  p = p * rest + 2.40226507e-1f;
  p = p * rest + 6.93147181e-1f;
  p = p * rest + 1.f;
  whole exponent = (__builtin_convertvector(nearest, whole) + 127) << 23;
  return p * (vector)exponent;
}

INLINE vector masked(vector x, uint16_t there) {
  for (int i = 0; i < LANES; i++)
    if (!(there >> i & 1)) x[i] = -INFINITY;
  return x;
}

/* See attention.c, as for all that follows. */
INLINE void scores(operands n, int64_t j, int tiles, const float *q, float *s, int64_t row,
                   vector *top) {
  const uint16_t every = (uint16_t)((1u << LANES) - 1);
  vector sum[2][QUERIES];
  for (int i = 0; i < QUERIES; i++) sum[0][i] = sum[1][i] = (vector){0};
  const float *from = n.keys + j;
  for (int64_t f = 0; f < n.even; f++, from += n.padded) {
    vector left = load(from), right = tiles == 2 ? load(from + LANES) : left;
    for (int i = 0; i < QUERIES; i++) {
      float query = q[i * n.even + f];
      sum[0][i] += left * query;
      if (tiles == 2) sum[1][i] += right * query;
    }
  }
  for (int t = 0; t < tiles; t++) {
    uint16_t there = n.there[j / LANES + t];
    for (int i = 0; i < QUERIES; i++) {
      if (there != every) sum[t][i] = masked(sum[t][i], there);
      store(s + i * row + t * LANES, sum[t][i]);
      top[i] = larger(top[i], sum[t][i]);
    }
  }
}

INLINE float probabilities(const float *s, int64_t row, float scale, vector top, float *p) {
  float highest = top[0];
  for (int i = 1; i < LANES; i++) highest = top[i] > highest ? top[i] : highest;
  vector sum = {0};
  for (int64_t j = 0; j < row; j += LANES) {
    vector x = power_of_two((load(s + j) - highest) * scale);
    sum += x;
    store(p + j, x);
  }
  float total = 0;
  for (int i = 0; i < LANES; i++) total += sum[i];
  return 1.f / total;
}

INLINE void outputs(operands n, blocks live, const float *p, int64_t row, int64_t from, int tiles,
                    const float *scale, float *const *o) {
  vector sum[2][QUERIES];
  for (int i = 0; i < QUERIES; i++) sum[0][i] = sum[1][i] = (vector){0};
  for (int64_t which = 0; which < live.count; which++) {
    const float *values = n.values + live.list[which] * live.size * n.wide + from;
    const float *weights = p + which * live.size;
    for (int64_t j = 0; j < live.size; j++, values += n.wide) {
      vector left = load(values), right = tiles == 2 ? load(values + LANES) : left;
      for (int i = 0; i < QUERIES; i++) {
        float weight = weights[i * row + j];
        sum[0][i] += left * weight;
        if (tiles == 2) sum[1][i] += right * weight;
      }
    }
  }
  for (int i = 0; i < QUERIES; i++)
    for (int t = 0; t < tiles && o[i]; t++) {
      vector y = sum[t][i] * scale[i];
      int64_t left = smaller(LANES, n.depth - from - t * LANES);
      if (left > 0) memcpy(o[i] + from + t * LANES, &y, 4 * left);
    }
}

#include "attention_run.h"
