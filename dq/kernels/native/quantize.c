/* Activations to unsigned codes in one pass: multiply, round half to even, clamp, store.

   All functions that Python calls return 0, or 1 without memory. */

#include <math.h>

#include "common.h"
#include "quantize.h"

enum { TILE = 64 };                     /* pixels and channels that are transposed at a time */
static const int64_t SERIAL = 1 << 15;  /* values below which waking other threads costs more */

/* Clamped before the conversion, so that far outliers saturate; `zero` is added as an integer. */
INLINE uint8_t code(float x, float inverse, int zero, int top) {
  float level = rintf(x * inverse);
  float low = (float)-zero, high = (float)(top - zero);
  level = level < low ? low : level;
  level = level > high ? high : level;
  return (uint8_t)((int)level + zero);
}

INLINE void row(const void *x, int64_t at, int64_t n, float inverse, int zero, int top,
                uint8_t *out, int kind) {
  for (int64_t i = 0; i < n; i++) out[i] = code(get(x, at + i, kind), inverse, zero, top);
}

INLINE void rows_of(const void *x, int64_t rows, int64_t columns, int64_t stride, float inverse,
                    int zero, int top, uint8_t *out, int kind) {
#pragma omp parallel for schedule(static) if (rows * columns > SERIAL)
  for (int64_t r = 0; r < rows; r++)
    row(x, r * stride, columns, inverse, zero, top, out + r * columns, kind);
}

/* One scale for all. `x`: rows of `columns` numbers, `stride` apart. `out`: dense. */
int dq_quantize_rows(const void *x, int kind, int64_t rows, int64_t columns, int64_t stride,
                     float inverse, int zero, int top, uint8_t *out) {
  if (kind == FLOAT32) rows_of(x, rows, columns, stride, inverse, zero, top, out, FLOAT32);
  else rows_of(x, rows, columns, stride, inverse, zero, top, out, BFLOAT16);
  return 0;
}

INLINE void planes_of(const void *x, int64_t channels, int64_t pixels, float inverse, int zero,
                      int top, uint8_t *out, int kind) {
#pragma omp parallel for schedule(static) if (channels * pixels > SERIAL)
  for (int64_t p = 0; p < pixels; p += TILE) {
    uint8_t tile[TILE][TILE];
    int64_t wide = smaller(TILE, pixels - p);
    for (int64_t c = 0; c < channels; c += TILE) {
      int64_t deep = smaller(TILE, channels - c);
      for (int64_t i = 0; i < deep; i++)
        row(x, (c + i) * pixels + p, wide, inverse, zero, top, tile[i], kind);
      for (int64_t j = 0; j < wide; j++)
        for (int64_t i = 0; i < deep; i++) out[(p + j) * channels + c + i] = tile[i][j];
    }
  }
}

/* One image `(channels, pixels)` to codes `(pixels, channels)`: what convolutions read fastest. */
int dq_quantize_planes(const void *x, int kind, int64_t channels, int64_t pixels, float inverse,
                       int zero, int top, uint8_t *out) {
  if (kind == FLOAT32) planes_of(x, channels, pixels, inverse, zero, top, out, FLOAT32);
  else planes_of(x, channels, pixels, inverse, zero, top, out, BFLOAT16);
  return 0;
}

INLINE void tokens_of(const void *x, int64_t rows, int64_t columns, int64_t stride, int top,
                      uint8_t *out, float *scales, int kind) {
  int zero = (top + 1) / 2;
#pragma omp parallel for schedule(static) if (rows * columns > SERIAL)
  for (int64_t r = 0; r < rows; r++) {
    uint32_t largest = 0; /* magnitudes compare as their bits do, and integers make vectors */
    for (int64_t i = 0; i < columns; i++) {
      float value = get(x, r * stride + i, kind);
      uint32_t size;
      memcpy(&size, &value, sizeof size);
      size &= 0x7fffffff;
      largest = size > largest ? size : largest;
    }
    float reach;
    memcpy(&reach, &largest, sizeof reach);
    float scale = reach / (float)(zero - 1);
    scale = scale < 1.17549435e-38f ? 1.17549435e-38f : scale;
    scales[r] = scale;
    row(x, r * stride, columns, 1.0f / scale, zero, top, out + r * columns, kind);
  }
}

/* A symmetric scale for each row, from its largest magnitude. `scales`: one a row. */
int dq_quantize_tokens(const void *x, int kind, int64_t rows, int64_t columns, int64_t stride,
                       int top, uint8_t *out, float *scales) {
  if (kind == FLOAT32) tokens_of(x, rows, columns, stride, top, out, scales, FLOAT32);
  else tokens_of(x, rows, columns, stride, top, out, scales, BFLOAT16);
  return 0;
}

INLINE void rescale_of(const float *x, int64_t rows, int64_t columns, const float *scales,
                       const float *bias, void *y, int kind) {
#pragma omp parallel for schedule(static) if (rows * columns > SERIAL)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < columns; i++)
      put(y, r * columns + i, x[r * columns + i] * scales[r] + bias[i], kind);
}

/* y = x * scales + bias, in the dtype of the layer: what ends a product with a scale a row. */
int dq_rescale(const float *x, int64_t rows, int64_t columns, const float *scales,
               const float *bias, void *y, int kind) {
  if (kind == FLOAT32) rescale_of(x, rows, columns, scales, bias, y, FLOAT32);
  else rescale_of(x, rows, columns, scales, bias, y, BFLOAT16);
  return 0;
}
