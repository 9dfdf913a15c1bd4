// Rows times rows of a bf16 weight in AMX tiles, for the products of a decoding step. The weight is the left side and
// is read in place, 16 rows per tile. The step's rows are the right side, 16 rows interleaved in pairs. Each sum has a
// fixed order that does not depend on the number of rows.
#pragma once
#include "arithmetic.h"
#include "decode_dots.h"

namespace deltaw {

// Type code of rows in the form that tiles multiply.
const int64_t TILED = 64;

#ifdef DW_AMX

namespace tiles {

const int64_t PAIRS = 16, DEPTH = 2 * PAIRS;  // per step
const int64_t SIDE = ROWS;  // rows of a step per right side

inline int64_t count_steps(int64_t depth) { return (depth + DEPTH - 1) / DEPTH; }
inline int64_t side_bytes_of(int64_t depth) { return count_steps(depth) * PAIRS * BYTES; }

// Write row m of a step, zero-padded.
inline void write_row(char *data, int64_t m, int64_t depth, const float *row) {
    char *const to = data + m / SIDE * side_bytes_of(depth) + m % SIDE * 4;
    alignas(64) bf16 numbers[DEPTH];
    for (int64_t k = 0; k < depth; k += DEPTH) {
        for (int64_t i = 0; i < DEPTH; i += 16) store16(numbers + i, load16(row + k + i, first(depth - k - i)));
        for (int64_t pair = 0; pair < PAIRS; pair++) memcpy(to + (k / 2 + pair) * BYTES, numbers + 2 * pair, 4);
    }
}

// Transpose sums (16 columns, 16 rows) to out (rows, columns).
inline void transpose(const float *sums, int64_t rows, float *out, int64_t out_ld) {
    if (rows <= 2) {
        for (int64_t r = 0; r < rows; r++)
            for (int c = 0; c < 16; c++) out[r * out_ld + c] = sums[16 * c + r];
        return;
    }
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_load_ps(sums + 16 * i);
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + 2 + j]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int j = 0; j < 4; j++) {
        const __m512 low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        const __m512 other_low = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88), other_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        b[j] = _mm512_shuffle_f32x4(low, other_low, 0x88), b[8 + j] = _mm512_shuffle_f32x4(low, other_low, 0xdd);
        b[4 + j] = _mm512_shuffle_f32x4(high, other_high, 0x88), b[12 + j] = _mm512_shuffle_f32x4(high, other_high, 0xdd);
    }
    for (int64_t r = 0; r < rows; r++) _mm512_storeu_ps(out + r * out_ld, b[r]);
}

// Memory to prefetch in parts: `bytes` from `next`, plus that of `other`.
struct TilePrefetch {
    const char *next;
    int64_t bytes, bytes_per_step, prefetched = 0;
    PrefetchSource *other;
    int64_t lines;
    void operator()() {
        for (const int64_t end = std::min(bytes, prefetched + bytes_per_step); prefetched < end; prefetched += 64)
            __builtin_prefetch(next + prefetched, 0, 2);
        if (other) other->prefetch(lines);
    }
};

// Multiply 16 · COLS columns of the weight, starting at `w`, by 16 · NUM_SIDES rows of the step, starting at x. COLS
// can be 4 only with one side.
template <int COLS, int NUM_SIDES>
inline void multiply_tiles(const char *x, int64_t side_bytes, const bf16 *w, int64_t depth, int64_t rows, float *out, int64_t out_ld,
                           TilePrefetch &prefetch_step) {
    clear<0>();
    if constexpr (NUM_SIDES == 2) clear<1>();
    if constexpr (COLS > 1) clear<2>();
    if constexpr (COLS == 4) clear<1>();
    if constexpr (COLS == 4 || (COLS == 2 && NUM_SIDES == 2)) clear<3>();
    const int64_t stride = depth * 2, full_steps = depth / DEPTH;
    auto step = [&](const char *left, int64_t left_stride, const char *right) {
        load<6>(right, BYTES);
        load<4>(left, left_stride);
        add_bf16<0, 4, 6>();
        if constexpr (NUM_SIDES == 2) load<7>(right + side_bytes, BYTES), add_bf16<1, 4, 7>();
        if constexpr (COLS > 1) {
            load<5>(left + ROWS * left_stride, left_stride);
            add_bf16<2, 5, 6>();
            if constexpr (NUM_SIDES == 2) add_bf16<3, 5, 7>();
        }
        if constexpr (COLS == 4) {  // one side leaves tiles free for two more columns of tiles
            load<7>(left + 2 * ROWS * left_stride, left_stride);
            add_bf16<1, 7, 6>();
            load<4>(left + 3 * ROWS * left_stride, left_stride);
            add_bf16<3, 4, 6>();
        }
    };
    for (int64_t s = 0; s < full_steps; s++) {
        step((const char *)(w + s * DEPTH), stride, x + s * PAIRS * BYTES);
        prefetch_step();
    }
    if (full_steps * DEPTH < depth) {  // memory beyond the end of a row belongs to the next row
        alignas(64) bf16 last[COLS * ROWS * DEPTH];
        memset(last, 0, sizeof(last));
        for (int64_t c = 0; c < COLS * ROWS; c++) memcpy(last + c * DEPTH, w + c * depth + full_steps * DEPTH, (depth - full_steps * DEPTH) * 2);
        step((const char *)last, BYTES, x + full_steps * PAIRS * BYTES);
        prefetch_step();
    }
    alignas(64) float sums[ROWS * ROWS];
    auto put = [&](int col, int side) {
        const int64_t count = std::min<int64_t>(SIDE, rows - side * SIDE);
        if (count > 0) transpose(sums, count, out + side * SIDE * out_ld + col * ROWS, out_ld);
    };
    store<0>(sums, BYTES), put(0, 0);
    if constexpr (NUM_SIDES == 2) store<1>(sums, BYTES), put(0, 1);
    if constexpr (COLS > 1) store<2>(sums, BYTES), put(1, 0);
    if constexpr (COLS == 4) store<1>(sums, BYTES), put(2, 0), store<3>(sums, BYTES), put(3, 0);
    if constexpr (COLS == 2 && NUM_SIDES == 2) store<3>(sums, BYTES), put(1, 1);
}

// Multiply rows m … of a step, m a multiple of 16, by `columns` rows of a weight, a multiple of 16; see all_dots.
inline void all_sums(const char *data, int64_t m, int64_t rows, const bf16 *w, int64_t depth, int64_t columns, float *out, int64_t out_ld,
                     const char *next, int64_t prefetch_bytes, PrefetchSource *other) {
    const TileScope use;
    const int64_t side_bytes = side_bytes_of(depth);
    const int64_t tile_columns = rows <= SIDE ? 4 * ROWS : 2 * ROWS;
    const int64_t num_tiles = (columns + tile_columns - 1) / tile_columns * ((rows + 2 * SIDE - 1) / (2 * SIDE));
    const int64_t num_steps = std::max<int64_t>(1, num_tiles * count_steps(depth));
    TilePrefetch prefetch_step{next, prefetch_bytes, (prefetch_bytes / num_steps + 63) / 64 * 64, 0, other, other ? other->lines / num_steps + 1 : 0};
    int64_t c = 0;
    if (rows <= SIDE)
        for (; c + 4 * ROWS <= columns; c += 4 * ROWS)
            multiply_tiles<4, 1>(data + m / SIDE * side_bytes, side_bytes, w + c * depth, depth, rows, out + c, out_ld, prefetch_step);
    for (; c < columns; c += 2 * ROWS)
        for (int64_t r = 0; r < rows; r += 2 * SIDE) {
            const char *const x = data + (m + r) / SIDE * side_bytes;
            const bf16 *const from = w + c * depth;
            float *const to = out + r * out_ld + c;
            const bool two = c + 2 * ROWS <= columns, two_sides = rows - r > SIDE;
            if (two && two_sides) multiply_tiles<2, 2>(x, side_bytes, from, depth, rows - r, to, out_ld, prefetch_step);
            else if (two) multiply_tiles<2, 1>(x, side_bytes, from, depth, rows - r, to, out_ld, prefetch_step);
            else if (two_sides) multiply_tiles<1, 2>(x, side_bytes, from, depth, rows - r, to, out_ld, prefetch_step);
            else multiply_tiles<1, 1>(x, side_bytes, from, depth, rows - r, to, out_ld, prefetch_step);
        }
}

}  // namespace tiles

// The form in which rows are multiplied with a weight of a type.
inline int64_t form_type(int64_t type) { return type == BF16 && selected_arithmetic(BF16) == TILES ? TILED : multiplied_as(type); }

#else

inline int64_t form_type(int64_t type) { return multiplied_as(type); }

#endif

}  // namespace deltaw
