/* Recurrent cells over whole sequences, included by kernels.h once per instruction set: all rows' gates as products of
 * packed weights with rows that are read where they lie, the nonlinearities behind them while they are in the cache, and
 * the decisions too. Rows do not wait for each other. The structures are in kernels.c. */

#define READY (2 * ROWS)        /* with this number of rows the big cell runs at once */

/* e to the v, to within a rounding or two; v is taken to be within +-40, where a sigmoid has long been 0 or 1. */
INLINE VEC ISA(exponential)(VEC v) {
  const VEC most = 40 - (VEC){0}, round = 12582912 - (VEC){0}; /* 1.5 * 2^23: what is added to it loses its fraction */
  ISA(mask) above = v > most, below = v < -most;
  v = (VEC)(((ISA(mask))v & ~(above | below)) | ((ISA(mask))most & above) | ((ISA(mask))-most & below));
  VEC turns = v * 1.44269504f + round;
  VEC n = turns - round, rest = v - n * 0.693145752f - n * 1.42860677e-6f;
  VEC q = 0.0013814593f * rest + 0.00836871745f; /* e^r = 1 + r + r^2 q(r) for |r| <= ln(2) / 2, relative 3e-9 */
  q = q * rest + 0.0416683882f;
  q = q * rest + 0.166665206f;
  q = q * rest + 0.499999934f;
  VEC power = (VEC)(((ISA(mask))turns << 23) + 0x3f800000);
  return (q * rest * rest + rest + 1) * power;
}

INLINE VEC ISA(first)(const float *from, long n) {
  float piece[LANES];
  if (n >= LANES) return LOAD(from);
  for (int i = 0; i < LANES; i++) piece[i] = i < n ? from[i] : 0;
  return LOAD(piece);
}

INLINE void ISA(put)(float *to, VEC v, long n) {
  if (n >= LANES) {
    STORE(to, v);
    return;
  }
  float piece[LANES];
  STORE(piece, v);
  for (long i = 0; i < n; i++) to[i] = piece[i];
}

INLINE float ISA(dot)(const float *a, const float *b, long n) {
  VEC sums[2] = {{0}, {0}};
  for (; n >= 2 * LANES; n -= 2 * LANES, a += 2 * LANES, b += 2 * LANES) {
    sums[0] += LOAD(a) * LOAD(b);
    sums[1] += LOAD(a + LANES) * LOAD(b + LANES);
  }
  float total = ISA(sum)(sums[0] + sums[1]);
  for (long i = 0; i < n; i++) total += a[i] * b[i];
  return total;
}

/* The sums of `rows` rows (at most ROWS) in `count` panels (at most 4, and 1 for several rows) over the pieces from
 * `begin` to `end`; row r's pieces are from[r * pieces ...], its sums go to pre + r * SUMS. */
#define SUMS (8 * WIDE)
INLINE void ISA(gates)(const int rows, const int count, const struct cell *cell, long begin, long end,
                       const float *const *from, const float *panel, long apart, const float *bias, float *pre) {
  VEC acc[ROWS][8];
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * count; v++) acc[r][v] = LOAD(bias + v * LANES);
  for (long piece = begin; piece < end; piece++) {
    const float *at[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) at[r] = from[r * cell->pieces + piece];
    for (long k = 0; k < cell->sizes[piece]; k++) {
      VEC weight[8];
#pragma GCC unroll 8
      for (int v = 0; v < 2 * count; v++) weight[v] = LOAD(panel + (v / 2) * apart + (v % 2) * LANES);
      if (rows > 3) /* with fewer, loads are what takes the time */
        for (int line = 0; line < WIDE; line += 16) __builtin_prefetch(panel + AHEAD + line, 0, 3);
      panel += WIDE;
#pragma GCC unroll 16
      for (int r = 0; r < rows; r++) {
        VEC value = at[r][k] - (VEC){0};
#pragma GCC unroll 8
        for (int v = 0; v < 2 * count; v++) acc[r][v] += value * weight[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * count; v++) STORE(pre + r * SUMS + v * LANES, acc[r][v]);
}

/* `unit` hidden units of a row from their sums: the new c and h of an LSTM, or h of a GRU. */
INLINE void ISA(renewed)(const struct cell *cell, long unit, const float *pre, const float *old, float *c, float *to) {
  const float *state = pre + SUMS / 2; /* of a GRU the sums over the state, apart from those over the input */
  for (long j = 0; j < unit; j += LANES) {
    long n = unit - j;
    if (cell->lstm) {
      VEC in = ISA(exponential)(-LOAD(pre + j)), forget = ISA(exponential)(-LOAD(pre + unit + j));
      VEC cand = ISA(exponential)(2 * LOAD(pre + 2 * unit + j)), out = ISA(exponential)(-LOAD(pre + 3 * unit + j));
      /* sigmoid(f) c + sigmoid(i) tanh(g), and sigmoid(o) tanh(c), with a division for every product */
      VEC next = ISA(first)(c + j, n) / (1 + forget) + (cand - 1) / ((cand + 1) * (1 + in));
      VEC bent = ISA(exponential)(2 * next);
      ISA(put)(c + j, next, n);
      ISA(put)(to + j, (bent - 1) / ((bent + 1) * (1 + out)), n);
    } else {
      VEC reset = ISA(exponential)(-LOAD(pre + j) - LOAD(state + j));
      VEC update = ISA(exponential)(-LOAD(pre + unit + j) - LOAD(state + unit + j));
      VEC cand = ISA(exponential)(2 * (LOAD(pre + 2 * unit + j) + LOAD(state + 2 * unit + j) / (1 + reset)));
      /* (1 - z) tanh(n) + z h */
      VEC both = (cand - 1) * update + ISA(first)(old + j, n) * (cand + 1);
      ISA(put)(to + j, both / ((cand + 1) * (1 + update)), n);
    }
  }
}

/* The cell for n rows: row i reads pieces from[i * pieces ...] and its old[i], changes c[i] and writes to[i], which is
 * not among what any row reads. */
TARGET static void ISA(step)(const struct cell *cell, long n, const float *const *from, const float *const *old,
                             float *const *c, float *const *to) {
  long depth = 0, before = 0, gates = cell->lstm ? 4 : 3, tiles = (n + ROWS - 1) / ROWS, all = 0;
  for (long piece = 0; piece < cell->pieces; piece++) {
    if (piece == cell->split) before = depth;
    depth += cell->sizes[piece];
  }
  for (long h = 0; h < cell->hidden; h += WIDE)
    all += (gates * (cell->hidden - h < WIDE ? cell->hidden - h : WIDE) + WIDE - 1) / WIDE;
  const float *packed = cell->packed, *bias = cell->bias;
  float pre[ROWS * SUMS];
  for (long h = 0; h < cell->hidden; h += WIDE) { /* a chunk: all gates of these hidden units */
    long unit = cell->hidden - h < WIDE ? cell->hidden - h : WIDE, panels = (gates * unit + WIDE - 1) / WIDE;
    for (long t = 0; t < tiles; t++) {
      long first = n * t / tiles;
      int rows = (int)(n * (t + 1) / tiles - first);
      for (int part = 0; part < (cell->lstm ? 1 : 2); part++) {
        long begin = part ? cell->split : 0, end = cell->lstm || part ? cell->pieces : cell->split;
        const float *panel = packed + part * before * WIDE, *shift = bias + part * all * WIDE;
        float *sums = pre + part * (SUMS / 2);
        if (rows == 1) { /* all panels at once, or every sum would wait for the one before */
#define ALONE(P) ISA(gates)(1, P, cell, begin, end, from + first * cell->pieces, panel, depth * WIDE, shift, sums)
          switch (panels) {
            case 1: ALONE(1); break;
            case 2: ALONE(2); break;
            case 3: ALONE(3); break;
            default: ALONE(4);
          }
#undef ALONE
          continue;
        }
        for (long p = 0; p < panels; p++) {
#define TILE(R)                                                                                                  \
  ISA(gates)(R, 1, cell, begin, end, from + first * cell->pieces, panel + p * depth * WIDE, 0, shift + p * WIDE, \
             sums + p * WIDE)
          EACH_TILE(TILE, rows)
#undef TILE
        }
      }
      for (long r = first; r < first + rows; r++)
        ISA(renewed)(cell, unit, pre + (r - first) * SUMS, old[r] + h, cell->lstm ? c[r] + h : 0, to[r] + h);
    }
    packed += panels * depth * WIDE;
    bias += panels * WIDE;
  }
}

/* ---- update skip --------------------------------------------------------------------------------------------------- */

/* The rows from `begin` to `end`: their first updates together, then their second ones, each at its own time. */
TARGET static void ISA(jumping)(const void *sequences, long begin, long end) {
  const struct sequences *s = sequences;
  long hidden = s->cell.hidden, n = 0;
  float *states[2] = {s->states, s->states + s->batch * hidden};
  for (long b = begin; b < end; b++) {
    s->at[b] = 0;
    s->going[begin + n++] = b;
    for (long j = 0; j < hidden; j++) states[0][b * hidden + j] = 0;
    for (long j = 0; j < hidden && s->cell.lstm; j++) s->c[b * hidden + j] = 0;
  }
  for (int now = 0; n; now = !now) {
    for (long i = 0; i < n; i++) {
      long b = s->going[begin + i];
      s->from[3 * begin + 2 * i] = s->x + (b * s->steps + s->at[b]) * s->inputs;
      s->from[3 * begin + 2 * i + 1] = s->old[begin + i] = states[now] + b * hidden;
      s->to[begin + i] = states[!now] + b * hidden;
      s->memory[begin + i] = s->c + b * hidden;
    }
    ISA(step)(&s->cell, n, s->from + 3 * begin, s->old + begin, s->memory + begin, s->to + begin);
    long on = 0;
    for (long i = 0; i < n; i++) {
      long b = s->going[begin + i], t = s->at[b];
      const float *state = s->to[begin + i];
      VEC delta = 1 / (1 + ISA(exponential)((VEC){0} - (ISA(dot)(state, s->score, hidden) + s->shift)));
      float more = 0.5f / delta[0]; /* steps that are skipped; NaN skips none */
      long next = t + 1 + (more >= 0 ? (long)(more < 1e9f ? more : 1e9f) : 0);
      s->kept[b * s->steps + t] = 1;
      if (next < s->lengths[b]) {
        s->at[b] = next;
        s->going[begin + on++] = b;
      }
      long until = !s->every ? next < s->lengths[b] ? t : t + 1 : next < s->lengths[b] ? next : s->steps;
      for (; t < until; t++) {
        float *answer = s->answer + (s->every ? b * s->steps + t : b) * hidden;
        for (long j = 0; j < hidden; j += LANES) ISA(put)(answer + j, ISA(first)(state + j, hidden - j), hidden - j);
      }
    }
    n = on;
  }
}

int ISA(dynanet_update_skip)(const struct sequences *s, long threads) {
  return over_rows(s, ROWS, threads, ISA(jumping));
}

/* ---- skim ------------------------------------------------------------------------------------------------------------ */

/* Scores a row's next step, and those of padding behind its end; answers 1 to read, 0 to skim, -1 at the end. */
INLINE int ISA(scored)(const struct sequences *s, long b, const float *state) {
  for (; s->at[b] < s->steps; s->at[b]++) {
    long place = b * s->steps + s->at[b];
    float score = ISA(dot)(s->x + place * s->inputs, s->score, s->inputs) +
                  ISA(dot)(state, s->score + s->inputs, s->cell.hidden) + s->shift;
    s->scores[place] = score;
    if (s->at[b] < s->lengths[b]) return s->kept[place] = score > s->threshold;
    for (long j = 0; j < s->cell.hidden && s->every; j++) s->answer[place * s->cell.hidden + j] = state[j];
  }
  return -1;
}

/* The rows from `begin` to `end`. Rows run ahead of each other: what wants to skim skims, until enough rows want to
 * read or none skims. */
TARGET static void ISA(skimming)(const void *sequences, long begin, long end) {
  const struct sequences *s = sequences;
  long hidden = s->cell.hidden, head = s->small.hidden, waiting[2] = {0, 0}; /* to skim, to read */
  int64_t *who[2] = {s->going + begin, s->going + s->batch + begin};
  float *states[2] = {s->states, s->states + s->batch * hidden};
  for (long b = begin; b < end; b++) {
    s->at[b] = s->side[b] = 0;
    for (long j = 0; j < hidden; j++) states[0][b * hidden + j] = 0;
    for (long j = 0; j < hidden && s->cell.lstm; j++) s->c[b * hidden + j] = 0;
    int reads = ISA(scored)(s, b, states[0] + b * hidden);
    if (reads >= 0) who[reads][waiting[reads]++] = b;
  }
  while (waiting[0] + waiting[1]) {
    int reads = waiting[1] >= READY || !waiting[0];
    long n = waiting[reads], pieces = reads ? 2 : 3;
    for (long i = 0; i < n; i++) {
      long b = who[reads][i];
      const float *state = states[s->side[b]] + b * hidden, **from = s->from + 3 * begin + pieces * i;
      from[0] = s->x + (b * s->steps + s->at[b]) * s->inputs;
      from[1] = reads ? state : state + head;
      if (!reads) from[2] = state;
      s->old[begin + i] = state;
      s->to[begin + i] = states[!s->side[b]] + b * hidden;
      s->memory[begin + i] = s->c + b * hidden;
    }
    ISA(step)(reads ? &s->cell : &s->small, n, s->from + 3 * begin, s->old + begin, s->memory + begin, s->to + begin);
    waiting[reads] = 0;
    for (long i = 0; i < n; i++) {
      long b = who[reads][i];
      if (reads) {
        s->side[b] = !s->side[b];
      } else { /* the rest of the state stays where it is */
        float *state = states[s->side[b]] + b * hidden;
        for (long j = 0; j < head; j += LANES) ISA(put)(state + j, ISA(first)(s->to[begin + i] + j, head - j), head - j);
      }
      const float *state = states[s->side[b]] + b * hidden;
      long t = s->at[b]++;
      if (s->every || t + 1 == s->lengths[b]) {
        float *answer = s->answer + (s->every ? b * s->steps + t : b) * hidden;
        for (long j = 0; j < hidden; j += LANES) ISA(put)(answer + j, ISA(first)(state + j, hidden - j), hidden - j);
      }
      int again = ISA(scored)(s, b, state);
      if (again >= 0) who[again][waiting[again]++] = b; /* never beyond i: one list shrinks or the other one grows */
    }
  }
}

int ISA(dynanet_skim)(const struct sequences *s, long threads) { return over_rows(s, ROWS, threads, ISA(skimming)); }

#undef READY
#undef SUMS
