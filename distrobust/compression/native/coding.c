/* Bits, index and value codes on a little-endian processor. Each function equals the torch or numpy version named above
   it to the bit. */

#include <math.h>
#include <stdint.h>
#include <string.h>

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

/* bits.unpack */
void distrobust_unpack(const uint8_t *packed, int64_t k, int64_t width, int64_t *out) {
    const int64_t whole = width / 8, rest = width % 8;
    const uint64_t mask = (1u << rest) - 1;
    for (int64_t group = 0; group < k; group += 8, packed += width) {
        uint64_t word = 0;
        for (int64_t byte = 0; byte < rest; byte++) word |= (uint64_t)packed[8 * whole + byte] << 8 * byte;
        for (int64_t i = 0; i < 8 && group + i < k; i++) {
            uint64_t number = (word >> rest * i & mask) << 8 * whole;
            for (int64_t byte = 0; byte < whole; byte++) number |= (uint64_t)packed[whole * i + byte] << 8 * byte;
            out[group + i] = (int64_t)number;
        }
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
