/* Bits, index and value codes on a little-endian processor. Each function equals the torch or numpy version named above
   it to the bit. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static float from_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half >> 15) << 31, exponent = half >> 10 & 31, mantissa = half & 1023;
    float value;
    uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | mantissa << 13;
    if (exponent == 0) { /* zero and below the smallest normal number: multiples of 2^-24 */
        value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    memcpy(&value, &bits, 4);
    return value;
}

/* A level and its negative, within what float32 can hold; NaN stays. */
static void put_signed(float *out, float level) {
    out[0] = level > FLT_MAX ? FLT_MAX : level < -FLT_MAX ? -FLT_MAX : level;
    out[1] = -out[0];
}

/* bits.pack: `out` holds ceil(k / 8) * width bytes. */
void distrobust_pack(const int64_t *numbers, int64_t k, int64_t width, uint8_t *out) {
    const int64_t whole = width / 8, rest = width % 8;
    const uint64_t mask = (1u << rest) - 1;
    for (int64_t group = 0; group < k; group += 8) {
        uint64_t word = 0;
        for (int64_t i = 0; i < 8; i++) {
            uint64_t number = group + i < k ? (uint64_t)numbers[group + i] : 0;
            for (int64_t byte = 0; byte < whole; byte++) *out++ = (uint8_t)(number >> 8 * byte);
            word |= (number >> 8 * whole & mask) << rest * i;
        }
        for (int64_t byte = 0; byte < rest; byte++) *out++ = (uint8_t)(word >> 8 * byte);
    }
}

/* The eight numbers of one group that pack wrote. */
static inline void unpack_group(const uint8_t *packed, int64_t width, int64_t numbers[8]) {
    const int64_t whole = width / 8, rest = width % 8;
    const uint64_t mask = (1u << rest) - 1;
    uint64_t word = 0;
    for (int64_t byte = 0; byte < rest; byte++) word |= (uint64_t)packed[8 * whole + byte] << 8 * byte;
    for (int64_t i = 0; i < 8; i++) {
        uint64_t number = (word >> rest * i & mask) << 8 * whole;
        for (int64_t byte = 0; byte < whole; byte++) number |= (uint64_t)packed[whole * i + byte] << 8 * byte;
        numbers[i] = (int64_t)number;
    }
}

/* bits.unpack */
void distrobust_unpack(const uint8_t *packed, int64_t k, int64_t width, int64_t *out) {
    int64_t numbers[8];
    for (int64_t group = 0; group < k; group += 8, packed += width) {
        unpack_group(packed, width, numbers);
        for (int64_t i = 0; i < 8 && group + i < k; i++) out[group + i] = numbers[i];
    }
}

/* bits.mark: `out` is zero, and long enough for the largest place. */
void distrobust_mark(const int64_t *places, int64_t k, uint8_t *out) {
    for (int64_t i = 0; i < k; i++) out[places[i] >> 3] |= (uint8_t)(1u << (places[i] & 7));
}

/* bits.marked: the places of up to `room` bits that are set. Returns how many were written. */
int64_t distrobust_marked(const uint8_t *packed, int64_t num_bytes, int64_t room, int64_t *out) {
    int64_t count = 0;
    for (int64_t start = 0; start < num_bytes; start += 8) {
        uint64_t word = 0;
        const int64_t left = num_bytes - start;
        memcpy(&word, packed + start, left < 8 ? (size_t)left : 8);
        for (; word; word &= word - 1) {
            if (count == room) return count;
            out[count++] = 8 * start + __builtin_ctzll(word);
        }
    }
    return count;
}

/* values._numbers: for every block 2 * (how many of its `num_middles` middles lie below |value| / scale) + sign. */
void distrobust_numbers(const float *values, const int64_t *sizes, int64_t num_blocks, const float *scales,
                        const float *middles, int64_t num_middles, int64_t *out) {
    for (int64_t block = 0; block < num_blocks; block++, middles += num_middles) {
        const float scale = scales[block];
        for (int64_t i = 0; i < sizes[block]; i++) {
            const float relative = scale > 0.0f ? fabsf(values[i]) / scale : 0.0f;
            int32_t level = 0;
            for (int64_t j = 0; j < num_middles; j++) level += middles[j] < relative;
            out[i] = 2 * level + (values[i] < 0.0f);
        }
        values += sizes[block];
        out += sizes[block];
    }
}

/* values._looked_up: out = tables[block, number]. */
void distrobust_look_up(const int64_t *numbers, const int64_t *sizes, int64_t num_blocks, const float *tables,
                        int64_t length, float *out) {
    for (int64_t block = 0; block < num_blocks; block++, tables += length) {
        for (int64_t i = 0; i < sizes[block]; i++) out[i] = tables[numbers[i]];
        numbers += sizes[block];
        out += sizes[block];
    }
}

static int64_t below(const float *ordered, int64_t m, float bound) {
    int64_t low = 0, high = m;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (ordered[middle] < bound) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* values._lloyd: `rounds` of moving every level of a row to the mean of the `m` magnitudes nearest to it; `sums` are
   the row's running sums, with a zero in front. At most 256 levels. */
void distrobust_lloyd(const float *ordered, const double *sums, int64_t rows, int64_t m, float *levels,
                      int64_t num_levels, int64_t rounds) {
    int64_t ends[257];
    for (int64_t row = 0; row < rows; row++, ordered += m, sums += m + 1, levels += num_levels)
        for (int64_t round = 0; round < rounds; round++) {
            ends[0] = 0;
            ends[num_levels] = m;
            for (int64_t j = 1; j < num_levels; j++) ends[j] = below(ordered, m, (levels[j] + levels[j - 1]) / 2);
            for (int64_t j = 0; j < num_levels; j++)
                if (ends[j + 1] > ends[j])
                    levels[j] = (float)((sums[ends[j + 1]] - sums[ends[j]]) / (double)(ends[j + 1] - ends[j]));
        }
}

/* Elias-Fano indices and leveled values of `width` bits in one go, as codec.encode puts them together. `out` gets the
   unary part (`unary` bytes), the low bits, `heads` and `tables` as they are, and the values' numbers; `sent` what a
   receiver decodes. `levels` are those of every block, in units of its scale. */
void distrobust_encode(const int64_t *indices, int64_t k, int64_t low, int64_t unary, const float *values,
                       const int64_t *sizes, int64_t num_blocks, const float *scales, const float *levels,
                       int64_t num_levels, int64_t width, const uint8_t *heads, int64_t heads_bytes,
                       const uint8_t *tables, int64_t tables_bytes, uint8_t *out, float *sent) {
    memset(out, 0, (size_t)unary);
    for (int64_t i = 0; i < k; i++) {
        const int64_t place = (indices[i] >> low) + i;
        out[place >> 3] |= (uint8_t)(1u << (place & 7));
    }
    out += unary;
    distrobust_pack(indices, k, low, out);
    out += (k + 7) / 8 * low;
    memcpy(out, heads, (size_t)heads_bytes);
    memcpy(out + heads_bytes, tables, (size_t)tables_bytes);
    out += heads_bytes + tables_bytes;
    uint64_t word = 0;
    int64_t i = 0;
    for (int64_t block = 0; block < num_blocks; block++, levels += num_levels) {
        const float scale = scales[block];
        float middles[128], signed_levels[256];
        for (int64_t j = 0; j + 1 < num_levels; j++) middles[j] = (levels[j + 1] + levels[j]) / 2;
        for (int64_t j = 0; j < num_levels; j++) put_signed(signed_levels + 2 * j, levels[j] * scale);
        for (const int64_t end = i + sizes[block]; i < end; i++) {
            const float relative = scale > 0.0f ? fabsf(values[i]) / scale : 0.0f;
            uint32_t level = 0;
            for (int64_t j = 0; j + 1 < num_levels; j++) level += middles[j] < relative;
            const uint32_t number = 2 * level + (values[i] < 0.0f);
            sent[i] = signed_levels[number];
            word |= (uint64_t)number << width * (i & 7);
            if ((i & 7) == 7 || i + 1 == k) {
                for (int64_t byte = 0; byte < width; byte++) *out++ = (uint8_t)(word >> 8 * byte);
                word = 0;
            }
        }
    }
}

/* The inverse: `indices` and `values` of k coordinates below n. 0, or 1 where the payload is not what encode wrote, which
   codec.decode then says by itself. `starts` and `planned` are those of the space's blocks; those of at least
   `fitted_from` values have a table of their own, the others `typical` levels. `indices` has room for k + 1. */
int64_t distrobust_decode(const uint8_t *payload, int64_t n, int64_t k, int64_t low, int64_t unary,
                          const int64_t *starts, const int64_t *planned, int64_t num_blocks, int64_t width,
                          int64_t fitted_from, const float *typical, int64_t *indices, float *values) {
    const int64_t num_levels = (int64_t)1 << (width - 1);
    if (distrobust_marked(payload, unary, k + 1, indices) != k) return 1;
    const uint8_t *packed = payload + unary, *heads = packed + (k + 7) / 8 * low;
    int64_t lows[8];
    for (int64_t group = 0; group < k; group += 8, packed += low) {
        unpack_group(packed, low, lows);
        for (int64_t i = 0; i < 8 && group + i < k; i++)
            indices[group + i] = (indices[group + i] - group - i) << low | lows[i];
    }
    for (int64_t i = 1; i < k; i++)
        if (indices[i] <= indices[i - 1]) return 1;
    if (indices[k - 1] >= n) return 1;
    const uint8_t *tables = heads + 2 * num_blocks, *coded = tables;
    for (int64_t block = 0; num_levels > 1 && block < num_blocks; block++)
        if (planned[block] >= fitted_from) coded += 2 * num_levels;
    int64_t i = 0;
    for (int64_t block = 0; block < num_blocks; block++) {
        uint16_t half;
        uint32_t bits;
        float scale, signed_levels[256];
        memcpy(&half, heads + 2 * block, 2);
        bits = (uint32_t)half << 16;
        memcpy(&scale, &bits, 4);
        const int fitted = num_levels > 1 && planned[block] >= fitted_from;
        for (int64_t j = 0; j < num_levels; j++) {
            float level = typical[j];
            if (fitted) {
                memcpy(&half, tables, 2);
                level = from_half(half);
                tables += 2;
            }
            put_signed(signed_levels + 2 * j, level * scale);
        }
        const int64_t stop = block + 1 < num_blocks ? starts[block + 1] : n, first = i;
        for (; i < k && indices[i] < stop; i++) {
            uint64_t word = 0;
            const uint8_t *group = coded + i / 8 * width;
            for (int64_t byte = 0; byte < width; byte++) word |= (uint64_t)group[byte] << 8 * byte;
            values[i] = signed_levels[word >> width * (i & 7) & ((1u << width) - 1)];
        }
        if (i - first > planned[block]) return 1;
    }
    return 0;
}

/* message._checksum over all but the first four bytes, which get it or are compared with it (1 if equal). */
static uint32_t checksum(const uint8_t *body, int64_t num_bytes, int64_t seed) {
    uint64_t total = (uint64_t)seed;
    int64_t i = 0;
    for (; 4 * i + 4 <= num_bytes; i++) {
        int32_t word;
        memcpy(&word, body + 4 * i, 4);
        total += (uint64_t)(int64_t)word * (uint64_t)(2 * i + 1);
    }
    if (4 * i < num_bytes) {
        int32_t word = 0;
        memcpy(&word, body + 4 * i, (size_t)(num_bytes - 4 * i));
        total += (uint64_t)(int64_t)word * (uint64_t)(2 * i + 1);
    }
    return (uint32_t)(total * 0x9E3779B97F4A7C15u >> 32);
}

void distrobust_seal(uint8_t *message, int64_t num_bytes, int64_t seed) {
    const uint32_t sum = checksum(message + 4, num_bytes - 4, seed);
    memcpy(message, &sum, 4);
}

int64_t distrobust_verify(const uint8_t *message, int64_t num_bytes, int64_t seed) {
    const uint32_t sum = checksum(message + 4, num_bytes - 4, seed);
    return memcmp(message, &sum, 4) == 0;
}
