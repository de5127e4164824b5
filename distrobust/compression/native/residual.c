/* One pass over a parameter: accumulate, and list the coordinates at or above a threshold. See accumulate.py, whose
   numpy version this equals to the bit: every product and sum is rounded by itself, in the same order.

   Results go around the cache (streaming stores): they are read again in the next step only, and fetching lines just
   to overwrite them would add two fifths to the traffic. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { AHEAD = 24 }; /* scattered places are fetched this many before they are needed */

typedef struct {
    float momentum, factor, decay, threshold;
    int32_t has_momentum, has_decay, nesterov; /* a number that rounds to zero is there all the same */
} rule_t;

static inline float one(float u, float g, float w, const rule_t *r, float *next_u) {
    float step = r->factor == 1.0f ? g : g * r->factor;
    if (r->has_decay) step = w * r->decay + step;
    if (!r->has_momentum) return step;
    float velocity = u * r->momentum + step;
    *next_u = velocity;
    return r->nesterov ? velocity * r->momentum + step : velocity;
}

/* Elements start to stop, one at a time. Returns the number listed, -1 if there is no room for them. */
static int64_t scalar(const float *u, const float *v, const float *g, const float *w, float *next_u, float *next_v,
                      int64_t start, int64_t stop, const rule_t *r, int32_t *places, float *sums, int64_t count, int64_t room) {
    float unused;
    for (int64_t i = start; i < stop; i++) {
        float step = one(r->has_momentum ? u[i] : 0.0f, g[i], r->has_decay ? w[i] : 0.0f, r,
                         r->has_momentum ? next_u + i : &unused);
        float sum = v[i] + step;
        next_v[i] = sum;
        if (!(fabsf(sum) < r->threshold)) {
            if (count == room) return -1;
            places[count] = (int32_t)i;
            sums[count++] = sum;
        }
    }
    return count;
}

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDTH 16

static int64_t wide(const float *u, const float *v, const float *g, const float *w, float *next_u, float *next_v,
                    int64_t start, int64_t stop, const rule_t *r, int32_t *places, float *sums, int64_t count, int64_t room) {
    const __m512 momentum = _mm512_set1_ps(r->momentum), factor = _mm512_set1_ps(r->factor);
    const __m512 decay = _mm512_set1_ps(r->decay), threshold = _mm512_set1_ps(r->threshold);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = start; i < stop; i += WIDTH) {
        __m512 step = _mm512_loadu_ps(g + i);
        if (r->factor != 1.0f) step = _mm512_mul_ps(step, factor);
        if (r->has_decay) step = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(w + i), decay), step);
        if (r->has_momentum) {
            __m512 velocity = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(u + i), momentum), step);
            _mm512_stream_ps(next_u + i, velocity);
            step = r->nesterov ? _mm512_add_ps(_mm512_mul_ps(velocity, momentum), step) : velocity;
        }
        __m512 sum = _mm512_add_ps(_mm512_loadu_ps(v + i), step);
        _mm512_stream_ps(next_v + i, sum);
        __mmask16 hits = _mm512_cmp_ps_mask(_mm512_abs_ps(sum), threshold, _CMP_NLT_UQ); /* NaN is a hit */
        if (hits) {
            if (count + WIDTH > room) return -1;
            __m512i here = _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)i));
            _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(hits, here));
            _mm512_storeu_ps(sums + count, _mm512_maskz_compress_ps(hits, sum));
            count += __builtin_popcount(hits);
        }
    }
    _mm_sfence();
    return count;
}
#elif defined(__AVX2__)
#include <immintrin.h>
#define WIDTH 8

static int64_t wide(const float *u, const float *v, const float *g, const float *w, float *next_u, float *next_v,
                    int64_t start, int64_t stop, const rule_t *r, int32_t *places, float *sums, int64_t count, int64_t room) {
    const __m256 momentum = _mm256_set1_ps(r->momentum), factor = _mm256_set1_ps(r->factor);
    const __m256 decay = _mm256_set1_ps(r->decay), threshold = _mm256_set1_ps(r->threshold);
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t i = start; i < stop; i += WIDTH) {
        __m256 step = _mm256_loadu_ps(g + i);
        if (r->factor != 1.0f) step = _mm256_mul_ps(step, factor);
        if (r->has_decay) step = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(w + i), decay), step);
        if (r->has_momentum) {
            __m256 velocity = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(u + i), momentum), step);
            _mm256_stream_ps(next_u + i, velocity);
            step = r->nesterov ? _mm256_add_ps(_mm256_mul_ps(velocity, momentum), step) : velocity;
        }
        __m256 sum = _mm256_add_ps(_mm256_loadu_ps(v + i), step);
        _mm256_stream_ps(next_v + i, sum);
        unsigned hits = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, sum), threshold, _CMP_NLT_UQ));
        if (hits && count + WIDTH > room) return -1;
        for (; hits; hits &= hits - 1) {
            places[count] = (int32_t)(i + __builtin_ctz(hits));
            sums[count] = next_v[places[count]];
            count++;
        }
    }
    _mm_sfence();
    return count;
}
#endif

/* next_u and next_v must begin at a multiple of 64 bytes. `places` and `sums` (the next v there) hold `room` numbers each.
   Returns how many were listed,
   -1 if they did not fit: next_u and next_v are then written in part, up to the first value without room. */
int64_t distrobust_accumulate(const float *u, const float *v, const float *g, const float *w, float *next_u,
                              float *next_v, int64_t n, const rule_t *r, int32_t *places, float *sums,
                              int64_t room) {
    int64_t count = 0, whole = 0;
#ifdef WIDTH
    whole = n / WIDTH * WIDTH;
    count = wide(u, v, g, w, next_u, next_v, 0, whole, r, places, sums, 0, room);
    if (count < 0) return count;
#endif
    return scalar(u, v, g, w, next_u, next_v, whole, n, r, places, sums, count, room);
}

/* The k of largest magnitude among `count` values (1 <= k <= count), in the order they come; of equals, the first ones.
   Writes their places and values, and the smallest of their magnitudes. No value is NaN.

   A magnitude is ordered as its bits are: the k-th largest is found bit by bit, counting in vectors. */
void distrobust_select(const int32_t *places, const float *values, int64_t count, int64_t k, int64_t *chosen,
                       float *chosen_values, float *least) {
    const uint32_t *words = (const uint32_t *)values; /* -fno-strict-aliasing */
    const uint32_t magnitude = 0x7fffffffu;
    uint32_t threshold = 0;
    for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
        const uint32_t tried = threshold | bit;
        int32_t reached = 0; /* there are fewer than 2^31 places */
        for (int64_t i = 0; i < count; i++) reached += (words[i] & magnitude) >= tried;
        if (reached >= k) threshold = tried;
    }
    int64_t ties = k;
    for (int64_t i = 0; i < count; i++) ties -= (words[i] & magnitude) > threshold;
    for (int64_t i = 0, at = 0; at < k; i++) {
        const uint32_t word = words[i] & magnitude;
        const int tie = word == threshold;
        chosen[at] = places[i];
        chosen_values[at] = values[i];
        at += (word > threshold) | (tie & (ties > 0));
        ties -= tie;
    }
    memcpy(least, &threshold, sizeof threshold);
}

/* out = 0; around the cache if it would not fit there. */
void distrobust_clear(float *out, int64_t n) {
    int64_t i = 0;
    if (n < 1 << 20) {
        memset(out, 0, (size_t)n * sizeof *out);
        return;
    }
#ifdef __AVX512F__
    for (; i < n && (uintptr_t)(out + i) % 64; i++) out[i] = 0.0f;
    for (; i + 16 <= n; i += 16) _mm512_stream_ps(out + i, _mm512_setzero_ps());
    _mm_sfence();
#elif defined(__AVX2__)
    for (; i < n && (uintptr_t)(out + i) % 32; i++) out[i] = 0.0f;
    for (; i + 8 <= n; i += 8) _mm256_stream_ps(out + i, _mm256_setzero_ps());
    _mm_sfence();
#endif
    for (; i < n; i++) out[i] = 0.0f;
}

/* out[places] += values */
void distrobust_add(float *out, const int64_t *places, const float *values, int64_t k) {
    for (int64_t j = 0; j < k; j++) {
        if (j + AHEAD < k) __builtin_prefetch(out + places[j + AHEAD], 1);
        out[places[j]] += values[j];
    }
}

/* v[i] -= sent and, if there is a u, u[i] = 0, for i = places - first. The lines were streamed out: fetched ahead. */
void distrobust_remove(float *v, float *u, const int64_t *places, int64_t first, const float *sent, int64_t k) {
    for (int64_t j = 0; j < k; j++) {
        if (j + AHEAD < k) {
            __builtin_prefetch(v + (places[j + AHEAD] - first), 1);
            if (u) __builtin_prefetch(u + (places[j + AHEAD] - first), 1);
        }
        int64_t i = places[j] - first;
        v[i] -= sent[j];
        if (u) u[i] = 0.0f;
    }
}
