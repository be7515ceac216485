/* Group normalization of images whose channels lie side by side. */

#include <math.h>
#include <stdlib.h>

#include "common.h"

enum { STRIP = 32 }; /* pixels that are summed in float32, before the sums meet in float64 */

/* Sums over pixels from `at` on, of what a channel differs by from its number at `first`: squares
   of numbers far from zero would leave no digits for their variance. */
INLINE void sums_of(const void *x, int64_t first, int64_t at, int64_t pixels, int64_t channels,
                    float *sums, int kind) {
  float *squares = sums + channels;
  memset(sums, 0, 2 * channels * sizeof *sums);
  for (int64_t p = 0; p < pixels; p++)
    for (int64_t c = 0; c < channels; c++) {
      float value = get(x, at + p * channels + c, kind) - get(x, first + c, kind);
      sums[c] += value;
      squares[c] += value * value;
    }
}

INLINE void scaled(const void *x, int64_t at, int64_t pixels, int64_t channels,
                   const float *factors, void *y, int kind) {
  const float *shifts = factors + channels;
  for (int64_t p = 0; p < pixels; p++)
    for (int64_t c = 0; c < channels; c++) {
      int64_t i = at + p * channels + c;
      put(y, i, get(x, i, kind) * factors[c] + shifts[c], kind);
    }
}

/* From sums of the strips of one image to what each channel is multiplied by and shifted. */
INLINE void factors_of(const void *x, int64_t first, const float *sums, int64_t strips,
                       int64_t pixels, int64_t channels, int64_t groups, float epsilon,
                       const float *weight, const float *bias, float *factors, int kind) {
  int64_t size = channels / groups;
  for (int64_t g = 0; g < groups; g++) {
    double mean = 0, within = 0, square = 0; /* of the group; squares of the channels' means */
    for (int64_t c = g * size; c < (g + 1) * size; c++) {
      double sum = 0, squares = 0;
      for (int64_t s = 0; s < strips; s++) {
        sum += sums[2 * s * channels + c];
        squares += sums[(2 * s + 1) * channels + c];
      }
      double here = get(x, first + c, kind) + sum / pixels;
      within += squares - sum * sum / pixels;
      mean += here / size;
      square += here * here / size;
    }
    double variance = within / (double)(pixels * size) + square - mean * mean;
    float scale = (float)(1 / sqrt((variance > 0 ? variance : 0) + epsilon));
    for (int64_t c = g * size; c < (g + 1) * size; c++) {
      factors[c] = scale * weight[c];
      factors[channels + c] = bias[c] - (float)mean * factors[c];
    }
  }
}

INLINE int norm_of(const void *x, int64_t batch, int64_t pixels, int64_t channels, int64_t groups,
                   float epsilon, const float *weight, const float *bias, void *y, int kind) {
  int64_t strips = (pixels + STRIP - 1) / STRIP, all = batch * strips;
  float *sums = malloc(all * 2 * channels * sizeof *sums);
  float *factors = malloc(batch * 2 * channels * sizeof *factors);
  int failed = !sums || !factors;
  if (!failed) {
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < all; s++) {
      int64_t from = s % strips * STRIP, at = (s / strips * pixels + from) * channels;
      sums_of(x, s / strips * pixels * channels, at, smaller(STRIP, pixels - from), channels,
              sums + 2 * s * channels, kind);
    }
    for (int64_t b = 0; b < batch; b++)
      factors_of(x, b * pixels * channels, sums + 2 * b * strips * channels, strips, pixels,
                 channels, groups, epsilon, weight, bias, factors + 2 * b * channels, kind);
#pragma omp parallel for schedule(static)
    for (int64_t s = 0; s < all; s++) {
      int64_t b = s / strips, from = s % strips * STRIP, at = (b * pixels + from) * channels;
      scaled(x, at, smaller(STRIP, pixels - from), channels, factors + 2 * b * channels, y, kind);
    }
  }
  free(sums);
  free(factors);
  return failed;
}

/* `x`, `y`: (batch, pixels, channels), dense. Returns 0, or 1 without memory. */
int dq_group_norm(const void *x, int kind, int64_t batch, int64_t pixels, int64_t channels,
                  int64_t groups, float epsilon, const float *weight, const float *bias, void *y) {
  if (kind == FLOAT32)
    return norm_of(x, batch, pixels, channels, groups, epsilon, weight, bias, y, FLOAT32);
  return norm_of(x, batch, pixels, channels, groups, epsilon, weight, bias, y, BFLOAT16);
}
