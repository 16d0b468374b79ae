/* Attention within samples of packed rows, and their means, included by kernels.h once per instruction set. Keys are turned, a block of
 * them at a time, so that a vector holds scores of neighbouring keys; queries, values and answers are read and written
 * where they lie. Scores are logarithms to the base 2. The structure is in kernels.c. */

#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
#if defined(__clang__) || __GNUC__ > 11
#define MIXED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIXED(a, b, ...) __builtin_shuffle(a, b, (ISA(mask)){__VA_ARGS__})
#endif

/* 2 to the v for v up to 0, to within a rounding or two; 0 below -126. NaN stays. */
INLINE VEC ISA(power)(VEC v) {
  const VEC round = 12582912 - (VEC){0}; /* 1.5 * 2^23: what is added to it loses its fraction */
  VEC turns = v + round, rest = v - (turns - round);
  VEC q = 0.000153533620f * rest + 0.00133988739f; /* 2^r for |r| <= 1 / 2, relative 2e-9 */
  q = q * rest + 0.00961843692f;
  q = q * rest + 0.0555033237f;
  q = q * rest + 0.240226477f;
  q = q * rest + 0.693147182f;
  q = (q * rest + 1) * (VEC)(((ISA(mask))turns << 23) + 0x3f800000);
  return (VEC)((ISA(mask))q & ~(ISA(mask))(v < -126));
}

INLINE VEC ISA(larger)(VEC a, VEC b) { /* b where a is NaN */
  ISA(mask) which = a > b;
  return (VEC)(((ISA(mask))a & which) | ((ISA(mask))b & ~which));
}

/* The largest element of each of LANES vectors, or the sum of its elements: vector r's at place r. */
INLINE VEC ISA(across)(const VEC *v, const int largest) {
  VEC some[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) some[i] = v[i];
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) {
      VEC low = MIXED(some[i], some[i + half], LOW), high = MIXED(some[i], some[i + half], HIGH);
      if (largest)
        some[i] = ISA(larger)(low, high);
      else
        some[i] = low + high;
    }
  return some[0];
}

/* LANES keys, of which there are n, times scale and turned: (size, LANES). In place of missing keys the last one. */
INLINE void ISA(turn)(long n, long size, const float *key, long stride, float scale, float *turned) {
  const float *from[LANES];
  for (long i = 0; i < LANES; i++) from[i] = key + (i < n ? i : n - 1) * stride;
  for (long c = 0; c < size && size < LANES; c++)
    for (int i = 0; i < LANES; i++) turned[c * LANES + i] = from[i][c] * scale;
  for (long c = 0; c < size && size >= LANES; c += LANES) {
    long at = size - c < LANES ? size - LANES : c; /* some twice, none beyond */
    VEC rows[LANES], next[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = LOAD(from[i] + at) * scale;
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < LANES / 2; i++) {
        next[2 * i] = MIXED(rows[i], rows[i + LANES / 2], LOW);
        next[2 * i + 1] = MIXED(rows[i], rows[i + LANES / 2], HIGH);
      }
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) STORE(turned + (at + i) * LANES, rows[i]);
  }
}

/* A head of a sample and some of its keys. */
typedef struct {
  long keys, size, strides[2];          /* numbers from one query to the next, and from one value to the next */
  const float *turned, *values, *shift; /* (strips, size, LANES); (keys, size); what is added to the scores */
  float *scores;                        /* (ROWS, `apart`) */
  long apart, width, first, last;       /* from one answer to the next; are these the first keys, the last ones? */
} ISA(among);

/* acc += rows (depth) times `count` vectors of every row of a panel. */
INLINE void ISA(outer)(const int rows, const int count, long depth, const float *a, long between, const float *panel,
                       long stride, long apart, VEC (*acc)[2]) {
  const float *from[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++) from[r] = a + r * between;
  for (long k = 0; k < depth; k++, panel += stride) {
    VEC left = LOAD(panel), right = LOAD(panel + (count > 1 ? apart : 0));
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
      VEC value = from[r][k] - (VEC){0};
      acc[r][0] += value * left;
      if (count > 1) acc[r][1] += value * right;
    }
  }
}

/* The scores of `count` strips of keys. */
INLINE void ISA(strips)(const int rows, const int count, const ISA(among) * g, const float *query, long strip) {
  VEC acc[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < count; v++) acc[r][v] = LOAD(g->shift + (strip + v) * LANES);
  ISA(outer)(rows, count, g->size, query, g->strides[0], g->turned + strip * g->size * LANES, LANES, g->size * LANES,
             acc);
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < count; v++) STORE(g->scores + r * g->apart + (strip + v) * LANES, acc[r][v]);
}

TARGET static void ISA(all_scores)(int rows, const ISA(among) * g, const float *query) {
  long strips = (g->keys + LANES - 1) / LANES, s = 0;
#define TWO(R) ISA(strips)(R, 2, g, query, s)
#define ONE(R) ISA(strips)(R, 1, g, query, s)
  for (; s + 1 < strips; s += 2) { EACH_TILE(TWO, rows) }
  if (s < strips) { EACH_TILE(ONE, rows) }
#undef TWO
#undef ONE
}

/* `count` vectors of the answers: values by their weights, beside what earlier keys gave. */
INLINE void ISA(columns)(const int rows, const int count, const ISA(among) * g, const float *value, long apart,
                         const float *before, const float *after, float *answer, long width) {
  VEC acc[ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < count; v++) {
      acc[r][v] = (VEC){0};
      if (!g->first) acc[r][v] = LOAD(answer + r * width + v * apart) * before[r];
    }
  ISA(outer)(rows, count, g->keys, g->scores, g->apart, value, g->strides[1], apart, acc);
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < count; v++) STORE(answer + r * width + v * apart, acc[r][v] * after[r]);
}

TARGET static void ISA(all_columns)(int rows, const ISA(among) * g, const float *before, const float *after,
                                    float *answer, long width) {
  long vectors = (g->size + LANES - 1) / LANES, c = vectors % 2 * LANES;
#define ONE(R) ISA(columns)(R, 1, g, g->values, 0, before, after, answer, width)
#define TWO(R) ISA(columns)(R, 2, g, g->values + c, apart, before, after, answer + c, width)
  if (c) { EACH_TILE(ONE, rows) }
  for (; c < g->size; c += 2 * LANES) { /* the last vector may overlap the one before, which is in the same tile */
    long apart = c + 2 * LANES > g->size ? g->size - LANES - c : LANES;
    EACH_TILE(TWO, rows)
  }
#undef ONE
#undef TWO
}

/* `rows` queries (at most ROWS) among some keys; `most` and `total` are the largest score and the sum of weights that
 * they have met. */
TARGET static void ISA(queries)(int rows, const ISA(among) * g, const float *query, float *most, float *total,
                                float *answer) {
  const float none = -__builtin_inff();
  long padded = (g->keys + LANES - 1) / LANES * LANES;
  float now[LANES], before[ROWS], after[ROWS];
  ISA(all_scores)(rows, g, query);
  for (int from = 0; from < rows; from += LANES) {
    VEC some[LANES];
    int n = rows - from < LANES ? rows - from : LANES;
    for (int i = 0; i < LANES; i++) {
      some[i] = none - (VEC){0};
      for (long k = 0; i < n && k < padded; k += LANES)
        some[i] = ISA(larger)(LOAD(g->scores + (from + i) * g->apart + k), some[i]);
    }
    STORE(now, ISA(across)(some, 1));
    for (int i = 0; i < n; i++) {
      int r = from + i;
      float old = g->first ? none : most[r], top = now[i] > old ? now[i] : old, finite = top > none ? top : 0;
      before[r] = g->first ? 0 : ISA(power)(old - finite - (VEC){0})[0];
      most[r] = top;
      some[i] = (VEC){0};
      for (float *at = g->scores + r * g->apart, *end = at + padded; at < end; at += LANES) {
        VEC weight = ISA(power)(LOAD(at) - finite);
        some[i] += weight;
        STORE(at, weight);
      }
    }
    STORE(now, ISA(across)(some, 0));
    for (int i = 0; i < n; i++) {
      int r = from + i;
      total[r] = g->first ? now[i] : total[r] * before[r] + now[i];
      after[r] = !g->last ? 1 : total[r] == 0 ? 0 : 1 / total[r]; /* 0: all scores are minus infinity */
    }
  }
  if (g->size >= LANES) {
    ISA(all_columns)(rows, g, before, after, answer, g->width);
    return;
  }
  float whole[ROWS * LANES]; /* answers that do not fill a vector */
  for (int i = 0; i < rows * LANES; i++)
    whole[i] = i % LANES < g->size ? answer[i / LANES * g->width + i % LANES] : 0;
  ISA(all_columns)(rows, g, before, after, whole, LANES);
  for (int i = 0; i < rows * LANES; i++)
    if (i % LANES < g->size) answer[i / LANES * g->width + i % LANES] = whole[i];
}

/* Heads of samples, one after another, while there are any that no other thread has taken. */
TARGET static void ISA(attending)(const void *attention, long thread, long end) {
  const struct attention *a = attention;
  long size = a->size, narrow = size < LANES ? LANES : 0;
  float *turned = a->room + thread * a->each, *values = turned + a->block * size, *shift = values + a->block * narrow;
  float *scores = shift + a->block, *most = scores + a->block * ROWS, *total = most + a->longest;
  const float base = 1.44269504f, scale = base / __builtin_sqrtf((float)size);
  (void)end;
  for (;;) {
    long taken = __atomic_fetch_add(a->taken, 1, __ATOMIC_RELAXED), sample = taken / a->heads;
    if (sample >= a->samples) return;
    long begin = a->starts[sample], n = a->starts[sample + 1] - begin, column = taken % a->heads * size;
    long tiles = (n + ROWS - 1) / ROWS;
    for (long at = 0; at < n; at += a->block) {
      long keys = n - at < a->block ? n - at : a->block;
      const float *key = a->key + (begin + at) * a->strides[1] + column;
      const float *value = a->value + (begin + at) * a->strides[2] + column;
      for (long k = 0; k < keys; k += LANES)
        ISA(turn)(keys - k, size, key + k * a->strides[1], a->strides[1], scale, turned + k * size);
      for (long k = 0; k < keys; k++) {
        shift[k] = a->bias ? a->bias[begin + at + k] * base : 0;
        for (long c = 0; c < narrow; c++) values[k * LANES + c] = c < size ? value[k * a->strides[2] + c] : 0;
      }
      for (long k = keys; k % LANES; k++) shift[k] = -__builtin_inff(); /* no key there, whatever its score */
      const ISA(among) g = {keys, size, {a->strides[0], narrow ? LANES : a->strides[2]},
                            turned, narrow ? values : value, shift, scores,
                            a->block, a->heads * size, !at, at + keys == n};
      for (long t = 0; t < tiles; t++) {
        long row = n * t / tiles;
        int rows = (int)(n * (t + 1) / tiles - row);
        const float *query = a->query + (begin + row) * a->strides[0] + column;
        float *answer = a->answer + (begin + row) * g.width + column;
        ISA(queries)(rows, &g, query, most + row, total + row, answer);
      }
    }
  }
}

void ISA(dynanet_attend)(long samples, const int64_t *starts, long heads, long size, const float *query,
                         const float *key, const float *value, long query_stride, long key_stride, long value_stride,
                         const float *bias, float *answer, long block, long longest, long each, float *room,
                         long threads) {
  long taken = 0;
  const struct attention a = {samples, heads, size,    starts, query, key,    value,
                              {query_stride, key_stride, value_stride},
                              bias,    block, longest, each,   room,  answer, &taken};
  double worth = 0;
  for (long s = 0; s < samples; s++) worth += (double)(starts[s + 1] - starts[s]) * (double)(starts[s + 1] - starts[s]);
  worth *= 2.0 * (double)(heads * size) / WORTH;
  if ((double)threads > worth) threads = worth < 1 ? 1 : (long)worth;
  divided(&a, threads, threads, ISA(attending));
}

/* The mean of every sample's rows, `width` numbers each. */
TARGET void ISA(dynanet_means)(long samples, const int64_t *starts, long width, const float *x, float *answer) {
  for (long s = 0; s < samples; s++, answer += width) {
    long rows = starts[s + 1] - starts[s];
    for (long c = 0; c < width; c++) answer[c] = 0;
    for (long r = 0; r < rows; r++, x += width)
      for (long c = 0; c < width; c++) answer[c] += x[c];
    for (long c = 0; c < width; c++) answer[c] /= (float)rows;
  }
}

#undef LOW
#undef HIGH
#undef MIXED
