# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""The C of a decoding step of shared attention; `kvshare_cpu` says what it computes, compiles and calls it.

In: macros for what a model is made of. Out: nothing, this is text. Never: runs by itself.
"""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif
/* D head_dim, R rotated width, LANES numbers that part both evenly, T tokens of a tile, KIND of numbers, SWAP 1 where pairs lie
   side by side */
#if defined __AVX512F__
#define MOST 16
#elif defined __AVX__
#define MOST 8
#else
#define MOST 4
#endif
#define L (LANES < MOST ? LANES : MOST) /* of a vector: a wider one than the machine has would pass through memory */
#define N (D / L)
#define CHUNK (N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1)
#define NONE -1e30f
typedef float V __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * L), aligned(2), may_alias));
typedef int16_t S __attribute__((vector_size(2 * L), aligned(2), may_alias));
typedef int8_t B __attribute__((vector_size(L), aligned(1), may_alias));

struct step {
    const float *query;                 /* (batch, kv heads, rows, D), scaled */
    const char *shared;                 /* (batch, kv heads, slots, D) */
    const uint16_t *scale;              /* (batch, kv heads, slots) */
    const float *base, *offset;         /* cos and sin: (batch or 1, tiles, 2, R / 2), (T, 2, R / 2) */
    const char *mask;                   /* (batch or 1, queries, slots) */
    const float *key_bias, *norm, *sizes, *value_bias, *sinks;
    float *out;                         /* (batch, kv heads, rows, D) */
    float *partial;                     /* (batch, kv heads, splits, rows, D + 2) */
    int64_t shared_stride[3];           /* bytes */
    int64_t scale_stride[3];            /* numbers */
    int64_t mask_stride[2];             /* numbers */
    int64_t base_stride, batch, heads, rows, queries, slots, splits, mask_kind, threads;
    float eps, softcap;
};

static inline float half(uint16_t x) {
    uint32_t sign = (uint32_t)(x >> 15) << 31, exponent = (x >> 10) & 31, fraction = x & 1023, bits;
    if (exponent == 0) { float small = fraction * 0x1p-24f; return sign ? -small : small; }
    bits = sign | (exponent + 112) << 23 | fraction << 13;
    float y; memcpy(&y, &bits, 4); return y;
}

/* Whole numbers of bytes, and numbers of 16 bits. At one go, and on ARM from half a vector, gcc would take them one by one. */
#if defined __ARM_NEON && L == 4
static inline I whole(const char *bytes) {
    uint32_t word; memcpy(&word, bytes, 4);
    return (I)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(word)))));
}
static inline V widened(const char *numbers) { return (V)vshll_n_u16(vld1_u16((const uint16_t *)numbers), 16); }
#else
static inline I whole(const char *bytes) { return __builtin_convertvector(__builtin_convertvector(*(const B *)bytes, S), I); }
static inline V widened(const char *numbers) { return (V)(__builtin_convertvector(*(const H *)numbers, I) << 16); }
#endif

static inline V load(const char *row, int i) {
#if KIND == 0
    return *(const V *)(row + 4 * L * i);
#elif KIND == 1
    return widened(row + 2 * L * i);
#elif KIND == 2
    return __builtin_convertvector(whole(row + L * i), V);
#else
    int upper = 2 * i >= N;
    I pair = whole(row + L * (upper ? i - N / 2 : i));
    return __builtin_convertvector((upper ? pair >> 4 & 15 : pair & 15) - 8, V);
#endif
}

static inline float sum(V x) {
    float total = 0;
    for (int i = 0; i < L; i++) total += x[i];
    return total;
}

static inline float power(float x) {      /* e^x, x <= 0 */
    x = x < -87.f ? -87.f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f; y = y * r + 8.3334519073e-3f; y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f; y = y * r + 5.0000001201e-1f; y = y * r * r + r + 1.f;
    union { int32_t i; float f; } two = { .i = ((int32_t)n + 127) << 23 };
    return y * two.f;
}

#if L == 2
#define NEIGHBOURS 1, 0
#elif L == 4
#define NEIGHBOURS 1, 0, 3, 2
#elif L == 8
#define NEIGHBOURS 1, 0, 3, 2, 5, 4, 7, 6
#else
#define NEIGHBOURS 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14
#endif

#if SWAP
static inline V swapped(V x) {
#ifdef __clang__
    return __builtin_shufflevector(x, x, NEIGHBOURS);
#else
    return __builtin_shuffle(x, (I){NEIGHBOURS}); /* the other one is not in gcc before 12 */
#endif
}
#endif

/* R(angle) x, or its inverse */
static inline void turn(V *x, const float *table, int inverse) {
#if R
    const V *cosine = (const V *)table, *sine = (const V *)(table + (SWAP ? R : R / 2));
#if SWAP
    for (int i = 0; i < R / L; i++) {
        V s = inverse ? -sine[i] : sine[i];
        x[i] = x[i] * cosine[i] + swapped(x[i]) * s;
    }
#else
    for (int i = 0; i < R / 2 / L; i++) {
        V a = x[i], b = x[i + R / 2 / L], s = inverse ? -sine[i] : sine[i];
        x[i] = a * cosine[i] - b * s;
        x[i + R / 2 / L] = b * cosine[i] + a * s;
    }
#endif
#endif
}
#define WIDTH (SWAP ? 2 * R : R)        /* of a row of a table */

#define ACCUMULATE(ROWS) \
    for (int c = 0; c < N; c += CHUNK) { \
        V sums[ROWS][CHUNK]; \
        for (int r = 0; r < ROWS; r++) for (int i = 0; i < CHUNK; i++) sums[r][i] = ((V *)(total + r * D))[c + i]; \
        for (int t = 0; t < count; t++) \
            for (int i = 0; i < CHUNK; i++) { \
                V x = load(tile + t * stride, c + i); \
                for (int r = 0; r < ROWS; r++) sums[r][i] += x * weight[r * T + t]; \
            } \
        for (int r = 0; r < ROWS; r++) for (int i = 0; i < CHUNK; i++) ((V *)(total + r * D))[c + i] = sums[r][i]; \
    }

static inline void accumulate(float *total, const float *weight, const char *tile, int64_t stride, int count, int rows) {
    switch (rows) {
        case 1: ACCUMULATE(1) break;
        case 2: ACCUMULATE(2) break;
        case 3: ACCUMULATE(3) break;
        default: ACCUMULATE(4)
    }
}

static void part(const struct step *a, int64_t b, int64_t h, int64_t from, int64_t to, float *work, float *partial) {
    const int64_t rows = a->rows, stride = a->shared_stride[2];
    float *query = work, *score = query + rows * D, *total = score + rows * T, *most = total + rows * D, *mass = most + rows;
    for (int64_t r = 0; r < rows; r++) most[r] = NONE, mass[r] = 0;
    memset(total, 0, 4 * rows * D);
    for (int64_t begin = from; begin < to; begin += T) {
        const int count = to - begin < T ? to - begin : T;
        const char *tile = a->shared + b * a->shared_stride[0] + h * a->shared_stride[1] + begin * stride;
        if (a->mask_kind == 1) {
            int live = 0;
            for (int64_t q = 0; q < a->queries; q++) {
                const char *mask = a->mask + b * a->mask_stride[0] + q * a->mask_stride[1] + begin;
                for (int t = 0; t < count; t++) live |= mask[t];
            }
            if (!live) continue;
        }
        memcpy(query, a->query + (b * a->heads + h) * rows * D, 4 * rows * D);
        for (int64_t r = 0; r < rows; r++)
            turn((V *)(query + r * D), a->base + b * a->base_stride + begin / T * WIDTH, 1);
#if KIND >= 2
        float scales[T];
#endif
        for (int t = 0; t < count; t++) {
            V x[N];
            for (int i = 0; i < N; i++) x[i] = load(tile + t * stride, i);
            float factor = 1;
#if KIND >= 2
            factor = scales[t] = half(a->scale[b * a->scale_stride[0] + h * a->scale_stride[1] + (begin + t) * a->scale_stride[2]]);
            if (a->sizes) for (int i = 0; i < N; i++) x[i] *= ((const V *)(a->sizes + h * D))[i];
            if (a->key_bias || a->norm) {
                for (int i = 0; i < N; i++) x[i] *= factor;
                factor = 1;
            }
#endif
            if (a->key_bias) for (int i = 0; i < N; i++) x[i] += ((const V *)(a->key_bias + h * D))[i];
            if (a->norm) {
                V squares = x[0] * x[0];
                for (int i = 1; i < N; i++) squares += x[i] * x[i];
                factor = 1 / sqrtf(sum(squares) / D + a->eps);
                for (int i = 0; i < N; i++) x[i] *= ((const V *)a->norm)[i];
            }
            turn(x, a->offset + t * WIDTH, 0);
            for (int64_t r = 0; r < rows; r++) {
                const V *y = (const V *)(query + r * D);
                V dot = x[0] * y[0];
                for (int i = 1; i < N; i++) dot += x[i] * y[i];
                score[r * T + t] = sum(dot) * factor;
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            float *x = score + r * T, highest = most[r];
            for (int t = count; t < T; t++) x[t] = NONE;
            if (a->softcap > 0)
                for (int t = 0; t < count; t++) {
                    float y = x[t] < 0 ? x[t] : -x[t];
                    y = 2 / (1 + power(2 * y / a->softcap)) - 1;
                    x[t] = a->softcap * (x[t] < 0 ? -y : y);
                }
            if (a->mask_kind) {
                int64_t at = b * a->mask_stride[0] + r % a->queries * a->mask_stride[1] + begin;
                if (a->mask_kind == 1) for (int t = 0; t < count; t++) x[t] = a->mask[at + t] ? x[t] : NONE;
                else for (int t = 0; t < count; t++) x[t] += ((const float *)a->mask)[at + t];
            }
            for (int t = 0; t < T; t++) highest = x[t] > highest ? x[t] : highest;
            float shrink = power(most[r] - highest), added = 0;
            for (int t = 0; t < T; t++) {
                float y = power(x[t] - highest);
                x[t] = x[t] > NONE / 2 ? y : 0;
                added += x[t];
            }
            most[r] = highest;
            mass[r] = mass[r] * shrink + added;
            for (int i = 0; i < D; i++) total[r * D + i] *= shrink;
#if KIND >= 2
            for (int t = 0; t < count; t++) x[t] *= scales[t];
#endif
        }
        for (int64_t r = 0; r < rows; r += 4)
            accumulate(total + r * D, score + r * T, tile, stride, count, rows - r < 4 ? rows - r : 4);
    }
    for (int64_t r = 0; r < rows; r++, partial += D + 2) {
        memcpy(partial, total + r * D, 4 * D);
        partial[D] = most[r];
        partial[D + 1] = mass[r];
    }
}

void step(const struct step *a) {
    const int64_t units = a->batch * a->heads, parts = units * a->splits, tiles = (a->slots + T - 1) / T;
#pragma omp parallel num_threads(a->threads)
    {
        float *work = malloc(4 * a->rows * (2 * D + T + 2));
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < parts; p++) {
            const int64_t unit = p / a->splits, split = p % a->splits;
            const int64_t from = tiles * split / a->splits * T, to = tiles * (split + 1) / a->splits * T;
            part(a, unit / a->heads, unit % a->heads, from, to < a->slots ? to : a->slots, work,
                 a->partial + p * a->rows * (D + 2));
        }
        free(work);
#pragma omp for
        for (int64_t x = 0; x < units * a->rows; x++) {
            const int64_t unit = x / a->rows, row = x % a->rows, h = unit % a->heads;
            const float *first = a->partial + (unit * a->splits * a->rows + row) * (D + 2);
            float *out = a->out + x * D, highest = NONE, mass = 0, sink = 0;
            for (int64_t s = 0; s < a->splits; s++) {
                const float most = first[s * a->rows * (D + 2) + D];
                highest = most > highest ? most : highest;
            }
            if (a->sinks) {
                sink = a->sinks[h * (a->rows / a->queries) + row / a->queries];
                highest = sink > highest ? sink : highest;
                sink = expf(sink - highest);
            }
            memset(out, 0, 4 * D);
            for (int64_t s = 0; s < a->splits; s++) {
                const float *other = first + s * a->rows * (D + 2), share = expf(other[D] - highest);
                mass += share * other[D + 1];
                for (int i = 0; i < D; i++) out[i] += share * other[i];
            }
            const float whole = mass + sink > 0 ? 1 / (mass + sink) : 0;
#if KIND >= 2
            if (a->sizes) for (int i = 0; i < D; i++) out[i] *= a->sizes[h * D + i];
#endif
            for (int i = 0; i < D; i++) out[i] = out[i] * whole + (a->value_bias ? a->value_bias[h * D + i] * mass * whole : 0);
        }
    }
}
"""
