/* Native kernels of dynanet: neuron blocks, experts, pixels, recurrent cells, attention, in float32. Plain C behind a C
 * ABI.
 *
 * kernels.h holds them; here they are compiled once for every instruction set, and each gets its suffix. Which set a
 * processor has is looked up at run time, so one library serves all processors of an architecture. */

#define _GNU_SOURCE /* for madvise */
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>

#define TAPS 64            /* the largest kernel of a convolution: 8 x 8 positions, say */
#define GROUP (256 * 1024) /* bytes of packed weights that stay in the second level's cache */

#define WORTH 4e6          /* multiply-accumulates for which another thread is started */
#define MOST 64            /* threads */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

/* answer (m, n) = gathered rows times packed weights, plus bias, rectified, scaled, put or added where `to` says.
 *
 * Rows come in groups, counts[g] of them after one another, each with weights and bias of its own. A row of the left
 * matrix is `taps` pieces of `channels` numbers: the rows `around[taps * i ...]` of `a`; below 0 it is `zeros`. Without
 * `around`, taps is 1 and rows lie one after another. `packed` is (groups, panels, taps * channels, columns of a panel).
 * `bias`, `to` and `scale` may be 0. */
struct product {
  long groups;
  const int64_t *counts;
  long n, taps, channels;
  const float *a;
  const int64_t *around;
  const float *zeros, *packed, *bias, *scale;
  const int64_t *to;
  long relu, add;
  float *answer;
};

struct share {
  const void *of;
  long begin, end;
  void (*some)(const void *, long, long);
};

static void *work(void *share) {
  const struct share *s = share;
  s->some(s->of, s->begin, s->end);
  return 0;
}

/* Some work in `all` parts that do not depend on each other, by several threads. */
static void divided(const void *of, long all, long threads, void (*some)(const void *, long, long)) {
  if (threads > all) threads = all;
  if (threads > MOST) threads = MOST;
  if (threads < 1) threads = 1;
  struct share shares[MOST];
  pthread_t others[MOST];
  int started[MOST] = {0};
  for (long t = threads - 1; t >= 0; t--) {
    shares[t] = (struct share){of, all * t / threads, all * (t + 1) / threads, some};
    started[t] = t && !pthread_create(&others[t], 0, work, &shares[t]);
    if (!started[t]) work(&shares[t]);
  }
  for (long t = 1; t < threads; t++)
    if (started[t]) pthread_join(others[t], 0);
}

/* The product by several threads, each with columns of its own. Answers whether all of `around` is below `rows` and all
 * of `to` within `places`; if not, nothing is done. */
static int run(const struct product *p, long rows, long places, long panels, long threads,
               void (*some)(const void *, long, long)) {
  long m = 0;
  for (long g = 0; g < p->groups; g++) m += p->counts[g];
  for (long i = 0; p->around && i < m * p->taps; i++)
    if (p->around[i] >= rows) return 0;
  for (long i = 0; p->to && i < m; i++)
    if (p->to[i] < 0 || p->to[i] >= places) return 0;
  long worth = (long)((double)m * (double)p->n * (double)(p->taps * p->channels) / WORTH);
  divided(p, panels, threads < worth ? threads : worth, some);
  return 1;
}

/* ---- recurrent cells over sequences: recurrent.h ------------------------------------------------------------------ */

/* An LSTM or GRU cell whose input lies in `pieces` pieces, of which those from `split` on are the state. `packed` runs
 * over the panels of every chunk of hidden units, all gates of a chunk together; `bias` holds what is added to the
 * sums, one number per column of the panels; of a GRU first for the input, then for the state. */
struct cell {
  long lstm, hidden, pieces, split, sizes[3];
  const float *packed, *bias;
};

/* A batch (batch, steps, inputs), its layer, and room for `kept` (batch, steps), set to 0, and the answer. What is read
 * only, then what is written, then room of the kernel's own; recurrent.py says how much. */
struct sequences {
  struct cell cell, small;
  long batch, steps, inputs, every;
  const float *x;
  const int64_t *lengths;
  const float *score; /* weights: of the state; of the input and the state, for a layer that skims */
  float shift, threshold;
  float *answer, *kept, *scores;
  float *states, *c;
  int64_t *at, *going, *side;
  const float **from, **old;
  float **to, **memory;
};

/* All rows by several threads, each with rows of its own, `together` at least. Answers whether all lengths are from 1
 * to `steps`; if not, nothing is done. */
static int over_rows(const struct sequences *s, long together, long threads,
                     void (*some)(const void *, long, long)) {
  for (long b = 0; b < s->batch; b++)
    if (s->lengths[b] < 1 || s->lengths[b] > s->steps) return 0;
  divided(s, s->batch, threads < s->batch / together ? threads : s->batch / together, some);
  return 1;
}

/* ---- attention within samples of packed rows: attention.h --------------------------------------------------------- */

/* Sample s is the rows from starts[s] to starts[s + 1], of which there are `longest` at most. Every thread has room for
 * `each` numbers, and takes the next head of a sample by counting `taken` up. attention.py says how much room. */
struct attention {
  long samples, heads, size;
  const int64_t *starts;
  const float *query, *key, *value;
  long strides[3];
  const float *bias; /* one number per key, added to its scores, or 0 */
  long block;        /* keys that are looked at together, at most */
  long longest, each;
  float *room, *answer;
  long *taken;
};

/* ------------------------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__) || defined(__i386__)

#define ISA(name) JOIN(name, avx512)
#define TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define LANES 16
#define ROWS 12
#define ACROSS 4
#include "kernels.h"
#undef ISA
#undef TARGET
#undef LANES
#undef ROWS
#undef ACROSS

#define ISA(name) JOIN(name, avx2)
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define ACROSS 2
#include "kernels.h"
#undef ISA
#undef TARGET
#undef LANES
#undef ROWS
#undef ACROSS

static int has_avx512(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

static int has_avx2(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#else

static int has_avx512(void) { return 0; }
static int has_avx2(void) { return 0; }

#endif

#define ISA(name) JOIN(name, generic)
#define TARGET
#define LANES 4
#define ROWS 6
#define ACROSS 2
#include "kernels.h"

/* Bit 0: generic, 1: avx2, 2: avx512. */
int dynanet_sets(void) { return 1 | has_avx2() << 1 | has_avx512() << 2; }

/* Requests large pages: weights are read from end to end, and looking up small pages takes half of that time. */
void dynanet_large_pages(void *begin, long bytes) {
#ifdef MADV_HUGEPAGE
  madvise(begin, (size_t)bytes, MADV_HUGEPAGE); /* in vain where the system has none */
#else
  (void)begin, (void)bytes;
#endif
}

/* What the library was compiled from. */
const char *dynanet_source(void) { return DYNANET_SOURCE; }
