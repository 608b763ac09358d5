/* The memory-bound passes of models/passes.py in one sweep each, and products with a matrix; see models/native.py.
 *
 * Features are rows x width x channels; `stride` is the distance from one pixel to the next, in values. Values are
 * float32, or bfloat16 where `half` says so; everything is computed in float32. LANES channels are computed at once, 16
 * with AVX-512 and 8 with AVX2. Channels need not be a multiple of that, but at least as many: the last LANES are
 * computed together, some of them twice. Rows are cut into stretches, so that the pages of memory that one sweep touches
 * stay few; these are shared out among torch's OpenMP threads.
 */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

/* Of queries and of keys. */
#define MOST_CHANNELS 2048
/* Pixels. */
#define STRETCH 32

/* What models/native.py has to know. Another version for every change of what it calls or hands over. */
const int dfpir_version = 3;
const int dfpir_lanes = LANES, dfpir_most_channels = MOST_CHANNELS;

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

#if LANES == 16
#define COUNTED ((words){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})
#else
#define COUNTED ((words){0, 1, 2, 3, 4, 5, 6, 7})
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE const void *at(const void *values, int64_t index, int half) {
    return (const char *)values + index * (half ? 2 : 4);
}

/* The compiler's own conversions of vectors take several times as many instructions. */
#if LANES == 16
INLINE words to_words(const void *halves) {
    return (words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(halves));
}
INLINE void to_halves(void *halves, words bits) {
    _mm256_storeu_si256(halves, _mm512_cvtepi32_epi16((__m512i)bits));
}
INLINE floats clamp(floats x, float limit) {
    return (floats)_mm512_max_ps(_mm512_min_ps((__m512)x, _mm512_set1_ps(limit)), _mm512_set1_ps(-limit));
}
#else
INLINE words to_words(const void *halves) {
    return (words)_mm256_cvtepu16_epi32(_mm_loadu_si128(halves));
}
INLINE void to_halves(void *halves, words bits) {
    __m256i whole = (__m256i)bits;
    _mm_storeu_si128(halves, _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
}
INLINE floats clamp(floats x, float limit) {
    return (floats)_mm256_max_ps(_mm256_min_ps((__m256)x, _mm256_set1_ps(limit)), _mm256_set1_ps(-limit));
}
#endif

INLINE floats load(const void *values, int64_t index, int half) {
    if (half)
        return (floats)(to_words(at(values, index, half)) << 16);
    floats loaded;
    memcpy(&loaded, at(values, index, half), sizeof loaded);
    return loaded;
}

/* To the nearest, ties to even. */
INLINE void store(void *values, int64_t index, floats stored, int half) {
    void *place = (void *)at(values, index, half);
    words bits = (words)stored;
    if (half)
        to_halves(place, (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    else
        memcpy(place, &stored, sizeof stored);
}

/* x times the normal distribution function; erf as a rational function fitted on [-3.9, 3.9], off by 4e-7 at most. */
INLINE floats gelu(floats x) {
    floats z = clamp(x * 0.707106781f, 3.9f), u = z * z;
    floats p = (u * 2.05039372e-6f + 2.87457546e-4f) * u + 3.83687055e-3f;
    p = ((p * u + 5.29669013e-2f) * u + 1.91940816e-1f) * u + 1.12837903f;
    floats q = (u * 3.82308252e-5f + 1.18173390e-3f) * u + 1.51091924e-2f;
    q = ((q * u + 1.14758129e-1f) * u + 5.03434897e-1f) * u + 1.0f;
    return 0.5f * x * (1.0f + z * p / q);
}

/* One row of features before a 3x3 convolution, with the rows above and below it, NULL where there are none. */
typedef struct {
    const void *rows[3];
    const void *taps; /* 9 x (channels of all parts) */
    int64_t stride, width;
    int half;
} Row;

/* The taps for LANES channels; those that meet no row are 0. */
INLINE void load_taps(floats taps[9], const Row *row, int64_t channel) {
    for (int i = 0; i < 9; i++)
        taps[i] = row->rows[i / 3] ? load(row->taps, i * row->stride + channel, row->half) : (floats){};
}

/* Moves one pixel on: returns what a column adds to complete the pixel before it. */
INLINE floats step(floats pending[2], const floats taps[9], const Row *row, int64_t index, int half) {
    floats done = pending[0], now = pending[1], next = {};
    for (int i = 0; i < 3; i++) {
        floats x = load(row->rows[i] ? row->rows[i] : row->rows[1], index, half);
        done += taps[3 * i + 2] * x;
        now += taps[3 * i + 1] * x;
        next += taps[3 * i] * x;
    }
    pending[0] = now;
    pending[1] = next;
    return done;
}

/* Channels `channel` to `channel + LANES - 1` of a convolved row, pixels `first` to `end - 1`, to `out`, where `first`
 * is; their sums of squares go to `power`, if there is one. */
INLINE void convolve_lanes(
    const Row *row, int64_t first, int64_t end, int64_t channel, void *out, int64_t channels, float *power, int half,
    int out_half) {
    floats taps[9], pending[2] = {{}, {}}, squares = {};
    load_taps(taps, row, channel);
    for (int64_t x = first ? first - 1 : 0; x <= end; x++) {
        floats done = x < row->width ? step(pending, taps, row, x * row->stride + channel, half) : pending[0];
        if (x > first) {
            squares += done * done;
            store(out, (x - 1 - first) * channels + channel, done, out_half);
        }
    }
    if (power)
        store(power, channel, squares, 0);
}

static void convolve(
    const Row *row, int64_t first, int64_t end, int64_t channels, void *out, float *power, int out_half) {
    for (int64_t c = 0; c < channels; c += LANES) {
        int64_t channel = c + LANES <= channels ? c : channels - LANES;
        if (row->half && out_half)
            convolve_lanes(row, first, end, channel, out, channels, power, 1, 1);
        else if (row->half)
            convolve_lanes(row, first, end, channel, out, channels, power, 1, 0);
        else if (out_half)
            convolve_lanes(row, first, end, channel, out, channels, power, 0, 1);
        else
            convolve_lanes(row, first, end, channel, out, channels, power, 0, 0);
    }
}

INLINE void gate_lanes(
    const Row *row, int64_t first, int64_t end, int64_t channel, int64_t channels, void *out, int half) {
    floats gate_taps[9], value_taps[9], gate_pending[2] = {{}, {}}, value_pending[2] = {{}, {}};
    load_taps(gate_taps, row, channel);
    load_taps(value_taps, row, channel + channels);
    for (int64_t x = first ? first - 1 : 0; x <= end; x++) {
        floats gate = gate_pending[0], value = value_pending[0];
        if (x < row->width) {
            int64_t index = x * row->stride + channel;
            gate = step(gate_pending, gate_taps, row, index, half);
            value = step(value_pending, value_taps, row, index + channels, half);
        }
        if (x > first)
            store(out, (x - 1) * channels + channel, gelu(gate) * value, half);
    }
}

static void gate(const Row *row, int64_t first, int64_t end, int64_t channels, void *out) {
    for (int64_t c = 0; c < channels; c += LANES) {
        int64_t channel = c + LANES <= channels ? c : channels - LANES;
        if (row->half)
            gate_lanes(row, first, end, channel, channels, out, 1);
        else
            gate_lanes(row, first, end, channel, channels, out, 0);
    }
}

/* x with its first lanes, which were met before, set to 0. */
INLINE floats new_lanes(floats x, int64_t known) {
    return (floats)((words)x & (words)(COUNTED >= (uint32_t)known));
}

INLINE float total(floats x) {
#pragma GCC unroll 4
    for (unsigned distance = LANES / 2; distance; distance /= 2)
        x += __builtin_shuffle(x, COUNTED ^ distance);
    return x[0];
}

/* Pixels of a layer norm at once, whose sums then do not wait for each other. */
#define TOGETHER 4

/* `pixels` is 1 or TOGETHER. */
INLINE void normalise(
    const void *x, const float *weight, const float *bias, void *out, int64_t channels, float eps, int half, int pixels) {
    floats sums[TOGETHER] = {}, squares[TOGETHER] = {};
    float means[TOGETHER], scales[TOGETHER];
    for (int64_t c = 0; c < channels; c += LANES) {
        int64_t channel = c + LANES <= channels ? c : channels - LANES;
        for (int i = 0; i < pixels; i++)
            sums[i] += new_lanes(load(x, i * channels + channel, half), c - channel);
    }
    for (int i = 0; i < pixels; i++)
        means[i] = total(sums[i]) / channels;
    for (int64_t c = 0; c < channels; c += LANES) {
        int64_t channel = c + LANES <= channels ? c : channels - LANES;
        for (int i = 0; i < pixels; i++) {
            floats centred = load(x, i * channels + channel, half) - means[i];
            squares[i] += new_lanes(centred * centred, c - channel);
        }
    }
    for (int i = 0; i < pixels; i++)
        scales[i] = 1.0f / sqrtf(total(squares[i]) / channels + eps);
    for (int64_t c = 0; c < channels; c += LANES) {
        int64_t channel = c + LANES <= channels ? c : channels - LANES;
        floats scale = load(weight, channel, 0), shift = load(bias, channel, 0);
        for (int i = 0; i < pixels; i++) {
            floats centred = load(x, i * channels + channel, half) - means[i];
            store(out, i * channels + channel, centred * scales[i] * scale + shift, half);
        }
    }
}

static void normalise_pixels(
    const void *x, const float *weight, const float *bias, void *out, int64_t pixels, int64_t channels, float eps,
    int half) {
    int64_t i = 0;
#define NORMALISE(count)                                                                                              \
    for (; i + count <= pixels; i += count) {                                                                         \
        const void *in = at(x, i * channels, half);                                                                   \
        void *place = (void *)at(out, i * channels, half);                                                            \
        if (half)                                                                                                     \
            normalise(in, weight, bias, place, channels, eps, 1, count);                                              \
        else                                                                                                          \
            normalise(in, weight, bias, place, channels, eps, 0, count);                                              \
    }
    NORMALISE(TOGETHER)
    NORMALISE(1)
}

void dfpir_layer_norm(
    const void *x, const float *norm, void *out, int64_t pixels, int64_t channels, float eps, int half, int threads) {
    const int64_t run = 64;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < pixels; first += run) {
        int64_t count = pixels - first < run ? pixels - first : run;
        int64_t start = first * channels;
        normalise_pixels(
            at(x, start, half), norm, norm + channels, (void *)at(out, start, half), count, channels, eps, half);
    }
}

/* Features of `images` images, each of `height` rows that come out, and what the 3x3 convolution needs of them. */
typedef struct {
    const void *wide;
    const void *taps;
    int64_t images, height, width, stride, channels;
    int half, border, threads;
} Wide;

/* The row that comes out as number `row` of an image, seen from channel `first` of its features on. */
static Row row_of(const Wide *in, int64_t image, int64_t row, int64_t first) {
    Row out = {{0, 0, 0}, at(in->taps, first, in->half), in->stride, in->width, in->half};
    int64_t known = in->height + 2 - 2 * in->border;
    for (int i = 0; i < 3; i++) {
        int64_t r = row + i - in->border;
        if (r >= 0 && r < known)
            out.rows[i] = at(in->wide, (image * known + r) * in->width * in->stride + first, in->half);
    }
    return out;
}

static int64_t stretches(const Wide *in) {
    return (in->width + STRETCH - 1) / STRETCH;
}

static int64_t end_of(const Wide *in, int64_t first) {
    return first + STRETCH < in->width ? first + STRETCH : in->width;
}

/* Gate and value side by side in `wide`; out is images x height x width x channels. */
void dfpir_depthwise_gate(const Wide *in, void *out) {
    int64_t each = stretches(in);
#pragma omp parallel for num_threads(in->threads) schedule(static)
    for (int64_t i = 0; i < in->images * in->height * each; i++) {
        int64_t number = i / each, first = i % each * STRETCH;
        Row row = row_of(in, number / in->height, number % in->height, 0);
        void *place = (void *)at(out, number * in->width * in->channels, in->half);
        gate(&row, first, end_of(in, first), in->channels, place);
    }
}

/* As many sums as AVX2 has registers for. */
#define MOST_ROWS 4
#define MOST_VECTORS 3

/* Adds query^T key of `count` pixels to `rows` x `vectors * LANES` sums. */
INLINE void add_products(
    const float *query, const float *key, int64_t channels, int64_t count, float *sums, int64_t stride, int rows,
    int vectors) {
    floats held[MOST_ROWS][MOST_VECTORS] = {};
    for (int64_t i = 0; i < count; i++) {
        floats keys[MOST_VECTORS];
        for (int v = 0; v < vectors; v++)
            keys[v] = load(key, i * channels + v * LANES, 0);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++)
                held[r][v] += query[i * channels + r] * keys[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            store(sums, r * stride + v * LANES, load(sums, r * stride + v * LANES, 0) + held[r][v], 0);
}

/* The same for all channels of a head; sums are per_head x stride, those behind column per_head of no meaning. */
static void add_gram(
    const float *query, const float *key, int64_t channels, int64_t count, float *sums, int64_t per_head, int64_t stride) {
    int64_t column = 0;
#define ADD(rows, vectors)                                                                                            \
    for (; row + rows <= per_head; row += rows)                                                                       \
        add_products(                                                                                                 \
            query + row, key + column, channels, count, sums + row * stride + column, stride, rows, vectors);
#define ADD_COLUMNS(vectors)                                                                                          \
    for (; column + vectors * LANES <= stride; column += vectors * LANES) {                                           \
        int64_t row = 0;                                                                                              \
        ADD(MOST_ROWS, vectors)                                                                                       \
        ADD(1, vectors)                                                                                               \
    }
    ADD_COLUMNS(MOST_VECTORS)
    ADD_COLUMNS(1)
}

/* Query, key and value side by side in `wide`. Values come out in their own type, their images `image_stride` apart. To
 * `gram`, threads x images x heads x per_head x stride, is added query^T key, per_head being channels / heads and stride
 * that filled up to LANES, and to `power`, threads x images x 2 x channels, the squares of queries and of keys. */
void dfpir_depthwise_attention(
    const Wide *in, float *gram, float *power, void *values, int64_t heads, int64_t image_stride, int values_half) {
    int64_t each = stretches(in), rows = in->images * in->height, channels = in->channels;
    int64_t per_head = channels / heads, stride = (per_head + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(in->threads)
    {
        /* The last head's last vector of keys may reach behind the channels. */
        float parts[2][STRETCH * channels + LANES], squares[channels];
        memset(parts, 0, sizeof parts);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * each; i++) {
            int64_t number = i / each, image = number / in->height, y = number % in->height;
            int64_t first = i % each * STRETCH, end = end_of(in, first);
            int64_t place = omp_get_thread_num() * in->images + image;
            for (int part = 0; part < 2; part++) {
                Row row = row_of(in, image, y, part * channels);
                convolve(&row, first, end, channels, parts[part], squares, 0);
                for (int64_t c = 0; c < channels; c++)
                    power[(2 * place + part) * channels + c] += squares[c];
            }
            for (int64_t head = 0; head < heads; head++)
                add_gram(
                    parts[0] + head * per_head, parts[1] + head * per_head, channels, end - first,
                    gram + (place * heads + head) * per_head * stride, per_head, stride);
            Row row = row_of(in, image, y, 2 * channels);
            int64_t start = image * image_stride + (y * in->width + first) * channels;
            void *out = (void *)at(values, start, values_half);
            convolve(&row, first, end, channels, out, 0, values_half);
        }
    }
}

#if LANES == 8 /* with AVX-512 torch's library has not been found to be slower */

/* Rows of a product, two vectors of columns each, that are held in registers. */
#define HELD(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define HELD_ROWS 6
#define PANEL (2 * LANES)
/* Rows that one thread takes at a time, which stay in its cache from panel to panel. */
#define BLOCK_ROWS 48

const int dfpir_panel = PANEL;

/* Of float32 matrices. Rows of x have no gaps; the other one is packed in panels, PANEL columns of all its rows in turn,
 * the last one filled up; `columns` is a multiple of LANES. */
typedef struct {
    const float *x;
    const float *packed;
    const float *start; /* added to the product; may be NULL, or `out` itself */
    float *out;
    int64_t count, depth, columns, start_stride, out_stride;
    int threads;
} Product;

/* `rows` of at most HELD_ROWS, and a panel, of which `wide` says whether its second vector is there. */
INLINE void multiply(
    const float *x, int64_t rows, const float *panel, int64_t depth, const float *start, int64_t start_stride, float *out,
    int64_t out_stride, int wide) {
#define BEGIN(r)                                                                                                      \
    floats left##r = {}, right##r = {};                                                                               \
    const float *x##r = x + (r < rows ? r : rows - 1) * depth;                                                        \
    if (start)                                                                                                        \
        __builtin_prefetch(start + r * start_stride);
    HELD(BEGIN)
    for (int64_t i = 0; i < depth; i++) {
        floats left = load(panel, i * PANEL, 0), right = load(panel, i * PANEL + LANES, 0);
#define ADD_PRODUCT(r)                                                                                                \
    left##r += left * x##r[i];                                                                                        \
    right##r += right * x##r[i];
        HELD(ADD_PRODUCT)
    }
#define END(r)                                                                                                        \
    if (r < rows) {                                                                                                   \
        store(out, r * out_stride, start ? left##r + load(start, r * start_stride, 0) : left##r, 0);                  \
        if (wide)                                                                                                     \
            store(                                                                                                    \
                out, r * out_stride + LANES, start ? right##r + load(start, r * start_stride + LANES, 0) : right##r,  \
                0);                                                                                                   \
    }
    HELD(END)
}

/* count x columns of `start + x matrix`. */
void dfpir_product(const Product *in) {
#pragma omp parallel for num_threads(in->threads) schedule(static)
    for (int64_t first = 0; first < in->count; first += BLOCK_ROWS) {
        int64_t end = first + BLOCK_ROWS < in->count ? first + BLOCK_ROWS : in->count;
        for (int64_t column = 0; column < in->columns; column += PANEL)
            for (int64_t row = first; row < end; row += HELD_ROWS)
                multiply(
                    in->x + row * in->depth, end - row < HELD_ROWS ? end - row : HELD_ROWS,
                    in->packed + column * in->depth, in->depth,
                    in->start ? in->start + row * in->start_stride + column : 0, in->start_stride,
                    in->out + row * in->out_stride + column, in->out_stride, column + LANES < in->columns);
    }
}

#endif
