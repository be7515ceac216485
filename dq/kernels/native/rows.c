/* A whole integer linear layer for few rows: quantize, unpack, multiply and scale in one call.

   Products of this size cost a library more to start than to compute, and weights are read as they
   are stored: nothing is expanded and nothing is kept. */

#include <stdlib.h>

#include "common.h"
#include "levels.h"
#include "quantize.h"

static const int64_t SERIAL = 1 << 18; /* products below which waking other threads costs more */

/* Plain enough for compilers to turn it into dot-product instructions. */
INLINE int32_t dot(const uint8_t *restrict codes, const int8_t *restrict values, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (int)codes[i] * (int)values[i];
  return sum;
}

/* `x`: rows of `columns` numbers, `stride` apart. `inverse`, `scale`, `zero`: of a static input; 0,
   any, any for one with a scale a row. `top`: largest code. `packed` to `multiplier_bits`: as in
   dq_expand. `scales`, `bias`: one an output feature. `y`: (rows, features), in the dtype of `x`.
   Returns 0, or 1 without memory. */
int dq_linear_rows(const void *x, int kind, int64_t rows, int64_t columns, int64_t stride,
                   float inverse, float scale, int zero, int top, const uint8_t *packed,
                   int64_t bytes, int64_t start, int64_t features, int64_t groups, int bits,
                   int multiplier_bits, const float *scales, const float *bias, void *y) {
  uint8_t *codes = malloc(rows * columns + 1);
  float *steps = malloc((rows + 1) * sizeof *steps);
  int failed = !codes || !steps;
  if (!failed && inverse == 0) {
    zero = (top + 1) / 2;
    dq_quantize_tokens(x, kind, rows, columns, stride, top, codes, steps);
  } else if (!failed) {
    for (int64_t r = 0; r < rows; r++) steps[r] = scale;
    dq_quantize_rows(x, kind, rows, columns, stride, inverse, zero, top, codes);
  }
#pragma omp parallel if (rows * columns * features > SERIAL)
  {
    uint8_t *multipliers = malloc(groups + 1);
    int8_t *values = malloc(columns);
    if (!multipliers || !values) failed = 1;
#pragma omp for schedule(static)
    for (int64_t f = 0; f < features; f++) {
      if (failed) continue;
      dq_levels(packed + f * bytes, start, columns, groups, bits, multiplier_bits, multipliers,
                values);
      int32_t sum = 0;
      for (int64_t i = 0; i < columns; i++) sum += values[i];
      for (int64_t r = 0; r < rows; r++) {
        int32_t total = dot(codes + r * columns, values, columns) - zero * sum;
        put(y, r * features + f, (float)total * (steps[r] * scales[f]) + bias[f], kind);
      }
    }
    free(multipliers);
    free(values);
  }
  free(codes);
  free(steps);
  return failed;
}
