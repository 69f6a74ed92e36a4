/* Passes over a channels-last activation that torch makes in several: see fused_cpu.py.
 *
 * Layout: x[n][pixel][channel], channel fastest. Arithmetic is written with the vector extension of
 * gcc and clang; the few conversions they translate badly are intrinsics, for AVX-512 and AVX2.
 * Built without linking an OpenMP runtime: the symbols resolve to the one torch has loaded, so
 * there is a single pool of threads.
 */
#include <float.h>
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
#define LANES 16
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));

INLINE vf load_float(const void *p) { return _mm512_loadu_ps(p); }
INLINE vi load_int(const void *p) { return (vi)_mm512_loadu_si512(p); }
INLINE vf to_float(vi v) { return _mm512_cvtepi32_ps((__m512i)v); }
INLINE vi load_half(const void *p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
INLINE void put_float(void *p, vf v) { _mm512_storeu_ps(p, v); }
/* The low half of each lane; the high half is zero. */
INLINE void put_half(void *p, vi v) {
    _mm256_storeu_si256(p, _mm512_cvtepi32_epi16((__m512i)v));
}
INLINE void put_bytes(void *p, vi v) { _mm_storeu_si128(p, _mm512_cvtepi32_epi8((__m512i)v)); }
INLINE vf at_least(vf x, vf y) { return _mm512_max_ps(x, y); }
INLINE vf at_most(vf x, vf y) { return _mm512_min_ps(x, y); }
#else
#define LANES 8
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));

INLINE vf load_float(const void *p) { return _mm256_loadu_ps(p); }
INLINE vi load_int(const void *p) { return (vi)_mm256_loadu_si256(p); }
INLINE vf to_float(vi v) { return _mm256_cvtepi32_ps((__m256i)v); }
INLINE vi load_half(const void *p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128(p)); }
INLINE void put_float(void *p, vf v) { _mm256_storeu_ps(p, v); }
/* Eight 16-bit values in the low half; the high bits of each lane are zero. */
INLINE __m128i narrow(vi v) {
    __m256i i = (__m256i)v;
    return _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
}
INLINE void put_half(void *p, vi v) { _mm_storeu_si128(p, narrow(v)); }
INLINE void put_bytes(void *p, vi v) {
    __m128i h = narrow(v & 0xff);
    _mm_storel_epi64(p, _mm_packus_epi16(h, h));
}
INLINE vf at_least(vf x, vf y) { return _mm256_max_ps(x, y); }
INLINE vf at_most(vf x, vf y) { return _mm256_min_ps(x, y); }
#endif

INLINE vf splat(float v) { return v - (vf){0}; }

INLINE vf load(const void *p, int bf16) {
    return bf16 ? (vf)(load_half(p) << 16) : load_float(p);
}

INLINE void store(void *p, int bf16, vf v) {
    vi i = (vi)v;
    /* bfloat16: nearest, ties to even; activations are finite. */
    if (bf16) put_half(p, ((i + 0x7fff + ((i >> 16) & 1)) >> 16) & 0xffff);
    else put_float(p, v);
}

INLINE vf clamp(vf x, float lo, float hi) { return at_most(at_least(x, splat(lo)), splat(hi)); }

/* Adding 1.5 * 2^23 rounds |x| < 2^22 to the nearest integer, ties to even, and leaves that integer
 * in the low bits of the float. */
static const float MAGIC = 12582912.0f;

/* Low byte: clamp(round(x) + z, 0, top + z), for x already divided by the scale; top is the largest
 * code (255 for 8 bits) less z. */
INLINE vi to_code(vf x, float z, float top) { return (vi)((clamp(x, -z, top) + MAGIC) + z); }

/* x / (1 + exp(-x)), relative error below 1e-6 + 2^-23 |x|. */
INLINE vf times_sigmoid(vf x) {
    vf t = clamp(x * -1.44269504088896341f, -126.0f, 126.0f);
    vf n = t + MAGIC;
    vf f = t - (n - MAGIC);
    /* 2^f on [-0.5, 0.5]: minimax polynomial, relative error 1.1e-7. */
    vf y = f * 1.326472730e-3f + 9.671512729e-3f;
    y = y * f + 5.550733744e-2f;
    y = y * f + 2.402224208e-1f;
    y = y * f + 6.931469776e-1f;
    y = y * f + 1.0f;
    return x / ((vf)((vi)y + ((vi)n << 23)) + 1.0f);
}

/* One tensor of the (at most two) that are normalised as if concatenated along channels. */
typedef struct {
    const void *x;      /* [n][pixels], `stride` elements from pixel to pixel */
    int64_t channels, stride;
    uint8_t *raw;       /* x itself in codes, or NULL */
    float raw_scale;
    int32_t raw_zero, raw_qmax; /* codes are 0 to qmax */
} part_t;

typedef struct {
    part_t part[2];
    int64_t parts, n, height, width, groups;
    int32_t bf16;       /* input type: 0 float32, 1 bfloat16 */
    int32_t silu;
    const float *gamma, *beta;
    const float *shift; /* added to x: [n][channels], rows `shift_stride` apart; or NULL */
    int64_t shift_stride;
    float eps;
    float *out;         /* float output [n][pixels][channels], or NULL */
    uint8_t *codes;     /* [n][pixels][channels], or NULL */
    float scale;
    int32_t zero, qmax;
} norm_t;

#define TILE 16

INLINE float load_one(const void *x, ptrdiff_t i, int bf16) {
    float v;
    if (bf16) {
        uint32_t u = (uint32_t)((const uint16_t *)x)[i] << 16;
        memcpy(&v, &u, 4);
    } else v = ((const float *)x)[i];
    return v;
}

/* Sums of (x - pivot) and its square for each channel; the pivot is the first pixel, so that the
 * variance does not cancel when the mean is large. */
INLINE void moments(const char *x, ptrdiff_t pixels, ptrdiff_t channels, ptrdiff_t stride,
                    const float *pivot, float *sum, float *square, int bf16) {
    const ptrdiff_t size = bf16 ? 2 : 4, whole = channels / LANES * LANES;
    memset(sum, 0, sizeof(float) * (size_t)channels);
    memset(square, 0, sizeof(float) * (size_t)channels);
    for (ptrdiff_t p0 = 0; p0 < pixels; p0 += TILE) {
        const ptrdiff_t p1 = p0 + TILE < pixels ? p0 + TILE : pixels;
        for (ptrdiff_t c = 0; c < whole; c += LANES) {
            vf s = load(sum + c, 0), q = load(square + c, 0), o = load(pivot + c, 0);
            for (ptrdiff_t p = p0; p < p1; p++) {
                vf d = load(x + size * (p * stride + c), bf16) - o;
                s += d;
                q += d * d;
            }
            put_float(sum + c, s);
            put_float(square + c, q);
        }
        for (ptrdiff_t c = whole; c < channels; c++)
            for (ptrdiff_t p = p0; p < p1; p++) {
                float d = load_one(x, p * stride + c, bf16) - pivot[c];
                sum[c] += d;
                square[c] += d * d;
            }
    }
}

/* Turns the moments of all channels into y = a x + b: those of `chunks` rows of [2][channels] are
 * added up, a channel's shift moves its mean. */
static void affine(const norm_t *k, int64_t sample, int64_t channels, const float *pivot,
                   const float *partial, int64_t chunks, float *a, float *b) {
    const int64_t width = channels / k->groups;
    const double pixels = (double)(k->height * k->width), count = pixels * (double)width;
    const float *shift = k->shift ? k->shift + sample * k->shift_stride : NULL;
    for (int64_t first = 0; first < channels; first += width) {
        double mean = 0, spread = 0;
        for (int64_t c = first; c < first + width; c++) {
            double s = 0, q = 0;
            for (int64_t i = 0; i < chunks; i++) {
                s += partial[2 * i * channels + c];
                q += partial[(2 * i + 1) * channels + c];
            }
            s /= pixels;
            /* Kept in b until all of the group are known. */
            b[c] = (float)s + pivot[c] + (shift ? shift[c] : 0.0f);
            mean += b[c];
            spread += q - s * s * pixels;
        }
        mean /= (double)width;
        for (int64_t c = first; c < first + width; c++)
            spread += pixels * (b[c] - mean) * (b[c] - mean);
        const float r = (float)(1.0 / __builtin_sqrt((spread > 0 ? spread : 0) / count + k->eps));
        for (int64_t c = first; c < first + width; c++) {
            a[c] = k->gamma[c] * r;
            b[c] = k->beta[c] + (float)((shift ? shift[c] : 0.0f) - mean) * a[c];
        }
    }
}

typedef struct { float inverse, z, top, raw_scale, raw_z, raw_top; } grid_t;

INLINE void normalise_lanes(const char *x, const float *a, const float *b, uint8_t *code,
                         uint8_t *raw, float *out, grid_t g, int bf16, int silu) {
    vf v = load(x, bf16);
    if (raw) put_bytes(raw, to_code(v / g.raw_scale, g.raw_z, g.raw_top));
    v = v * load(a, 0) + load(b, 0);
    if (silu) v = times_sigmoid(v);
    if (code) put_bytes(code, to_code(v * g.inverse, g.z, g.top));
    else put_float(out, v);
}

/* One pixel: all channels of a part. */
INLINE void normalise_pixel(const char *x, const float *a, const float *b, int64_t channels,
                            uint8_t *code, uint8_t *raw, float *out, grid_t g, int bf16, int silu) {
    const ptrdiff_t size = bf16 ? 2 : 4;
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES)
        normalise_lanes(x + size * c, a + c, b + c, code ? code + c : NULL, raw ? raw + c : NULL,
                     out ? out + c : NULL, g, bf16, silu);
    if (c < channels) {
        const size_t rest = (size_t)(channels - c);
        char in[4 * LANES] = {0};
        float a_rest[LANES] = {0}, b_rest[LANES] = {0}, floats[LANES];
        uint8_t codes[LANES], raws[LANES];
        memcpy(in, x + size * c, size * rest);
        memcpy(a_rest, a + c, 4 * rest);
        memcpy(b_rest, b + c, 4 * rest);
        normalise_lanes(in, a_rest, b_rest, code ? codes : NULL, raw ? raws : NULL, floats, g,
                        bf16, silu);
        if (code) memcpy(code + c, codes, rest);
        else memcpy(out + c, floats, 4 * rest);
        if (raw) memcpy(raw + c, raws, rest);
    }
}

INLINE void normalise(const norm_t *k, const part_t *part, int64_t sample, int64_t first,
                      int64_t channels, int64_t p0, int64_t p1, const float *a, const float *b,
                      int bf16, int silu) {
    const int64_t begin = sample * k->height * k->width;
    const ptrdiff_t size = bf16 ? 2 : 4;
    const grid_t g = {1.0f / k->scale, (float)k->zero, (float)(k->qmax - k->zero),
                      part->raw_scale, (float)part->raw_zero,
                      (float)(part->raw_qmax - part->raw_zero)};
    for (int64_t p = begin + p0; p < begin + p1; p++)
        normalise_pixel((const char *)part->x + size * p * part->stride, a + first, b + first,
                        part->channels, k->codes ? k->codes + p * channels + first : NULL,
                        part->raw ? part->raw + p * part->channels : NULL,
                        k->codes ? NULL : k->out + p * channels + first, g, bf16, silu);
}

/* x[c] += y[c] (if y) + e[c] (if e), one pixel. */
INLINE void add_pixel(char *x, const char *y, const float *e, int64_t channels, int bf16) {
    const ptrdiff_t size = bf16 ? 2 : 4;
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
        vf v = load(x + size * c, bf16);
        if (y) v += load(y + size * c, bf16);
        if (e) v += load(e + c, 0);
        store(x + size * c, bf16, v);
    }
    if (c < channels) {
        const size_t rest = (size_t)(channels - c);
        char in[4 * LANES] = {0}, other[4 * LANES] = {0};
        float edge[LANES] = {0};
        memcpy(in, x + size * c, size * rest);
        if (y) memcpy(other, y + size * c, size * rest);
        if (e) memcpy(edge, e + c, 4 * rest);
        store(in, bf16, load(in, bf16) + load(other, bf16) + load(edge, 0));
        memcpy(x + size * c, in, size * rest);
    }
}

/* Adds to the pixels on the border of an image what a convolution left out there: edge[mask][c],
 * bits of the mask: first row, last row, first column, last column. */
static void edge_pixels(char *x, int64_t row, int64_t height, int64_t width, int64_t channels,
                        const float *edge, int bf16) {
    const int rows = (row == 0) | (row == height - 1) << 1;
    const int64_t step = rows || width == 1 ? 1 : width - 1;
    for (int64_t j = 0; j < width; j += step) {
        const int mask = rows | (j == 0) << 2 | (j == width - 1) << 3;
        if (mask) add_pixel(x + (bf16 ? 2 : 4) * j * channels, NULL, edge + mask * channels,
                            channels, bf16);
    }
}

/* The first pixel of a sample as float, all parts one after the other. */
static void first_pixel(const norm_t *k, int64_t sample, float *pivot) {
    const int64_t pixels = k->height * k->width;
    for (int64_t i = 0, first = 0; i < k->parts; first += k->part[i++].channels)
        for (int64_t c = 0; c < k->part[i].channels; c++)
            pivot[first + c] =
                load_one(k->part[i].x, sample * pixels * k->part[i].stride + c, k->bf16);
}

static void sum_pixels(const norm_t *k, int64_t sample, int64_t channels, int64_t p0, int64_t p1,
                       const float *pivot, float *partial) {
    const int64_t pixels = k->height * k->width;
    for (int64_t i = 0, first = 0; i < k->parts; first += k->part[i++].channels) {
        const int64_t own = k->part[i].channels, stride = k->part[i].stride;
        const char *x = (const char *)k->part[i].x +
                        (k->bf16 ? 2 : 4) * (sample * pixels + p0) * stride;
        float *sum = partial + first, *square = sum + channels;
        if (k->bf16) moments(x, p1 - p0, own, stride, pivot + first, sum, square, 1);
        else moments(x, p1 - p0, own, stride, pivot + first, sum, square, 0);
    }
}

static void write_pixels(const norm_t *k, int64_t sample, int64_t channels, int64_t p0, int64_t p1,
                         const float *a, const float *b) {
    for (int64_t i = 0, first = 0; i < k->parts; first += k->part[i++].channels) {
        const part_t *part = k->part + i;
        if (k->bf16 && k->silu) normalise(k, part, sample, first, channels, p0, p1, a, b, 1, 1);
        else if (k->bf16) normalise(k, part, sample, first, channels, p0, p1, a, b, 1, 0);
        else if (k->silu) normalise(k, part, sample, first, channels, p0, p1, a, b, 0, 1);
        else normalise(k, part, sample, first, channels, p0, p1, a, b, 0, 0);
    }
}

/* Group normalisation of x + shift, then SiLU, then codes (or floats). `scratch` holds
 * n * chunks * 2 * channels floats; a sample is cut in `chunks` when there are few samples. */
void quantempo_norm(const norm_t *k, float *scratch, int64_t chunks, int threads) {
    int64_t channels = 0;
    for (int64_t i = 0; i < k->parts; i++) channels += k->part[i].channels;
    const int64_t pixels = k->height * k->width, items = k->n * chunks;
#pragma omp parallel num_threads(threads)
    {
        float pivot[channels], a[channels], b[channels];
        if (chunks == 1) {
            /* Both passes of a sample in one thread: the second finds it in the cache. */
#pragma omp for schedule(dynamic, 1)
            for (int64_t sample = 0; sample < k->n; sample++) {
                float *partial = scratch + 2 * sample * channels;
                first_pixel(k, sample, pivot);
                sum_pixels(k, sample, channels, 0, pixels, pivot, partial);
                affine(k, sample, channels, pivot, partial, 1, a, b);
                write_pixels(k, sample, channels, 0, pixels, a, b);
            }
        } else {
#pragma omp for schedule(static)
            for (int64_t item = 0; item < items; item++) {
                const int64_t sample = item / chunks, part = item % chunks;
                first_pixel(k, sample, pivot);
                sum_pixels(k, sample, channels, pixels * part / chunks,
                           pixels * (part + 1) / chunks, pivot, scratch + 2 * item * channels);
            }
#pragma omp for schedule(static)
            for (int64_t item = 0; item < items; item++) {
                const int64_t sample = item / chunks, part = item % chunks;
                first_pixel(k, sample, pivot);
                affine(k, sample, channels, pivot, scratch + 2 * sample * chunks * channels,
                       chunks, a, b);
                write_pixels(k, sample, channels, pixels * part / chunks,
                             pixels * (part + 1) / chunks, a, b);
            }
        }
    }
}

typedef struct {
    const void *x;      /* [n][height][width], `stride` elements from pixel to pixel */
    int64_t n, height, width, channels, stride;
    int32_t bf16, repeat; /* each pixel becomes repeat x repeat (nearest upsampling) */
    int64_t top, bottom, left, right;
    float scale;
    int32_t zero, qmax; /* codes are 0 to qmax; zero among them */
    uint8_t *codes;     /* [n][top + repeat height + bottom][left + repeat width + right][c] */
    float *scales;      /* [n][height], of each row: measured, written, used for `scale`; or NULL */
} quantize_t;

/* max |x| / top of a row, at least the smallest normal number: `core.token_scale`, bit for bit. */
INLINE float row_scale(const quantize_t *k, const char *x, float top, int bf16) {
    const ptrdiff_t size = bf16 ? 2 : 4;
    vi most = {0};
    for (int64_t j = 0; j < k->width; j++) {
        for (int64_t c = 0; c < k->channels; c += LANES) {
            const char *from = x + size * (j * k->stride + c);
            char in[4 * LANES] = {0};
            if (c + LANES > k->channels)
                from = memcpy(in, from, size * (size_t)(k->channels - c));
            /* Without their sign, the bits of floats are in order; NaN is the largest. */
            vi v = (vi)load(from, bf16) & 0x7fffffff, more = v > most;
            most = (v & more) | (most & ~more);
        }
    }
    int32_t bits = 0;
    for (int i = 0; i < LANES; i++)
        if (most[i] > bits) bits = most[i];
    float peak;
    memcpy(&peak, &bits, sizeof peak);
    return peak / top < FLT_MIN ? FLT_MIN : peak / top;
}

INLINE void quantize_row(const quantize_t *k, int64_t row, int bf16) {
    const float z = (float)k->zero, top = (float)(k->qmax - k->zero);
    const ptrdiff_t size = bf16 ? 2 : 4;
    const int64_t line = (k->left + k->repeat * k->width + k->right) * k->channels;
    const int64_t lines = k->top + k->repeat * k->height + k->bottom;
    const int64_t sample = row / k->height, i = row % k->height;
    const char *x = (const char *)k->x + size * row * k->width * k->stride;
    uint8_t *out = k->codes + (sample * lines + k->top + k->repeat * i) * line;
    uint8_t *pixel = out + k->left * k->channels;
    const float scale = k->scales ? row_scale(k, x, top, bf16) : k->scale;
    if (k->scales) k->scales[row] = scale;
    memset(out, k->zero, (size_t)(k->left * k->channels));
    for (int64_t j = 0; j < k->width; j++, pixel += k->repeat * k->channels) {
        const char *from = x + size * j * k->stride;
        int64_t c = 0;
        /* A true quotient: the same codes as core.quantize, bit for bit. */
        for (; c + LANES <= k->channels; c += LANES)
            put_bytes(pixel + c, to_code(load(from + size * c, bf16) / scale, z, top));
        if (c < k->channels) {
            char in[4 * LANES] = {0};
            uint8_t codes[LANES];
            memcpy(in, from + size * c, size * (size_t)(k->channels - c));
            put_bytes(codes, to_code(load(in, bf16) / scale, z, top));
            memcpy(pixel + c, codes, (size_t)(k->channels - c));
        }
        for (int r = 1; r < k->repeat; r++)
            memcpy(pixel + r * k->channels, pixel, (size_t)k->channels);
    }
    memset(pixel, k->zero, (size_t)(k->right * k->channels));
    for (int r = 1; r < k->repeat; r++) memcpy(out + r * line, out, (size_t)line);
    if (i == 0) memset(out - k->top * line, k->zero, (size_t)(k->top * line));
    if (i == k->height - 1)
        memset(out + k->repeat * line, k->zero, (size_t)(k->bottom * line));
}

/* Codes of a float tensor, with nearest upsampling and a border of zero points on the way. */
void quantempo_quantize(const quantize_t *k, int threads) {
    const int64_t rows = k->n * k->height;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        if (k->bf16) quantize_row(k, row, 1);
        else quantize_row(k, row, 0);
    }
}

/* x += y (if any), and `edge` (if any) on the border: see `edge_pixels`. Both dense. */
void quantempo_add(void *x, const void *y, const float *edge, int64_t n, int64_t height,
                   int64_t width, int64_t channels, int bf16, int threads) {
    const int64_t line = (bf16 ? 2 : 4) * width * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n * height; row++) {
        char *to = (char *)x + row * line;
        if (y) {
            const char *from = (const char *)y + row * line;
            if (bf16) add_pixel(to, from, NULL, width * channels, 1);
            else add_pixel(to, from, NULL, width * channels, 0);
        }
        if (edge) edge_pixels(to, row % height, height, width, channels, edge, bf16);
    }
}

/* Weights (q - z) s of 4 bits in groups, as oneDNN reads them: [o / block][tap][i / 4][o][i % 4].
 *
 * q[out][tap][row] holds two input channels a byte, the even one low; groups[out][tap][count] bytes
 * (s - 1) << 4 | z of `group` channels. Of each row the `inputs` channels from `first` on are read;
 * depth >= inputs is written, zeros where there is none. */
typedef struct {
    const uint8_t *q, *groups;
    int8_t *out;
    int64_t outs, taps, row, count, group, first, inputs, block, depth;
} unpack_t;

#define MOST_BLOCK 64

/* Bytes (q - z) s of the four nibbles of n, each a byte of it: n s + 128 - z s leaves no byte. */
INLINE uint32_t scaled(uint32_t n, uint32_t s, uint32_t c) { return (n * s + c) ^ 0x80808080u; }

INLINE uint32_t spread(uint32_t n) {
    n = (n | n << 8) & 0x00ff00ffu;
    return (n | n << 4) & 0x0f0f0f0fu;
}

/* s and (128 - z s) 0x01010101 of the group of a channel for every row of a block. */
static void group_terms(const unpack_t *k, const uint8_t *groups, int64_t rows, int64_t channel,
                        uint32_t *s, uint32_t *c) {
    for (int64_t o = 0; o < rows; o++) {
        const uint8_t g = groups[o * k->taps * k->count + channel / k->group];
        s[o] = (g >> 4) + 1;
        c[o] = (128 - (g & 15) * s[o]) * 0x01010101u;
    }
}

static void unpack_tap(const unpack_t *k, int64_t first_out, int64_t tap, uint32_t *out) {
    const int64_t line = k->taps * k->row, left = k->outs - first_out;
    const int64_t rows = left < k->block ? left : k->block;
    const uint8_t *q = k->q + (first_out * k->taps + tap) * k->row;
    const uint8_t *groups = k->groups + (first_out * k->taps + tap) * k->count;
    uint32_t s[MOST_BLOCK], c[MOST_BLOCK];
    memset(out, 0, (size_t)(k->depth * k->block));
    for (int64_t i = 0; i < k->inputs; i += 8, out += 2 * k->block) {
        const int64_t channel = k->first + i;
        if (channel % 8 == 0 && i + 8 <= k->inputs) {
            if (i == 0 || channel % k->group == 0) group_terms(k, groups, rows, channel, s, c);
            const uint8_t *from = q + channel / 2;
            for (int64_t o = 0; o < rows; o++) {
                uint32_t n;
                memcpy(&n, from + o * line, 4);
                out[o] = scaled(spread(n & 0xffff), s[o], c[o]);
                out[k->block + o] = scaled(spread(n >> 16), s[o], c[o]);
            }
            continue;
        }
        for (int64_t j = 0; j < 8 && i + j < k->inputs; j++) {
            const int64_t at = channel + j;
            group_terms(k, groups, rows, at, s, c);
            for (int64_t o = 0; o < rows; o++) {
                const uint32_t n = q[o * line + at / 2] >> (at % 2 * 4) & 15;
                ((int8_t *)(out + j / 4 * k->block + o))[j % 4] = (int8_t)scaled(n, s[o], c[o]);
            }
        }
    }
}

void quantempo_unpack(const uint8_t *q, const uint8_t *groups, int8_t *out, int64_t outs,
                      int64_t taps, int64_t row, int64_t count, int64_t group, int64_t first,
                      int64_t inputs, int64_t block, int64_t depth, int threads) {
    const unpack_t k = {q, groups, out, outs, taps, row, count, group, first, inputs, block, depth};
    const int64_t blocks = (outs + block - 1) / block;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t tap = 0; tap < taps; tap++)
            unpack_tap(&k, b * block, tap, (uint32_t *)out + (b * taps + tap) * depth / 4 * block);
}

/* Adds four products of a byte of `a` and a signed byte of `b` to each lane. */
INLINE vi dot(vi sum, vi a, vi b) {
#ifdef __AVX512VNNI__
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 32; j += 8)
            sum[i] += (a[i] >> j & 255) * (int8_t)(b[i] >> j);
    return sum;
#endif
}

/* A convolution, or a linear layer: the same for every call with images of one size. */
typedef struct {
    /* [tap][pixel]: which pixel of x is read, -1 for one outside; then the place of each pixel in
     * the output, and its row of `edge`. NULL: row by row. In the order of what is outside. */
    const int32_t *places;
    const float *scale; /* [outs] */
    int64_t size, pixels, taps, inputs, outs;
} layer_t;

/* y = x_scale scale[o] (start[o] + sum w x) + bias[o], + add, + edge. */
typedef struct {
    const layer_t *l;
    const uint8_t *x;       /* [n][size][inputs] */
    const int8_t *w;        /* [outs / BLOCK][tap][inputs / 4][BLOCK][4], zeros behind the last */
    const uint8_t *outside; /* [inputs]; NULL: zeros */
    const int32_t *start;
    const float *bias, *edge;
    const void *add; /* like out, maybe out itself; or NULL, as may be the three above */
    void *out;
    int64_t pixels;
    float x_scale;
    int32_t bf16;
} product_t;

#define BLOCK 64
#define ROWS 6
#define WIDE (LANES == 16 ? 4 : 2)
static const uint8_t zeros[1 << 14];

INLINE vf load_some(const void *p, int bf16, int64_t count) {
    char in[4 * LANES] = {0};
    memcpy(in, p, (size_t)((bf16 ? 2 : 4) * count));
    return load(in, bf16);
}

/* The value that a store in bfloat16 leaves. */
INLINE vf rounded(vf v, int bf16) {
    char kept[4 * LANES];
    if (!bf16) return v;
    store(kept, 1, v);
    return load(kept, 1);
}

/* Lanes of one pixel, in the order of roundings of a convolution and two sums, or of a linear. */
INLINE void finish(const product_t *k, vi sum, int64_t pixel, int64_t mask, int64_t o) {
    const int64_t left = k->l->outs - o, at = pixel * k->l->outs + o;
    const int64_t count = left < LANES ? left : LANES, size = k->bf16 ? 2 : 4;
    const int steps = k->bf16 && k->l->places;
#define GET(p, half) (count == LANES ? load(p, half) : load_some(p, half, count))
    if (k->start) sum += (vi)GET(k->start + o, 0);
    vf y = to_float(sum) * k->x_scale * GET(k->l->scale + o, 0);
    /* Rounded before the next sum. */
    __asm__("" : "+v"(y));
    if (k->bias) y += GET(k->bias + o, 0);
    if (k->add) y = rounded(y, steps) + GET((const char *)k->add + size * at, k->bf16);
    if (k->edge && mask)
        y = rounded(y, steps) + GET(k->edge + mask * k->l->outs + o, 0);
#undef GET
    char *to = (char *)k->out + size * at;
    if (count == LANES) store(to, k->bf16, y);
    else {
        char last[4 * LANES];
        store(last, k->bf16, y);
        memcpy(to, last, (size_t)(size * count));
    }
}

INLINE void product_tile(const product_t *k, int64_t image, int64_t p0, int64_t out, const int rows,
                         const int wide) {
    const layer_t *l = k->l;
    const int64_t whole = l->inputs / 4, depth = (l->inputs + 3) / 4, pixels = k->pixels;
    const uint8_t *x = k->x + image * l->size * l->inputs;
    const uint8_t *outside = k->outside ? k->outside : zeros;
    const int8_t *w = k->w + out / BLOCK * l->taps * depth * 4 * BLOCK + out % BLOCK * 4;
    const int32_t *places = l->places ? l->places + p0 : NULL;
    vi sum[ROWS][WIDE] = {0};
    for (int64_t tap = 0; tap < l->taps; tap++) {
        const uint8_t *at[ROWS];
        int inside = k->outside != NULL;
#pragma GCC unroll 8
        for (int p = 0; p < rows; p++) {
            const int64_t place = places ? places[tap * pixels + p] : p0 + p;
            at[p] = place < 0 ? outside : x + place * l->inputs;
            inside |= place >= 0;
        }
        if (!inside) {
            w += depth * 4 * BLOCK;
            continue;
        }
#define STEP(bytes)                                                                     \
    {                                                                                   \
        vi b[WIDE];                                                                     \
        _Pragma("GCC unroll 8") for (int v = 0; v < wide; v++) b[v] =                   \
            load_int(w + 4 * LANES * v);                                                \
        _Pragma("GCC unroll 8") for (int p = 0; p < rows; p++) {                        \
            int32_t four = 0;                                                           \
            memcpy(&four, at[p] + 4 * i, bytes);                                        \
            const vi a = four - (vi){0};                                                \
            _Pragma("GCC unroll 8") for (int v = 0; v < wide; v++) sum[p][v] =          \
                dot(sum[p][v], a, b[v]);                                                \
        }                                                                               \
        w += 4 * BLOCK;                                                                 \
    }
        int64_t i = 0;
        for (; i < whole; i++) STEP(4)
        if (i < depth) STEP((size_t)(l->inputs % 4))
#undef STEP
    }
#pragma GCC unroll 8
    for (int p = 0; p < rows; p++) {
        const int64_t pixel = places ? places[l->taps * pixels + p] : p0 + p;
        const int64_t mask = places ? places[(l->taps + 1) * pixels + p] : 0;
#pragma GCC unroll 8
        for (int v = 0; v < wide; v++)
            finish(k, sum[p][v], image * pixels + pixel, mask, out + LANES * v);
    }
}

INLINE void product_rows(const product_t *k, int64_t image, int64_t p0, int64_t p1, int64_t out,
                         const int wide) {
    for (; p0 + ROWS <= p1; p0 += ROWS) product_tile(k, image, p0, out, ROWS, wide);
    switch (p1 - p0) {
    case 5: product_tile(k, image, p0, out, 5, wide); break;
    case 4: product_tile(k, image, p0, out, 4, wide); break;
    case 3: product_tile(k, image, p0, out, 3, wide); break;
    case 2: product_tile(k, image, p0, out, 2, wide); break;
    case 1: product_tile(k, image, p0, out, 1, wide); break;
    }
}

/* The channels out to out + BLOCK of some pixels. */
static void product_block(const product_t *k, int64_t image, int64_t p0, int64_t p1, int64_t out) {
    const int64_t end = out + BLOCK < k->l->outs ? out + BLOCK : k->l->outs;
    for (; out + WIDE * LANES <= end; out += WIDE * LANES) product_rows(k, image, p0, p1, out, WIDE);
    for (; out < end; out += LANES) product_rows(k, image, p0, p1, out, 1);
}

#define PIECE 96

/* Images with `places`, or one matrix of n rows without. */
void quantempo_product(const layer_t *l, const uint8_t *x, const int8_t *w, int64_t n,
                       const uint8_t *outside, const int32_t *start, const float *bias,
                       const float *edge, const void *add, void *out, float x_scale, int bf16,
                       int threads) {
    const int64_t pixels = l->places ? l->pixels : n, images = l->places ? n : 1;
    const int64_t pieces = (pixels + PIECE - 1) / PIECE, blocks = (l->outs + BLOCK - 1) / BLOCK;
    const product_t k = {l, x, w, outside, start, bias, edge, add, out, pixels, x_scale, bf16};
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t image = 0; image < images; image++)
            for (int64_t piece = 0; piece < pieces; piece++) {
                const int64_t p0 = piece * PIECE, p1 = p0 + PIECE;
                product_block(&k, image, p0, p1 < pixels ? p1 : pixels, block * BLOCK);
            }
}

int quantempo_layout(void) { return (int)(sizeof(norm_t) * 1000 + sizeof(quantize_t)); }
