/* Shared by all sources: numbers of either dtype, read as float32. */
#ifndef DQ_COMMON_H
#define DQ_COMMON_H

#include <stdint.h>
#include <string.h>

/* Dtypes of activations, as dq/kernels/native/calls.py numbers them. */
enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* Callers pass a constant `kind` to an inlined body, so that each dtype has a loop of its own. */
#define INLINE static inline __attribute__((always_inline))

INLINE float get(const void *x, int64_t i, int kind) {
  if (kind == FLOAT32) return ((const float *)x)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* Rounds half to even, as torch does; the numbers of a network are finite. */
INLINE void put(void *y, int64_t i, float value, int kind) {
  if (kind == FLOAT32) {
    ((float *)y)[i] = value;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  ((uint16_t *)y)[i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
