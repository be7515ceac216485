/* What quantize.c offers to the other sources. */
#ifndef DQ_QUANTIZE_H
#define DQ_QUANTIZE_H

#include <stdint.h>

int dq_quantize_rows(const void *x, int kind, int64_t rows, int64_t columns, int64_t stride,
                     float inverse, int zero, int top, uint8_t *out);
int dq_quantize_tokens(const void *x, int kind, int64_t rows, int64_t columns, int64_t stride,
                       int top, uint8_t *out, float *scales);

#endif
