/* The kernels, written once with vector types and compiled once per instruction set by kernels.c, which defines
 * ISA(name), TARGET, LANES (floats per vector), ROWS (of the product's tile) and ACROSS (rows that share loads).
 *
 * All matrices are float32 and row-major. Nothing outside the arrays is read, and nothing is allocated. */

typedef float ISA(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ISA(mask) __attribute__((vector_size(4 * LANES), may_alias));
#define VEC ISA(vec)
#define AHEAD 1024 /* floats of a panel that are fetched before they are needed */
#define LOAD(p) (*(const VEC *)(p))
#define STORE(p, v) (*(VEC *)(p) = (v))
#define WIDE (2 * LANES) /* columns of a packed panel */
#define INLINE static inline __attribute__((always_inline)) TARGET

INLINE float ISA(sum)(VEC v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

INLINE VEC ISA(rectified)(VEC v) { /* NaN stays */
  return (VEC)((ISA(mask))v & ~(ISA(mask))(v <= (VEC){0}));
}

/* ---- neuron blocks: weights are read once, in order, if any row keeps them ----------------------------------- */

/* Of `rows` rows (at most ACROSS) the products with `neurons` rows of weights (at most 4). `next` will be needed soon. */
INLINE void ISA(dots)(const int rows, const int neurons, long inputs, const float *const *x, const float *w,
                      const float *next, const float *bias, long relu, float *const *hidden) {
  VEC acc[ACROSS][4];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int n = 0; n < neurons; n++) acc[r][n] = (VEC){0};
  long c = 0;
  for (; c + 16 <= inputs; c += 16) {
#pragma GCC unroll 4
    for (int n = 0; n < neurons; n++) __builtin_prefetch(next + n * inputs + c, 0, 2);
#pragma GCC unroll 4
    for (int part = 0; part < 16; part += LANES) {
      VEC weight[4];
#pragma GCC unroll 4
      for (int n = 0; n < neurons; n++) weight[n] = LOAD(w + n * inputs + c + part);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        VEC value = LOAD(x[r] + c + part);
#pragma GCC unroll 4
        for (int n = 0; n < neurons; n++) acc[r][n] += value * weight[n];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int n = 0; n < neurons; n++) {
      float total = ISA(sum)(acc[r][n]);
      for (long rest = c; rest < inputs; rest++) total += x[r][rest] * w[n * inputs + rest];
      if (bias) total += bias[n];
      hidden[r][n] = relu && !(total > 0) && total == total ? 0 : total;
    }
}

/* Adds to `rows` rows of the answer what `neurons` neurons hand on. */
INLINE void ISA(sums)(const int rows, const int neurons, long outputs, const float *const *hidden, const float *w,
                      const float *next, float *const *y) {
  VEC h[ACROSS][4];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int n = 0; n < neurons; n++) h[r][n] = hidden[r][n] - (VEC){0};
  long c = 0;
  for (; c + 16 <= outputs; c += 16) {
#pragma GCC unroll 4
    for (int n = 0; n < neurons; n++) __builtin_prefetch(next + n * outputs + c, 0, 2);
#pragma GCC unroll 4
    for (int part = 0; part < 16; part += LANES) {
      VEC weight[4];
#pragma GCC unroll 4
      for (int n = 0; n < neurons; n++) weight[n] = LOAD(w + n * outputs + c + part);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) {
        VEC value = LOAD(y[r] + c + part);
#pragma GCC unroll 4
        for (int n = 0; n < neurons; n++) value += h[r][n] * weight[n];
        STORE(y[r] + c + part, value);
      }
    }
  }
  for (; c < outputs; c++)
    for (int r = 0; r < rows; r++)
      for (int n = 0; n < neurons; n++) y[r][c] += hidden[r][n] * w[n * outputs + c];
}

/* The rows that keep a block, into `who`; how many. */
INLINE long ISA(keeping)(long rows, long blocks, const float *keep, long block, int *who) {
  long n = 0;
  for (long r = 0; r < rows; r++)
    if (keep[r * blocks + block] > 0) who[n++] = (int)r;
  return n;
}

INLINE long ISA(following)(long rows, long blocks, const float *keep, long block) {
  for (long b = block + 1; b < blocks; b++)
    for (long r = 0; r < rows; r++)
      if (keep[r * blocks + b] > 0) return b;
  return block;
}

#define EACH_COUNT(CALL, rows, neurons)               \
  switch (rows) {                                     \
    case 1: CALL(1, neurons); break;                  \
    case 2: CALL(2, neurons); break;                  \
    case 3: CALL(ACROSS > 2 ? 3 : 1, neurons); break; \
    default: CALL(ACROSS > 2 ? 4 : 2, neurons);       \
  }

/* Calls CALL(rows, neurons) for the neurons of every block and the rows that keep it, as many together as fit.
 *
 * `w` are the weights of these neurons, `next` those that will be needed next, `at` is the number of the first neuron,
 * `outer` are the rows of `wide` (rows, width), and `inner` those of `hidden` (rows, blocks * size) from `at` on. */
#define EACH_NEURON(CALL, width, weights, OUTER, wide, INNER, hidden)                                              \
  for (long b = 0; b < blocks; b++) {                                                                              \
    long kept = ISA(keeping)(rows, blocks, keep, b, who);                                                          \
    if (!kept) continue;                                                                                           \
    const float *after = weights + ISA(following)(rows, blocks, keep, b) * size * width;                           \
    for (long first = 0; first < kept; first += ACROSS) {                                                          \
      int together = kept - first < ACROSS ? (int)(kept - first) : ACROSS;                                         \
      OUTER *outer[ACROSS];                                                                                        \
      INNER *inner[ACROSS];                                                                                        \
      for (int r = 0; r < together; r++) outer[r] = wide + who[first + r] * width;                                 \
      for (long n = 0; n < size;) {                                                                                \
        long at = b * size + n, step = size - n < 4 ? 1 : 4;                                                       \
        const float *w = weights + at * width;                                                                     \
        const float *next = n + 2 * step <= size ? w + step * width : first + ACROSS < kept ? w : after;           \
        for (int r = 0; r < together; r++) inner[r] = hidden + who[first + r] * blocks * size + at;                \
        if (step == 4) {                                                                                           \
          EACH_COUNT(CALL, together, 4)                                                                            \
        } else {                                                                                                   \
          EACH_COUNT(CALL, together, 1)                                                                            \
        }                                                                                                          \
        n += step;                                                                                                 \
      }                                                                                                            \
    }                                                                                                              \
  }

/* hidden (rows, blocks * size) = x (rows, inputs) up', where a row keeps the block; the rest is left unchanged.
 * `who` has room for `rows` numbers. */
TARGET void ISA(dynanet_neurons_up)(long rows, long inputs, long blocks, long size, const float *x, const float *up,
                                    const float *bias, const float *keep, long relu, float *hidden, int *who) {
#define UP(R, N) ISA(dots)(R, N, inputs, outer, w, next, bias ? bias + at : 0, relu, inner)
  EACH_NEURON(UP, inputs, up, const float, x, float, hidden)
#undef UP
}

/* y (rows, outputs) += hidden (rows, blocks * size) down, of the blocks that a row keeps. */
TARGET void ISA(dynanet_neurons_down)(long rows, long outputs, long blocks, long size, const float *hidden,
                                      const float *down, const float *keep, float *y, int *who) {
#define DOWN(R, N) ISA(sums)(R, N, outputs, inner, w, next, outer)
  EACH_NEURON(DOWN, outputs, down, float, y, const float, hidden)
#undef DOWN
}

/* ---- products of gathered rows with packed weights --------------------------------------------------------------- */

typedef struct {
  long taps, channels;  /* a row of the left matrix is `taps` pieces of `channels` numbers, from anywhere */
  const float *bias;    /* (columns of this panel) or 0 */
  const float *scale;   /* of these rows, or 0 */
  const int64_t *to;       /* where a row's answer goes, in rows of `answer`; 0: one after another */
  long stride, columns; /* of the answer: numbers per row, and how many columns this panel really has */
  long relu, add;
} ISA(job);

/* `rows` rows (at most ROWS) times one panel. `a` holds taps * rows pointers, `first` is the number of the first row. */
INLINE void ISA(tile)(const int rows, const ISA(job) * job, const float *const *a, const float *panel, float *answer,
                      long first) {
  VEC acc[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = (VEC){0};
  for (long t = 0; t < job->taps; t++) {
    const float *from[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) from[r] = a[t * rows + r];
    for (long c = 0; c < job->channels; c++) {
      VEC left = LOAD(panel), right = LOAD(panel + LANES);
      for (int line = 0; line < WIDE; line += 16) __builtin_prefetch(panel + AHEAD + line, 0, 3);
      panel += WIDE;
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) {
        VEC value = from[r][c] - (VEC){0};
        acc[r][0] += value * left;
        acc[r][1] += value * right;
      }
    }
  }
  float piece[WIDE];
  VEC shift[2] = {{0}, {0}};
  if (job->bias) {
    for (int i = 0; i < WIDE; i++) piece[i] = i < job->columns ? job->bias[i] : 0;
    shift[0] = LOAD(piece), shift[1] = LOAD(piece + LANES);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) {
    VEC value[2] = {acc[r][0] + shift[0], acc[r][1] + shift[1]};
    float *to = answer + (job->to ? job->to[first + r] : first + r) * job->stride;
    for (int half = 0; half < 2; half++) {
      if (job->relu) value[half] = ISA(rectified)(value[half]);
      if (job->scale) value[half] = value[half] * job->scale[first + r];
    }
    if (job->columns == WIDE) {
      for (int half = 0; half < 2; half++) {
        if (job->add) value[half] += LOAD(to + half * LANES);
        STORE(to + half * LANES, value[half]);
      }
    } else {
      STORE(piece, value[0]);
      STORE(piece + LANES, value[1]);
      for (long i = 0; i < job->columns; i++) to[i] = job->add ? to[i] + piece[i] : piece[i];
    }
  }
}

#define EACH_TILE(CALL, rows)                                         \
  switch (rows) {                                                     \
    case 1: CALL(1); break;                                           \
    case 2: CALL(2); break;                                           \
    case 3: CALL(3); break;                                           \
    case 4: CALL(4); break;                                           \
    case 5: CALL(5); break;                                           \
    case 6: CALL(6); break;                                           \
    case 7: if (ROWS > 6) CALL(ROWS > 6 ? 7 : 1); break;              \
    case 8: if (ROWS > 6) CALL(ROWS > 6 ? 8 : 1); break;              \
    case 9: if (ROWS > 6) CALL(ROWS > 6 ? 9 : 1); break;              \
    case 10: if (ROWS > 6) CALL(ROWS > 6 ? 10 : 1); break;            \
    case 11: if (ROWS > 6) CALL(ROWS > 6 ? 11 : 1); break;            \
    default: if (ROWS > 6) CALL(ROWS > 6 ? 12 : 1);                   \
  }

/* The panels from `begin` to `end` of every group; arguments as of the product. */
TARGET static void ISA(panels)(const void *product, long begin, long end) {
  const struct product *p = product;
  long depth = p->taps * p->channels, all = (p->n + WIDE - 1) / WIDE, done = 0;
  long together = GROUP / (depth * WIDE * 4); /* panels that stay in the cache while all rows pass */
  if (together < 1) together = 1;
  for (long g = 0; g < p->groups; g++) {
    const float *packed = p->packed + g * all * depth * WIDE, *bias = p->bias ? p->bias + g * p->n : 0;
    long m = p->counts[g], tiles = (m + ROWS - 1) / ROWS;
    for (long some = begin; some < end; some += together)
      for (long t = 0; t < tiles; t++) {
        long first = m * t / tiles; /* tiles of like sizes: a last one of few rows would be slow */
        int rows = (int)(m * (t + 1) / tiles - first);
        const float *from[TAPS * ROWS];
        first += done;
        for (long tap = 0; tap < p->taps; tap++)
          for (int r = 0; r < rows; r++) {
            int64_t row = p->around ? p->around[(first + r) * p->taps + tap] : first + r;
            from[tap * rows + r] = row < 0 ? p->zeros : p->a + row * p->channels;
          }
        for (long panel = some; panel < end && panel < some + together; panel++) {
          long left = p->n - panel * WIDE;
          const ISA(job) job = {p->taps, p->channels, bias ? bias + panel * WIDE : 0, p->scale, p->to, p->n,
                                left < WIDE ? left : WIDE, p->relu, p->add};
#define TILE(R) ISA(tile)(R, &job, from, packed + panel * depth * WIDE, p->answer + panel * WIDE, first)
          EACH_TILE(TILE, rows)
#undef TILE
        }
      }
    done += m;
  }
}

int ISA(dynanet_product)(long groups, const int64_t *counts, long n, long taps, long channels, long rows,
                         const float *a, const int64_t *around, const float *zeros, const float *packed,
                         const float *bias, const float *scale, long places, const int64_t *to, long relu, long add,
                         float *answer, long threads) {
  const struct product p = {groups, counts, n,    taps,   channels, a,    around, zeros,
                            packed, bias,   scale, to,    relu,     add,  answer};
  return run(&p, rows, places, (n + WIDE - 1) / WIDE, threads, ISA(panels));
}

#include "recurrent.h"
#include "pixels.h"

#include "attention.h"

#undef VEC
#undef AHEAD
#undef LOAD
#undef STORE
#undef WIDE
#undef INLINE
#undef EACH_COUNT
#undef EACH_NEURON
#undef EACH_TILE
