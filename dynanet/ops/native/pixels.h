/* Pixels: images laid out as rows, the unit that scores them, and which of them are kept. Part of kernels.h, after
 * recurrent.h.
 *
 * Rows are positions: images (batch, channels, height, width) lie as (batch, height, width, channels). */

typedef float ISA(four) __attribute__((vector_size(16), aligned(4), may_alias));
typedef int ISA(order) __attribute__((vector_size(16)));
#define FOUR ISA(four)
#define FOUR_AT(p) (*(FOUR *)(p))
#ifdef __clang__
#define MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, (ISA(order)){i, j, k, l})
#endif

/* ---- layout -------------------------------------------------------------------------------------------------------- */

#define BLOCK 32 /* positions whose rows stay in the first level's cache until they are full */

typedef struct {
  long channels, positions, blocks; /* of an image */
  const float *x;
  float *rows;
} ISA(images);

/* Four rows of four numbers become columns; `from` and `to` say how far the next row is. */
INLINE void ISA(turned)(const float *x, long from, float *rows, long to) {
  FOUR a = FOUR_AT(x), b = FOUR_AT(x + from), c = FOUR_AT(x + 2 * from), d = FOUR_AT(x + 3 * from);
  FOUR ab = MIX(a, b, 0, 4, 1, 5), cd = MIX(c, d, 0, 4, 1, 5);
  FOUR_AT(rows) = MIX(ab, cd, 0, 1, 4, 5), FOUR_AT(rows + to) = MIX(ab, cd, 2, 3, 6, 7);
  ab = MIX(a, b, 2, 6, 3, 7), cd = MIX(c, d, 2, 6, 3, 7);
  FOUR_AT(rows + 2 * to) = MIX(ab, cd, 0, 1, 4, 5), FOUR_AT(rows + 3 * to) = MIX(ab, cd, 2, 3, 6, 7);
}

TARGET static void ISA(blocks)(const void *images, long begin, long end) {
  const ISA(images) *s = images;
  long channels = s->channels, positions = s->positions;
  for (long block = begin; block < end; block++) {
    long image = block / s->blocks * channels * positions, first = block % s->blocks * BLOCK;
    long last = first + BLOCK < positions ? first + BLOCK : positions;
    const float *x = s->x + image;
    float *rows = s->rows + image;
    for (long some = 0; some < channels; some += 16) { /* whole lines of the cache, read and written */
      long until = some + 16 < channels ? some + 16 : channels, p = first;
      for (long c = some; c < until; c++) /* of the next block: too many places for a processor to foresee */
        for (long line = 0; line < BLOCK; line += 16) __builtin_prefetch(x + c * positions + last + line, 0, 2);
      for (; p + 4 <= last; p += 4) {
        long c = some;
        for (; c + 4 <= until; c += 4) ISA(turned)(x + c * positions + p, positions, rows + p * channels + c, channels);
        for (; c < until; c++)
          for (long i = p; i < p + 4; i++) rows[i * channels + c] = x[c * positions + i];
      }
      for (; p < last; p++)
        for (long c = some; c < until; c++) rows[p * channels + c] = x[c * positions + p];
    }
  }
}

/* rows (batch, positions, channels) = x (batch, channels, positions). */
void ISA(dynanet_rows)(long batch, long channels, long positions, const float *x, float *rows, long threads) {
  const ISA(images) s = {channels, positions, (positions + BLOCK - 1) / BLOCK, x, rows};
  long worth = (long)((double)batch * (double)(channels * positions) / (WORTH / 8));
  divided(&s, batch * s.blocks, threads < worth ? threads : worth, ISA(blocks));
}

/* ---- scores -------------------------------------------------------------------------------------------------------- */

#define NINE 9
#define STRIP 8 /* positions whose sums wait to be added up together */

typedef struct {
  long height, width, channels, padded, wide, tile; /* padded: channels, wide: width, up to whole vectors */
  const float *x, *weights, *whole;                 /* weights (9, padded), of the mean (channels) */
  float shift, *sums, *taps;                        /* sums (batch * height, padded), taps (batch * height, 9, wide) */
  float *answer;
} ISA(scores);

/* What `together` (1 or 2) positions give to each of the nine around them, a vector to be added up for each, into
 * given (9, STRIP); adds the positions to the sums of their line. */
INLINE void ISA(given)(const int together, const ISA(scores) * s, const float *x, float *sums, float *given) {
  VEC acc[2][NINE];
#pragma GCC unroll 2
  for (int r = 0; r < together; r++)
#pragma GCC unroll 9
    for (int t = 0; t < NINE; t++) acc[r][t] = (VEC){0};
  for (long c = 0; c < s->channels; c += LANES) {
    VEC value[2], sum = LOAD(sums + c);
#pragma GCC unroll 2
    for (int r = 0; r < together; r++) {
      __builtin_prefetch(x + r * s->channels + c + 2 * AHEAD, 0, 2);
      value[r] = ISA(first)(x + r * s->channels + c, s->channels - c);
      sum += value[r];
    }
    STORE(sums + c, sum);
#pragma GCC unroll 9
    for (int t = 0; t < NINE; t++) {
      VEC weight = LOAD(s->weights + t * s->padded + c);
#pragma GCC unroll 2
      for (int r = 0; r < together; r++) acc[r][t] += value[r] * weight;
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < together; r++)
#pragma GCC unroll 9
    for (int t = 0; t < NINE; t++) STORE(given + (t * STRIP + r) * LANES, acc[r][t]);
}

/* The sums of four vectors. */
INLINE FOUR ISA(added)(const float *vectors) {
  FOUR quarter[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    quarter[i] = FOUR_AT(vectors + i * LANES);
#pragma GCC unroll 4
    for (int part = 4; part < LANES; part += 4) quarter[i] += FOUR_AT(vectors + i * LANES + part);
  }
  FOUR ab = MIX(quarter[0], quarter[1], 0, 4, 1, 5) + MIX(quarter[0], quarter[1], 2, 6, 3, 7);
  FOUR cd = MIX(quarter[2], quarter[3], 0, 4, 1, 5) + MIX(quarter[2], quarter[3], 2, 6, 3, 7);
  return MIX(ab, cd, 0, 1, 4, 5) + MIX(ab, cd, 2, 3, 6, 7);
}

TARGET static void ISA(lines)(const void *scores, long begin, long end) {
  const ISA(scores) *s = scores;
  float given[NINE * STRIP * LANES] = {0};
  for (long line = begin; line < end; line++) {
    const float *x = s->x + line * s->width * s->channels;
    float *sums = s->sums + line * s->padded, *taps = s->taps + line * NINE * s->wide;
    for (long c = 0; c < s->padded; c++) sums[c] = 0;
    for (long strip = 0; strip < s->width; strip += STRIP) {
      long n = s->width - strip < STRIP ? s->width - strip : STRIP, r = 0;
      for (; LANES > 8 && r + 2 <= n; r += 2)
        ISA(given)(2, s, x + (strip + r) * s->channels, sums, given + r * LANES);
      for (; r < n; r++) ISA(given)(1, s, x + (strip + r) * s->channels, sums, given + r * LANES);
      for (long t = 0; t < NINE; t++)
        for (r = 0; r < n; r += 4) FOUR_AT(taps + t * s->wide + strip + r) = ISA(added)(given + (t * STRIP + r) * LANES);
    }
  }
}

/* Adds to a line of positions what the line `step` positions beside it gives. */
INLINE void ISA(beside)(float *line, const float *given, long width, long step) {
  long at = step < 0 ? 1 : 0, last = step > 0 ? width - 1 : width;
  for (; at + LANES <= last; at += LANES) STORE(line + at, LOAD(line + at) + LOAD(given + at + step));
  for (; at < last; at++) line[at] += given[at + step];
}

/* The images from `begin` to `end`: the middle tap of a line becomes its scores. */
TARGET static void ISA(tiles)(const void *scores, long begin, long end) {
  const ISA(scores) *s = scores;
  long down = (s->height + s->tile - 1) / s->tile, across = (s->width + s->tile - 1) / s->tile;
  for (long image = begin; image < end; image++) {
    float *sums = s->sums + image * s->height * s->padded, *taps = s->taps + image * s->height * NINE * s->wide;
    float *answer = s->answer + image * down * across;
    for (long c = 0; c < s->padded; c += LANES)
      for (long y = 1; y < s->height; y++) STORE(sums + c, LOAD(sums + c) + LOAD(sums + y * s->padded + c));
    float overall = s->shift + ISA(dot)(sums, s->whole, s->channels) / (float)(s->height * s->width);
    for (long i = 0; i < down * across; i++) answer[i] = 0;
    for (long y = 0; y < s->height; y++) {
      float *line = taps + (y * NINE + NINE / 2) * s->wide, *row = answer + y / s->tile * across;
      for (long t = 0; t < NINE; t++)
        if (t != NINE / 2 && y + t / 3 >= 1 && y + t / 3 <= s->height)
          ISA(beside)(line, taps + ((y + t / 3 - 1) * NINE + t) * s->wide, s->width, t % 3 - 1);
      for (long x = 0, left = s->tile; x < s->width; x++, left--) {
        if (!left) left = s->tile, row++;
        *row += line[x];
      }
    }
    for (long i = 0; i < down * across; i++) {
      long high = s->height - i / across * s->tile, wide = s->width - i % across * s->tile;
      high = high < s->tile ? high : s->tile, wide = wide < s->tile ? wide : s->tile;
      answer[i] = answer[i] / (float)(high * wide) + overall;
    }
  }
}

/* answer (batch, tiles down, tiles across): a 3x3 convolution of x (batch, height, width, channels) to one channel,
 * averaged over tiles, plus what the image's mean gives. `around` (channels, 9) and `whole` (channels) are the weights.
 * `room` has place for 9 * padded + batch * height * (padded + 9 * wide) numbers: channels and width, up to a multiple of 16. */
void ISA(dynanet_scores)(long batch, long height, long width, long channels, long tile, const float *x,
                         const float *around, const float *whole, float shift, float *room, float *answer,
                         long threads) {
  long padded = (channels + 15) / 16 * 16, wide = (width + 15) / 16 * 16;
  float *sums = room + NINE * padded;
  for (long t = 0; t < NINE; t++)
    for (long c = 0; c < padded; c++) room[t * padded + c] = c < channels ? around[c * NINE + t] : 0;
  const ISA(scores) s = {height, width, channels, padded, wide, tile, x, room, whole, shift, sums,
                         sums + batch * height * padded, answer};
  long worth = (long)((double)(batch * height * width) * (double)(channels * 10) / WORTH);
  divided(&s, batch * height, threads < worth ? threads : worth, ISA(lines));
  divided(&s, batch, threads < worth ? threads : worth, ISA(tiles));
}

/* ---- places -------------------------------------------------------------------------------------------------------- */

/* The positions within `reach`, down and across, of one that is kept: how many, and which, in order. `row_of` says of
 * every position which of them it is, -1 if none. `marks` has room for all positions; `places` and `row_of` may be 0. */
TARGET static long ISA(places)(long images, long height, long width, long reach, const float *keep,
                               unsigned char *marks, int64_t *places, int64_t *row_of) {
  long positions = images * height * width, n = 0;
  for (long i = 0; i < positions; i++) marks[i] = !reach && keep[i] != 0;
  for (long i = 0; i < positions && reach; i++) {
    if (!(keep[i] != 0)) continue;
    long y = i / width % height, x = i % width;
    long left = x < reach ? -x : -reach, right = width - 1 - x < reach ? width - 1 - x : reach;
    long top = y < reach ? -y : -reach, bottom = height - 1 - y < reach ? height - 1 - y : reach;
    for (long down = top; down <= bottom; down++)
      for (long across = left; across <= right; across++) marks[i + down * width + across] = 1;
  }
  for (long i = 0; i < positions; i++) {
    if (places && marks[i]) places[n] = i;
    if (row_of) row_of[i] = marks[i] ? n : -1;
    n += marks[i];
  }
  return n;
}

/* around (n, down * across): for every place, the rows that a kernel reads there, and -1 beyond the image's edge.
 * `row_of` says which row a position is, below 0 for none; without it, the position itself. */
TARGET static void ISA(neighbours)(long n, const int64_t *places, const int64_t *row_of, long height, long width,
                                   const int64_t *kernel, const int64_t *dilation, int64_t *around) {
  int64_t offset[TAPS];
  long taps = 0, high = (kernel[0] - 1) * dilation[0], wide = (kernel[1] - 1) * dilation[1];
  for (long y = 0; y <= high; y += dilation[0])
    for (long x = 0; x <= wide; x += dilation[1]) offset[taps++] = (y - high / 2) * width + x - wide / 2;
  for (long i = 0; i < n; i++, around += taps) {
    int64_t place = places[i];
    long top = place / width % height - high / 2, left = place % width - wide / 2;
    if (top >= 0 && left >= 0 && top + high < height && left + wide < width) {
      for (long t = 0; t < taps; t++) around[t] = row_of ? row_of[place + offset[t]] : place + offset[t];
      continue;
    }
    for (long t = 0, y = top; y <= top + high; y += dilation[0])
      for (long x = left; x <= left + wide; x += dilation[1], t++) {
        int out = y < 0 || y >= height || x < 0 || x >= width;
        around[t] = out ? -1 : row_of ? row_of[place + offset[t]] : place + offset[t];
      }
  }
}

/* Convolutions of stride 1, one after the other, each with a ReLU or not and at the positions within a reach of a kept
 * one. `sizes` has seven numbers for each: outputs, reach, ReLU, the kernel's size and its dilation, down and across.
 * `rows` are all positions, or those within `before` of a kept one. The last answer is written in order of positions, or
 * added (`add`) to all positions; the others to spare rows. Answers how many rows the last one has, -1 where something
 * does not fit. pixels.py says how much room there is. */
long ISA(dynanet_convolutions)(long images, long height, long width, const float *keep, long before, long held,
                               long channels, const float *rows, long several, const int64_t *sizes,
                               const float *const *packed, const float *const *bias, const float *zeros,
                               float *spare[2], unsigned char *marks, int64_t *room, long add, float *answer,
                               long threads) {
  long positions = images * height * width, n = positions;
  int64_t *places = room, *row_of = room + positions, *around = room + 2 * positions;
  if (before >= 0) n = ISA(places)(images, height, width, before, keep, marks, places, 0);
  if (held != n) return -1;
  for (long i = 0; i < several; i++, sizes += 7) {
    long outputs = sizes[0], reach = sizes[1], taps = sizes[3] * sizes[4], last = i + 1 == several;
    const int64_t *reads = 0;
    if (reach != before) {
      if (before >= 0) ISA(places)(images, height, width, before, keep, marks, 0, row_of);
      n = ISA(places)(images, height, width, reach, keep, marks, places, 0);
      reads = taps == 1 && before < 0 ? places : around;
      if (reads == around)
        ISA(neighbours)(n, places, before < 0 ? 0 : row_of, height, width, sizes + 3, sizes + 5, around);
    } else if (taps != 1) {
      return -1;
    }
    int64_t count = n;
    float *to = last ? answer : spare[i % 2];
    if (!ISA(dynanet_product)(1, &count, outputs, taps, channels, held, rows, reads, zeros, packed[i], bias[i], 0,
                              positions, last && add ? places : 0, sizes[2], last && add, to, threads))
      return -1;
    rows = to, channels = outputs, held = n, before = reach;
  }
  return n;
}

#undef FOUR
#undef FOUR_AT
#undef MIX
#undef BLOCK
#undef NINE
#undef STRIP
