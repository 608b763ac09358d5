/* Products of float32 matrices on AMX tiles, which multiply bfloat16; see models/native.py.
 *
 * A float32 is the sum of two bfloat16 to 2^-17 of itself. Of the four products of such sums the three large ones are
 * taken and added up in float32, so that a product is off by some 1e-5 of its terms.
 *
 * Matrices are packed for it in columns of 16 and rows of 32: (columns / 16) x (rows / 32) tiles of 16 pairs of rows x
 * 16 columns x 2, all of the larger parts before all of the smaller ones; rows are filled up with zeros. They have
 * MOST_DEPTH rows and MOST_COLUMNS columns at most.
 */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16
#define DEPTH 32
#define TILE (SIDE * DEPTH)
#define MOST_DEPTH 2048
#define MOST_COLUMNS 4096

/* What models/native.py has to know; the version as in native.c. */
const int dfpir_version = 3;
const int dfpir_amx_most_depth = MOST_DEPTH, dfpir_amx_most_columns = MOST_COLUMNS;

/* Asks the system for leave to use the tiles of a processor that has them. */
int dfpir_amx_allowed(void) {
    const int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

typedef struct {
    const float *x;
    const uint16_t *packed;
    const float *start; /* added to the product; may be NULL */
    float *out;
    int64_t count, depth, columns, start_stride, out_stride;
    int threads;
} Product;

/* Splits up to 2 SIDE rows into tiles: the larger parts of the upper rows, of the lower rows, then the smaller parts. */
static void split(const float *x, int64_t count, int64_t depth, uint16_t *parts) {
    int64_t blocks = (depth + DEPTH - 1) / DEPTH;
    for (int64_t row = 0; row < 2 * SIDE; row++)
        for (int64_t block = 0; block < blocks; block++) {
            uint16_t *large = parts + ((row / SIDE) * blocks + block) * TILE + row % SIDE * DEPTH;
            int64_t left = row < count ? depth - block * DEPTH : 0;
            __mmask16 lower = left >= SIDE ? 0xffff : (1u << left) - 1;
            __mmask16 upper = left >= DEPTH ? 0xffff : left <= SIDE ? 0 : (1u << (left - SIDE)) - 1;
            const float *values = x + row * depth + block * DEPTH;
            __m512 a = _mm512_maskz_loadu_ps(lower, values), b = _mm512_maskz_loadu_ps(upper, values + SIDE);
            __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
            _mm512_store_si512(large, both);
            a -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16);
            b -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16);
            _mm512_store_si512(large + 2 * blocks * TILE, (__m512i)_mm512_cvtne2ps_pbh(b, a));
        }
}

#define LOAD(tile, tiles) _tile_loadd(tile, tiles, 2 * DEPTH)

/* 2 SIDE rows, `wide` 1 or 2 times SIDE columns. */
static inline __attribute__((always_inline)) void multiply(
    const uint16_t *upper, const uint16_t *large, int64_t blocks, int64_t all, const float *start, int64_t start_stride,
    float *out, int64_t out_stride, int wide) {
    /* Tiles 0 to 3 are the result, 4 and 5 rows, 6 and 7 columns. */
    const uint16_t *lower = upper + blocks * TILE, *next = large + blocks * TILE;
    const int64_t smaller = 2 * blocks * TILE;
    if (start) {
        _tile_loadd(0, start, start_stride * 4);
        _tile_loadd(1, start + SIDE * start_stride, start_stride * 4);
        if (wide == 2) {
            _tile_loadd(2, start + SIDE, start_stride * 4);
            _tile_loadd(3, start + SIDE * start_stride + SIDE, start_stride * 4);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
#define ADD_PRODUCTS                                                                                                  \
    _tile_dpbf16ps(0, 4, 6);                                                                                          \
    _tile_dpbf16ps(1, 5, 6);                                                                                          \
    if (wide == 2) {                                                                                                  \
        _tile_dpbf16ps(2, 4, 7);                                                                                      \
        _tile_dpbf16ps(3, 5, 7);                                                                                      \
    }
    for (int64_t i = 0; i < blocks * TILE; i += TILE) {
        LOAD(6, large + i);
        if (wide == 2)
            LOAD(7, next + i);
        LOAD(4, upper + smaller + i);
        LOAD(5, lower + smaller + i);
        ADD_PRODUCTS
        LOAD(4, upper + i);
        LOAD(5, lower + i);
        ADD_PRODUCTS
        LOAD(6, large + all + i);
        if (wide == 2)
            LOAD(7, next + all + i);
        ADD_PRODUCTS
    }
    _tile_stored(0, out, out_stride * 4);
    _tile_stored(1, out + SIDE * out_stride, out_stride * 4);
    if (wide == 2) {
        _tile_stored(2, out + SIDE, out_stride * 4);
        _tile_stored(3, out + SIDE * out_stride + SIDE, out_stride * 4);
    }
}

static void multiply_rows(
    const uint16_t *parts, const Product *in, const float *start, int64_t start_stride, float *out, int64_t out_stride) {
    int64_t blocks = (in->depth + DEPTH - 1) / DEPTH, all = in->columns / SIDE * blocks * TILE, column = 0;
    for (; column + 2 * SIDE <= in->columns; column += 2 * SIDE)
        multiply(
            parts, in->packed + column / SIDE * blocks * TILE, blocks, all, start ? start + column : 0, start_stride,
            out + column, out_stride, 2);
    if (column < in->columns)
        multiply(
            parts, in->packed + column / SIDE * blocks * TILE, blocks, all, start ? start + column : 0, start_stride,
            out + column, out_stride, 1);
}

/* count x columns of `start + x matrix`, `out` possibly `start` itself. */
void dfpir_amx_product(const Product *in) {
    const struct {
        uint8_t palette, first, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
#pragma omp parallel num_threads(in->threads)
    {
        _Alignas(64) uint16_t parts[2 * 2 * SIDE * MOST_DEPTH];
        _Alignas(64) float last[2 * SIDE * MOST_COLUMNS];
        _tile_loadconfig(&tiles);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < in->count; row += 2 * SIDE) {
            int64_t count = in->count - row;
            const float *start = in->start ? in->start + row * in->start_stride : 0;
            float *out = in->out + row * in->out_stride;
            split(in->x + row * in->depth, count, in->depth, parts);
            if (count >= 2 * SIDE) {
                multiply_rows(parts, in, start, in->start_stride, out, in->out_stride);
                continue;
            }
            for (int64_t i = 0; start && i < count; i++)
                memcpy(last + i * in->columns, start + i * in->start_stride, in->columns * 4);
            multiply_rows(parts, in, start ? last : 0, in->columns, last, in->columns);
            for (int64_t i = 0; i < count; i++)
                memcpy(out + i * in->out_stride, last + i * in->columns, in->columns * 4);
        }
        _tile_release();
    }
}
