// Matrix products with a frozen or a thin right side, the low-rank update added while the sums are in registers.
//
//   C = rows ∘ (A · B) ∘ columns + scale·H·L + bias + added
//
// A is read as it lies; B is laid out anew for each call, 32 columns at a time, which costs 1 to 3 % and needs
// no second copy of the weights; H (M, r) and L (r, N) are the low-rank part. With bytes on both sides,
// A holds unsigned bytes around 128 with a scale a row, B signed bytes with a scale a column (or a row of W).
#include "kernels.h"
#include "vectors.h"

ParallelFn parallel_fn = nullptr;
CountFn thread_number_fn = nullptr, team_size_fn = nullptr, thread_count_fn = nullptr;

extern "C" void dw_threads(void *parallel, void *number, void *team, void *count) {
    parallel_fn = (ParallelFn)parallel;
    thread_number_fn = (CountFn)number;
    team_size_fn = (CountFn)team;
    thread_count_fn = (CountFn)count;
}

enum Type { F32 = 0, BF16 = 1, S8 = 2 };
const int PANEL = 32;
const int64_t GROUPS_AT_ONCE = 768;    // 96 KiB of right side, which stay in the second-level cache
const int64_t GROUPS_OF_MANY = 256;    // where there are more than that: sums, left and right sides stay there together
const int64_t LEFT_AT_ONCE = 448 << 10;  // bytes of left side that stay beside it while columns go by
const int64_t KEPT_AT_MOST = 4 << 20;    // bytes of right side that are laid out once for all rows

struct Right {  // (K, N): element (k, n) at n·ld + k where `by_column`, else at k·ld + n
    const void *data;
    int64_t ld;
    int type;
    int by_column;
    float scale;                  // of fp32 data
    // Of bf16 data that become bytes on the way, what they are divided by: (N) where `by_column`, else (K).
    const float *bytes_of = nullptr;
};

static inline __m256i halves(const float *p, __mmask16 m, __m512 scale) {
    return narrow(_mm512_mul_ps(load16(p, m), scale));
}

// Columns n0 … n0+31 and groups g0 … g0+groups-1 of the right side, as `product` reads them.
template <class Op>
static void pack(const Right &b, int64_t K, int64_t N, int64_t n0, int64_t g0, int64_t groups, char *into) {
    const int per = Op::PER_GROUP;
    const int64_t k0 = g0 * per, depth = std::min(K - k0, groups * per);
    const int vecs = N - n0 > 16 ? 2 : 1;
    if (b.by_column) {
        const float *f = (const float *)b.data;
        if (b.type == F32 && per == 2) {  // rounded on the way
            bf16 *line = (bf16 *)room(0, 16 * groups * 4);
            __m512 scale = _mm512_set1_ps(b.scale);
            for (int v = 0; v < vecs; v++) {
                const char *rows[16];
                for (int i = 0; i < 16; i++) {
                    int64_t n = n0 + 16 * v + i;
                    rows[i] = n < N ? (const char *)(line + i * groups * 2) : nullptr;
                    if (n >= N) continue;
                    for (int64_t k = 0; k < groups * 2; k += 16)
                        _mm256_mask_storeu_epi16(line + i * groups * 2 + k, first(groups * 2 - k),
                                                 halves(f + n * b.ld + k0 + k, first(depth - k), scale));
                }
                pack_rows16(rows, groups, into + 64 * v, 128);
            }
            return;
        }
        if (b.type == BF16 && per == 4) {
            char *line = (char *)room(0, 16 * (groups * 4 + 16));
            for (int v = 0; v < vecs; v++) {
                const char *rows[16];
                for (int i = 0; i < 16; i++) {
                    const int64_t n = n0 + 16 * v + i;
                    char *to = line + i * groups * 4;
                    rows[i] = n < N ? to : nullptr;
                    if (n >= N) continue;
                    const __m512 by = _mm512_set1_ps(b.bytes_of[n] > 0 ? 1.0f / b.bytes_of[n] : 0.0f);
                    for (int64_t k = 0; k < groups * 4; k += 16) {
                        const __m512 x = load16((const bf16 *)b.data + n * b.ld + k0 + k, first(depth - k));
                        _mm_storeu_si128((__m128i *)(to + k), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, by))));
                    }
                }
                pack_rows16(rows, groups, into + 64 * v, 128);
            }
            return;
        }
        const int64_t size = 4 / per;
        for (int v = 0; v < vecs; v++) {
            const char *rows[16];
            for (int i = 0; i < 16; i++) {
                int64_t n = n0 + 16 * v + i;
                rows[i] = n < N ? (const char *)b.data + (n * b.ld + k0) * size : nullptr;
            }
            pack_rows16(rows, groups, into + 64 * v, 128);
            if (per == 1 && b.scale != 1.0f)
                for (int64_t g = 0; g < groups; g++) {
                    float *at = (float *)(into + 128 * g + 64 * v);
                    _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(b.scale)));
                }
        }
        return;
    }
    for (int v = 0; v < vecs; v++) {
        const int64_t n = n0 + 16 * v;
        const __mmask16 m = first(N - n);
        char *to = into + 64 * v;
        if (per == 1) {
            __m512 scale = _mm512_set1_ps(b.scale);
            for (int64_t g = 0; g < groups; g++, to += 128)
                _mm512_store_ps((float *)to, _mm512_mul_ps(load16((const float *)b.data + (k0 + g) * b.ld + n, m), scale));
        } else if (per == 2 && b.type == F32) {
            __m512 scale = _mm512_set1_ps(b.scale);
            const float *f = (const float *)b.data;
            for (int64_t g = 0; g < groups; g++, to += 128) {
                const float *at = f + (k0 + 2 * g) * b.ld + n;
                __m512i low = _mm512_cvtepu16_epi32(halves(at, m, scale)), high = _mm512_setzero_si512();
                if (2 * g + 1 < depth) high = _mm512_cvtepu16_epi32(halves(at + b.ld, m, scale));
                _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        } else if (per == 2) {
            const bf16 *h = (const bf16 *)b.data;
            for (int64_t g = 0; g < groups; g++, to += 128) {
                const bf16 *at = h + (k0 + 2 * g) * b.ld + n;
                __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, at)), high = _mm512_setzero_si512();
                if (2 * g + 1 < depth) high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, at + b.ld));
                _mm512_store_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        } else if (b.type == BF16) {
            const bf16 *h = (const bf16 *)b.data + n;
            for (int64_t g = 0; g < groups; g++, to += 128) {
                __m512i sum = _mm512_setzero_si512();
                for (int j = 0; j < 4 && 4 * g + j < depth; j++) {
                    const int64_t k = k0 + 4 * g + j;
                    const __m512 by = _mm512_set1_ps(b.bytes_of[k] > 0 ? 1.0f / b.bytes_of[k] : 0.0f);
                    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load16(h + k * b.ld, m), by));
                    sum = _mm512_or_si512(sum, _mm512_slli_epi32(_mm512_and_si512(q, _mm512_set1_epi32(255)), 8 * j));
                }
                _mm512_store_si512(to, sum);
            }
        } else {
            const int8_t *q = (const int8_t *)b.data + k0 * b.ld + n;
            const __m128i none = _mm_setzero_si128();
            for (int64_t g = 0; g < groups; g++, q += 4 * b.ld, to += 128) {
                __m128i r[4];
                for (int j = 0; j < 4; j++) r[j] = 4 * g + j < depth ? _mm_maskz_loadu_epi8(m, q + j * b.ld) : none;
                const __m128i low = _mm_unpacklo_epi8(r[0], r[1]), high = _mm_unpackhi_epi8(r[0], r[1]);
                const __m128i low2 = _mm_unpacklo_epi8(r[2], r[3]), high2 = _mm_unpackhi_epi8(r[2], r[3]);
                _mm_store_si128((__m128i *)to, _mm_unpacklo_epi16(low, low2));
                _mm_store_si128((__m128i *)to + 1, _mm_unpackhi_epi16(low, low2));
                _mm_store_si128((__m128i *)to + 2, _mm_unpacklo_epi16(high, high2));
                _mm_store_si128((__m128i *)to + 3, _mm_unpackhi_epi16(high, high2));
            }
        }
    }
}

// The lines of memory that the next panel will be packed from, fetched a few at a time while this one is worked on.
struct Ahead {
    const char *base = nullptr;
    int64_t rows = 0, bytes = 0, stride = 0, row = 0, at = 0;

    template <class Op>
    void panel(const Right &b, int64_t K, int64_t N, int64_t n0, int64_t g0, int64_t groups) {
        const int64_t size = b.type == F32 ? 4 : b.type == BF16 ? 2 : 1, k0 = g0 * Op::PER_GROUP;
        const int64_t deep = std::min(K - k0, groups * Op::PER_GROUP), wide = std::min<int64_t>(N - n0, PANEL);
        base = (const char *)b.data + (b.by_column ? n0 * b.ld + k0 : k0 * b.ld + n0) * size;
        rows = b.by_column ? wide : deep;
        bytes = (b.by_column ? deep : wide) * size;
        stride = b.ld * size;
        row = at = 0;
    }
    int64_t lines() const { return rows * ((bytes + 63) / 64); }
    void fetch(int64_t count) {
        for (; count > 0 && row < rows; count--) {
            __builtin_prefetch(base + row * stride + at, 0, 2);
            at += 64;
            if (at >= bytes) at = 0, row++;
        }
    }
};

struct Product {
    int64_t M, N, K;
    const void *left;      // (M, K), `left_ld` elements from row to row
    int64_t left_ld;
    int left_middle;       // of bytes, which of them stands for 0: 128, or 0
    Right right;
    const float *row_scale, *column_scale;  // (M), (N) or null
    const float *block_scale;               // (M, blocks) of bytes, one for each BYTES_AT_ONCE along K, or null
    const void *low;       // H (M, r) in the product's own precision (float where that is fp32), or null
    Right low_right;       // L (r, N)
    int64_t rank;
    const void *bias;      // (N) or null; its type is `out_type`'s unless bias_f32
    const void *added;     // (M, N) in the type of the result, or null; may be the result itself
    int64_t added_ld;
    void *out;             // (M, N), or (N, M) where `transposed`
    int64_t out_ld;
    int out_type, transposed, bias_f32;
    float out_scale;       // of the whole product, before bias and added
};

// A tile of sums goes out: whole numbers of bytes become fp32 times their row's and column's scale, the low-rank
// part is added, then bias and `added`, all of it in registers.
template <class LowOp, int ROWS, int VECS>
static void finish(const Product &p, const float *tile, bool bytes, int64_t m, int64_t n0, const char *low_right, int64_t low_groups) {
    __m512 s[ROWS][VECS];
    for (int v = 0; v < VECS; v++) {
        const int64_t n = n0 + 16 * v;
        for (int i = 0; i < ROWS; i++) {
            const float *at = tile + i * PANEL + 16 * v;
            s[i][v] = bytes ? _mm512_cvtepi32_ps(_mm512_loadu_si512(at)) : _mm512_loadu_ps(at);
        }
        if (p.column_scale) {
            const __m512 by = load16(p.column_scale + n, first(p.N - n));
            for (int i = 0; i < ROWS; i++) s[i][v] = _mm512_mul_ps(s[i][v], by);
        }
    }
    if (p.row_scale)
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECS; v++) s[i][v] = _mm512_mul_ps(s[i][v], _mm512_set1_ps(p.row_scale[m + i]));
    if (low_groups) {
        const int64_t stride = p.rank * (4 / LowOp::PER_GROUP);
        add_products<LowOp, ROWS, VECS>((const char *)p.low + m * stride, stride, low_right, low_groups, s);
    }
    const __m512 scale = _mm512_set1_ps(p.out_scale);
    for (int v = 0; v < VECS; v++) {
        const int64_t n = n0 + 16 * v;
        const __mmask16 mask = first(p.N - n);
        __m512 bias = _mm512_setzero_ps();
        if (p.bias) bias = p.bias_f32 || p.out_type == F32 ? load16((const float *)p.bias + n, mask) : load16((const bf16 *)p.bias + n, mask);
        for (int i = 0; i < ROWS; i++) {
            const int64_t row = m + i;
            __m512 y = _mm512_fmadd_ps(s[i][v], scale, bias);
            if (p.transposed) {
                alignas(64) float lanes[16];
                _mm512_store_ps(lanes, y);
                float *out = (float *)p.out;
                for (int j = 0; j < 16 && n + j < p.N; j++) out[(n + j) * p.out_ld + row] = lanes[j];
                continue;
            }
            if (p.added) {
                if (p.out_type == F32) y = _mm512_add_ps(y, load16((const float *)p.added + row * p.added_ld + n, mask));
                else y = _mm512_add_ps(y, load16((const bf16 *)p.added + row * p.added_ld + n, mask));
            }
            if (p.out_type == F32) store16((float *)p.out + row * p.out_ld + n, y, mask);
            else store16((bf16 *)p.out + row * p.out_ld + n, y, mask);
        }
    }
}

template <class LowOp, int VECS>
static void finish_rows(int rows, const Product &p, const float *tile, bool bytes, int64_t m, int64_t n0, const char *low_right, int64_t low_groups) {
    switch (rows) {
        case 12: finish<LowOp, 12, VECS>(p, tile, bytes, m, n0, low_right, low_groups); break;
        case 8: finish<LowOp, 8, VECS>(p, tile, bytes, m, n0, low_right, low_groups); break;
        case 4: finish<LowOp, 4, VECS>(p, tile, bytes, m, n0, low_right, low_groups); break;
        case 2: finish<LowOp, 2, VECS>(p, tile, bytes, m, n0, low_right, low_groups); break;
        default: finish<LowOp, 1, VECS>(p, tile, bytes, m, n0, low_right, low_groups);
    }
}

// Where sums of bytes begin: minus the middle of the left bytes times the sums of a panel's columns.
static void starts_of_columns(const char *right, int64_t groups, int vecs, int middle, int32_t *starts) {
    const __m512i ones = _mm512_set1_epi32(0x01010101);
    for (int v = 0; v < vecs; v++) {
        __m512i s = _mm512_setzero_si512();
        for (int64_t g = 0; g < groups; g++) s = _mm512_dpbusd_epi32(s, ones, _mm512_load_si512(right + 128 * g + 64 * v));
        _mm512_store_si512(starts + 16 * v, _mm512_mullo_epi32(s, _mm512_set1_epi32(-middle)));
    }
}

// tile (ROWS, 16·VECS) = or += for each block of the left side its whole numbers times the row's scale for it.
template <int ROWS, int VECS>
static void add_blocks(const char *left, int64_t stride, const char *right, int64_t groups, const int32_t *starts, const float *scales, int64_t blocks,
                       bool fresh, float *tile) {
    const int64_t at_once = BYTES_AT_ONCE / 4;
    for (int64_t g = 0; g < groups; g += at_once, starts += PANEL, scales++, fresh = false) {
        __m512i s[ROWS][VECS];
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < VECS; v++) s[i][v] = _mm512_load_si512(starts + 16 * v);
        add_products<OpS8, ROWS, VECS>(left + 4 * g, stride, right + 128 * g, std::min(at_once, groups - g), s);
        for (int i = 0; i < ROWS; i++) {
            const __m512 by = _mm512_set1_ps(scales[i * blocks]);
            for (int v = 0; v < VECS; v++) {
                float *to = tile + i * PANEL + 16 * v;
                const __m512 x = _mm512_cvtepi32_ps(s[i][v]);
                _mm512_storeu_ps(to, fresh ? _mm512_mul_ps(x, by) : _mm512_fmadd_ps(x, by, _mm512_loadu_ps(to)));
            }
        }
    }
}
template <int VECS>
static void add_blocks_of(int rows, const char *left, int64_t stride, const char *right, int64_t groups, const int32_t *starts, const float *scales,
                          int64_t blocks, bool fresh, float *tile) {
    switch (rows) {
        case 12: add_blocks<12, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile); break;
        case 8: add_blocks<8, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile); break;
        case 4: add_blocks<4, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile); break;
        case 2: add_blocks<2, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile); break;
        default: add_blocks<1, VECS>(left, stride, right, groups, starts, scales, blocks, fresh, tile);
    }
}

static void add_starts(float *tile, int rows, int vecs, const int32_t *starts) {
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) {
            void *at = tile + i * PANEL + 16 * v;
            _mm512_storeu_si512(at, _mm512_add_epi32(_mm512_loadu_si512(at), _mm512_load_si512(starts + 16 * v)));
        }
}

// One thread's part of a product.
template <class Op, class LowOp>
static void run(const Product &p, int thread, int threads) {
    const bool bytes = Op::PER_GROUP == 4, in_blocks = bytes && p.block_scale;
    const int64_t block_groups = BYTES_AT_ONCE / 4, blocks = (p.K + BYTES_AT_ONCE - 1) / BYTES_AT_ONCE;
    const int64_t element = 4 / Op::PER_GROUP;
    const int64_t groups = (p.K + Op::PER_GROUP - 1) / Op::PER_GROUP;
    const int64_t low_groups = (p.rank + LowOp::PER_GROUP - 1) / LowOp::PER_GROUP;
    const int64_t panels = (p.N + PANEL - 1) / PANEL;
    const bool several = groups > GROUPS_AT_ONCE;
    const int64_t most_groups = several ? GROUPS_OF_MANY : GROUPS_AT_ONCE;
    // Many rows are shared out among the threads, so that each finds its rows in its own cache, where the norm or
    // the product before has left them. Else pieces are (panel, range of rows), and rows are cut only where
    // panels alone would not share out evenly.
    const bool by_rows = p.M >= ROWS_FOR_EACH * threads;
    int64_t row0 = 0, row1 = p.M, cuts = 1, begin = 0, end = panels;
    if (by_rows) part_of(p.M, thread, threads, row0, row1);
    else {
        while (cuts * 2 * 24 <= p.M && cuts < 64) {
            const int64_t pieces = panels * cuts, most = (pieces + threads - 1) / threads;
            if (most * threads * 16 <= pieces * 17) break;
            cuts *= 2;
        }
        part_of(panels * cuts, thread, threads, begin, end);
    }
    if (begin == end) return;
    const int64_t line = std::min(groups, most_groups);
    char *low_right = (char *)room(2, std::max<int64_t>(1, low_groups) * 128);
    const int64_t cut = (row1 - row0 + cuts - 1) / cuts + 1;
    const int64_t block = std::min(cut, std::max<int64_t>(8, LEFT_AT_ONCE / (line * 4) / MOST_ROWS) * MOST_ROWS);
    // Where rows go by in several blocks, panels are laid out for the first and kept for the others.
    const int64_t first_panel = begin / cuts, own = (end - 1) / cuts + 1 - first_panel;
    const bool keep = !several && block < cut && own * line * 128 <= KEPT_AT_MOST;
    char *right = (char *)room(1, (keep ? own : 1) * line * 128);
    const int64_t starts_each = (in_blocks ? (line + block_groups - 1) / block_groups : 1) * PANEL;
    int32_t *starts = (int32_t *)room(13, (keep ? own : 1) * starts_each * 4);
    float *tiles = several ? (float *)room(3, (end - begin) * block * PANEL * 4) : nullptr;
    // Parts of rows whose distance is a large power of two would fall on the same few places of the cache.
    const bool gather = several && cuts == 1 && p.left_ld * element % 1024 == 0;
    const int64_t stride = gather ? line * 4 : p.left_ld * element;
    char *gathered = gather ? (char *)room(14, block * line * 4) : nullptr;
    alignas(64) float small[MOST_ROWS * PANEL];
    for (int64_t b0 = 0; b0 < cut; b0 += block)
        for (int64_t g0 = 0; g0 < groups || g0 == 0; g0 += most_groups) {
            const int64_t deep = std::min(groups - g0, most_groups);
            const bool last = g0 + most_groups >= groups;
            if (gather)
                for (int64_t m = 0; m < std::min(block, row1 - row0 - b0); m++)
                    memcpy(gathered + m * line * 4, (const char *)p.left + ((row0 + b0 + m) * p.left_ld + g0 * Op::PER_GROUP) * element, deep * 4);
            int64_t packed = -1, share = 0;
            Ahead ahead;
            for (int64_t piece = begin; piece < end; piece++) {
                int64_t m0, m1;
                part_of(row1 - row0, (int)(piece % cuts), (int)cuts, m0, m1);
                m0 += row0 + b0;
                m1 = std::min(m1 + row0, m0 + block);
                if (m0 >= m1) continue;
                const int64_t panel = piece / cuts, n0 = panel * PANEL, place = keep ? panel - first_panel : 0;
                const int vecs = p.N - n0 > 16 ? 2 : 1;
                char *const here = right + place * line * 128;
                int32_t *const start = starts + place * starts_each;
                if (packed != panel) {
                    if (last && p.rank) pack<LowOp>(p.low_right, p.rank, p.N, n0, 0, low_groups, low_right);
                    packed = panel;
                    ahead.rows = 0;
                    if (!keep || b0 == 0) {
                        pack<Op>(p.right, p.K, p.N, n0, g0, deep, here);
                        if (bytes)
                            for (int64_t g = 0; g < deep; g += in_blocks ? block_groups : deep)
                                starts_of_columns(here + g * 128, in_blocks ? std::min(block_groups, deep - g) : deep, vecs, p.left_middle,
                                                  start + (in_blocks ? g / block_groups * PANEL : 0));
                        const int64_t next = ((end - 1) / cuts > panel) ? panel + 1 : first_panel;
                        const int64_t next_g0 = next > panel ? g0 : g0 + most_groups;
                        if (next_g0 < groups) ahead.panel<Op>(p.right, p.K, p.N, next * PANEL, next_g0, std::min(groups - next_g0, most_groups));
                        share = ahead.lines() * MOST_ROWS / std::max<int64_t>(MOST_ROWS, (m1 - m0) / MOST_ROWS * MOST_ROWS) + 1;
                    }
                }
                for (int64_t m = m0; m < m1;) {
                    const int rows = rows_at_once(m1 - m);
                    float *tile = several ? tiles + ((piece - begin) * block + m - m0) * PANEL : small;
                    const char *left = (const char *)p.left + (m * p.left_ld + g0 * Op::PER_GROUP) * element;
                    if (gather) left = gathered + (m - row0 - b0) * line * 4;
                    ahead.fetch(share);
                    if (in_blocks) {
                        const float *scales = p.block_scale + m * blocks + g0 / block_groups;
                        if (vecs == 2) add_blocks_of<2>(rows, left, stride, here, deep, start, scales, blocks, g0 == 0, tile);
                        else add_blocks_of<1>(rows, left, stride, here, deep, start, scales, blocks, g0 == 0, tile);
                    } else if (g0 == 0 && !bytes) products<Op>(rows, vecs, left, stride, here, deep, tile, PANEL);
                    else {
                        // Of bytes, each part's own start belongs to it.
                        if (bytes && g0 > 0) add_starts(tile, rows, vecs, start);
                        const float *from = g0 > 0 ? tile : (const float *)start;
                        products_onto<Op>(rows, vecs, left, stride, here, deep, from, g0 > 0 ? PANEL : 0, tile, PANEL);
                    }
                    if (last) {
                        if (vecs == 2) finish_rows<LowOp, 2>(rows, p, tile, bytes && !in_blocks, m, n0, low_right, low_groups);
                        else finish_rows<LowOp, 1>(rows, p, tile, bytes && !in_blocks, m, n0, low_right, low_groups);
                    }
                    m += rows;
                }
            }
        }
}

static void run(const Product &p, int type, int thread, int threads) {
    if (p.M <= 0 || p.N <= 0) return;
    if (type == F32) run<OpF32, OpF32>(p, thread, threads);
    else if (type == BF16) run<OpBF16, OpBF16>(p, thread, threads);
    else if (p.out_type == F32) run<OpS8, OpF32>(p, thread, threads);
    else run<OpS8, OpBF16>(p, thread, threads);
}
static void run(const Product &p, int type) {
    in_parallel([&](int thread, int threads) { run(p, type, thread, threads); });
}

// (M, N) of 2-byte or 4-byte elements to (N, M), rows `to_ld` elements apart; what is beyond M becomes 0.
static void transpose(int64_t M, int64_t N, const void *from, int64_t ld, void *to, int64_t to_ld, int size) {
    for (int64_t n0 = 0; n0 < N; n0 += 16)
        for (int64_t m0 = 0; m0 < to_ld; m0 += 16) {
            const __mmask16 columns = first(N - n0), kept = first(to_ld - m0);
            __m512i lines[16];
            for (int i = 0; i < 16; i++) {
                lines[i] = _mm512_setzero_si512();
                if (m0 + i >= M) continue;
                const int64_t at = (m0 + i) * ld + n0;
                if (size == 4) lines[i] = _mm512_maskz_loadu_epi32(columns, (const float *)from + at);
                else lines[i] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, (const bf16 *)from + at));
            }
            transpose16(lines);
            for (int i = 0; i < 16 && n0 + i < N; i++) {
                const int64_t at = (n0 + i) * to_ld + m0;
                if (size == 4) _mm512_mask_storeu_epi32((float *)to + at, kept, lines[i]);
                else _mm256_mask_storeu_epi16((bf16 *)to + at, kept, _mm512_cvtepi32_epi16(lines[i]));
            }
        }
}

// Rows of fp32 or bf16, times `columns` (K) where given, as unsigned bytes around 128 with a scale a row:
// value = (byte - 128) · scale. Bytes are clamped to ±127.
template <class T>
static void quantise_row(int64_t K, const T *row, const float *columns, uint8_t *out, float *scale) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = 0; k < K; k += 16) {
        __mmask16 mask = first(K - k);
        __m512 v = load16(row + k, mask);
        if (columns) v = _mm512_mul_ps(v, load16(columns + k, mask));
        most = _mm512_max_ps(most, _mm512_abs_ps(v));
    }
    const float top = _mm512_reduce_max_ps(most);
    *scale = top / 127.0f;
    const __m512 by = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
    const __m512i low = _mm512_set1_epi32(1), high = _mm512_set1_epi32(255), shift = _mm512_set1_epi32(128);
    for (int64_t k = 0; k < K; k += 16) {
        __mmask16 mask = first(K - k);
        __m512 v = load16(row + k, mask);
        if (columns) v = _mm512_mul_ps(v, load16(columns + k, mask));
        __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, by)), shift);
        q = _mm512_min_epi32(_mm512_max_epi32(q, low), high);
        _mm_mask_storeu_epi8(out + k, mask, _mm512_cvtepi32_epi8(q));
    }
}
// With `at_once` numbers to a scale: scales (M, blocks).
template <class T>
static void quantise(int64_t M, int64_t K, const T *x, const float *columns, int64_t at_once, uint8_t *out, float *scales) {
    const int64_t blocks = (K + at_once - 1) / at_once;
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        part_of(M, thread, threads, begin, end);
        for (int64_t m = begin; m < end; m++)
            for (int64_t k = 0, b = 0; k < K; k += at_once, b++)
                quantise_row(std::min(at_once, K - k), x + m * K + k, columns ? columns + k : nullptr, out + m * K + k, scales + m * blocks + b);
    });
}
static void quantise(int type, int64_t M, int64_t K, const void *x, const float *columns, int64_t at_once, uint8_t *out, float *scales) {
    if (type == F32) quantise(M, K, (const float *)x, columns, at_once, out, scales);
    else quantise(M, K, (const bf16 *)x, columns, at_once, out, scales);
}
extern "C" void dw_quantise(int type, int64_t M, int64_t K, const void *x, const float *columns, uint8_t *out, float *scales) {
    quantise(type, M, K, x, columns, K, out, scales);
}

// A product of `type` whose left side has rows of K elements and whose result has rows of N.
static Product plain(int type, int64_t M, int64_t N, int64_t K, const void *left, const Right &right, void *out) {
    Product p{};
    p.M = M; p.N = N; p.K = K;
    p.left = left; p.left_ld = K; p.left_middle = 128; p.right = right;
    p.out = out; p.out_ld = N; p.out_type = type; p.out_scale = 1.0f;
    return p;
}

// dh (M, D) = grad·W, where grad (M, V) is of one sign but for each row's target, as that of a cross-entropy is. The
// target's part is added as it is; the others are rounded to bytes, times `scales`, in place, with a scale for each row
// and BYTES_AT_ONCE classes: one for a whole row would round most of them to 0. W (V, D) in bf16 becomes bytes on the way.
static void bytes_of_classes(int64_t V, bf16 *row, int64_t target, const float *scales, float *block_scales) {
    uint8_t *out = (uint8_t *)row;  // not ahead of what is read
    row[target] = 0;
    for (int64_t v0 = 0; v0 < V; v0 += BYTES_AT_ONCE, block_scales++) {
        const int64_t end = std::min(V, v0 + BYTES_AT_ONCE);
        __m512 most = _mm512_setzero_ps(), least = most;
        for (int64_t v = v0; v < end; v += 16) {
            const __m512 x = _mm512_mul_ps(load16(row + v, first(end - v)), load16(scales + v, first(end - v)));
            most = _mm512_max_ps(most, x);
            least = _mm512_min_ps(least, x);
        }
        const float high = _mm512_reduce_max_ps(most), low = _mm512_reduce_min_ps(least), top = high >= -low ? high : low;
        *block_scales = top / 255.0f;
        const __m512 by = _mm512_set1_ps(top != 0 ? 255.0f / top : 0.0f);
        for (int64_t v = v0; v < end; v += 16) {
            const __m512 x = _mm512_mul_ps(_mm512_mul_ps(load16(row + v, first(end - v)), load16(scales + v, first(end - v))), by);
            const __m512i q = _mm512_max_epi32(_mm512_cvtps_epi32(x), _mm512_setzero_si512());
            _mm_mask_storeu_epi8(out + v, first(end - v), _mm512_cvtusepi32_epi8(q));
        }
    }
}

extern "C" void dw_class_gradient(int64_t M, int64_t V, int64_t D, void *grad, const int64_t *targets, const void *weight, const float *scales,
                                  float *block_scales, void *dh) {
    const int64_t blocks = (V + BYTES_AT_ONCE - 1) / BYTES_AT_ONCE;
    float *const at_target = (float *)room(15, M * 4), *const sums = (float *)room(12, M * D * 4);
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        part_of(M, thread, threads, begin, end);
        for (int64_t m = begin; m < end; m++) {
            bf16 *row = (bf16 *)grad + m * V;
            at_target[m] = to_float(row[targets[m]]);
            bytes_of_classes(V, row, targets[m], scales, block_scales + m * blocks);
        }
    });
    Product p = plain(F32, M, D, V, grad, Right{weight, D, BF16, 0, 1.0f, scales}, sums);
    p.left_ld = 2 * V; p.left_middle = 0; p.block_scale = block_scales;
    run(p, S8);
    in_parallel([&](int thread, int threads) {
        int64_t begin, end;
        part_of(M, thread, threads, begin, end);
        for (int64_t m = begin; m < end; m++) {
            const __m512 by = _mm512_set1_ps(at_target[m]);
            const bf16 *row = (const bf16 *)weight + targets[m] * D;
            for (int64_t n = 0; n < D; n += 16) {
                const __mmask16 mask = first(D - n);
                store16((bf16 *)dh + m * D + n, _mm512_fmadd_ps(by, load16(row + n, mask), load16(sums + m * D + n, mask)), mask);
            }
        }
    });
}

static const char *at_row(const void *data, int64_t row, int64_t width, int type) {
    return data ? (const char *)data + row * width * (type == F32 ? 4 : 2) : nullptr;
}

// y (M, out) = x·Wᵀ + bias + scaling·h·B + added, and h (M, r) = x·A; A (in, r) and B (r, out) in fp32, r may be 0.
// W is (out, in) where `by_column`, else (in, out). In bytes (`scale` is not null) x goes as `steps`, with a scale a row;
// they are made here where `make_steps`. A bf16 weight with a `scale` becomes bytes as it is read.
extern "C" void dw_linear(int type, int64_t M, int64_t out, int64_t in, const void *x, int weight_type, const void *weight, int by_column,
                          const float *scale, const float *columns, const void *bias, int bias_f32, const float *A, const float *B, int64_t rank, float scaling,
                          const void *added, uint8_t *steps, float *steps_scale, int make_steps, void *y, void *h) {
    rows_apart(M, [&](int64_t first, int64_t rows) {
        const void *const left = at_row(x, first, in, type);
        void *const low = (void *)at_row(h, first, rank, type);
        uint8_t *const left_steps = scale ? steps + first * in : nullptr;
        float *const left_scale = scale ? steps_scale + first : nullptr;
        if (rank) run(plain(type, rows, rank, in, left, Right{A, rank, F32, 0, 1.0f}, low), type);
        if (scale && make_steps) quantise(type, rows, in, left, columns, in, left_steps, left_scale);
        Product p = plain(type, rows, out, in, scale ? left_steps : left, Right{weight, by_column ? in : out, weight_type, by_column, 1.0f, scale},
                          (void *)at_row(y, first, out, type));
        if (scale) p.row_scale = left_scale, p.column_scale = scale;
        if (rank) p.low = low, p.rank = rank, p.low_right = Right{B, out, F32, 0, scaling};
        p.bias = bias; p.bias_f32 = bias_f32;
        p.added = at_row(added, first, out, type); p.added_ld = out;
        run(p, scale ? S8 : type);
    });
}

// narrow (M, r) = scaling·grad·Bᵀ, and where dx (M, in) is not null dx = grad·W + narrow·Aᵀ + added. In bytes the gradient
// is rounded here, times `scale`, into `steps`, with a scale for each BYTES_AT_ONCE numbers: a row of it has few that are large.
extern "C" void dw_linear_backward(int type, int64_t M, int64_t out, int64_t in, const void *grad, const void *weight, int by_column,
                                   const float *scale, const float *columns, const float *A, const float *B, int64_t rank, float scaling,
                                   const void *added, uint8_t *steps, float *steps_scale, void *dx, void *narrow) {
    rows_apart(M, [&](int64_t first, int64_t rows) {
        const void *const left = at_row(grad, first, out, type);
        void *const low = (void *)at_row(narrow, first, rank, type);
        if (rank) run(plain(type, rows, rank, out, left, Right{B, out, F32, 1, scaling}, low), type);
        if (!dx) return;
        uint8_t *const left_steps = scale ? steps + first * out : nullptr;
        float *const left_scale = scale ? steps_scale + first * ((out + BYTES_AT_ONCE - 1) / BYTES_AT_ONCE) : nullptr;
        if (scale) quantise(type, rows, out, left, scale, BYTES_AT_ONCE, left_steps, left_scale);
        Product p = plain(type, rows, in, out, scale ? left_steps : left, Right{weight, by_column ? in : out, scale ? S8 : type, !by_column, 1.0f},
                          (void *)at_row(dx, first, in, type));
        if (scale) p.block_scale = left_scale, p.column_scale = columns;
        if (rank) p.low = low, p.rank = rank, p.low_right = Right{A, rank, F32, 1, 1.0f};
        p.added = at_row(added, first, in, type); p.added_ld = in;
        run(p, scale ? S8 : type);
    });
}

// C = scale·thinᵀ·wide, (r, N), or its transpose (N, r); thin (T, r) and wide (T, N) in bf16, r at most 16. Two rows of
// the wide side are interleaved in registers, 32 columns at a time, and go into the sums of eight thin columns.
const int64_t TOKENS_AT_ONCE = 256;  // 16 KiB of wide side, which stay in the first-level cache

static void thin_product(int64_t T, int64_t N, int64_t r, const bf16 *thin, const bf16 *wide, float scale, bool transposed, float *out, int thread,
                         int threads) {
    const int64_t pairs = (T + 1) / 2, panels = (N + PANEL - 1) / PANEL;
    int64_t begin, end;
    part_of(panels, thread, threads, begin, end);
    if (begin == end) return;
    int32_t *const both = (int32_t *)room(12, pairs * 64);  // two rows of the thin side, interleaved
    const __mmask16 some = first(r);
    for (int64_t t = 0; t < T; t += 2) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, thin + t * r));
        __m512i high = _mm512_setzero_si512();
        if (t + 1 < T) high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, thin + (t + 1) * r));
        _mm512_store_si512(both + t / 2 * 16, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    // Interleaving leaves columns 0-3, 8-11, … in one vector and 4-7, 12-15, … in the other.
    const __m512i first_half = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second_half = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t n0 = panel * PANEL;
        const __mmask32 columns = N - n0 >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (N - n0)) - 1;
        __m512 sums[16][2] = {};
        for (int64_t t0 = 0; t0 < T; t0 += TOKENS_AT_ONCE) {
            const int64_t t1 = std::min(T, t0 + TOKENS_AT_ONCE);
            for (int64_t j0 = 0; j0 < r; j0 += 8) {
                __m512 s[8][2];
                for (int j = 0; j < 8; j++)
                    for (int v = 0; v < 2; v++) s[j][v] = sums[j0 + j][v];
                for (int64_t t = t0; t < t1; t += 2) {
                    const bf16 *at = wide + t * N + n0;
                    const __m512i one = _mm512_maskz_loadu_epi16(columns, at);
                    const __m512i two = t + 1 < T ? _mm512_maskz_loadu_epi16(columns, at + N) : _mm512_setzero_si512();
                    const __m512i low = _mm512_unpacklo_epi16(one, two), high = _mm512_unpackhi_epi16(one, two);
                    const int32_t *by = both + t / 2 * 16 + j0;
                    for (int j = 0; j < 8; j++) {
                        const __m512i b = _mm512_set1_epi32(by[j]);
                        s[j][0] = OpBF16::add(s[j][0], low, b);
                        s[j][1] = OpBF16::add(s[j][1], high, b);
                    }
                }
                for (int j = 0; j < 8; j++)
                    for (int v = 0; v < 2; v++) sums[j0 + j][v] = s[j][v];
            }
        }
        const __m512 by = _mm512_set1_ps(scale);
        alignas(64) float lines[16][PANEL];
        for (int j = 0; j < r; j++) {
            _mm512_store_ps(lines[j], _mm512_mul_ps(by, _mm512_permutex2var_ps(sums[j][0], first_half, sums[j][1])));
            _mm512_store_ps(lines[j] + 16, _mm512_mul_ps(by, _mm512_permutex2var_ps(sums[j][0], second_half, sums[j][1])));
        }
        const int64_t count = std::min<int64_t>(PANEL, N - n0);
        if (transposed)
            for (int64_t n = 0; n < count; n++)
                for (int64_t j = 0; j < r; j++) out[(n0 + n) * r + j] = lines[j][n];
        else
            for (int64_t j = 0; j < r; j++) memcpy(out + j * N + n0, lines[j], count * 4);
    }
}

// of_A (in, r) = xᵀ·narrow and of_B (r, out) = scaling·hᵀ·grad, both in fp32: one thread's part. The thin sides are
// transposed by each thread for itself, which takes less time than waiting for another.
static void factors_backward(int type, const FactorsBackward &f, int thread, int threads) {
    if (type == BF16 && f.rank <= 16) {
        thin_product(f.M, f.in, f.rank, (const bf16 *)f.narrow, (const bf16 *)f.x, 1.0f, true, f.of_A, thread, threads);
        thin_product(f.M, f.out, f.rank, (const bf16 *)f.h, (const bf16 *)f.grad, f.scaling, false, f.of_B, thread, threads);
        return;
    }
    const int size = type == F32 ? 4 : 2;
    const int64_t count = (f.M + 1) / 2 * 2;  // read in pairs
    void *across = room(12, f.rank * count * size);
    transpose(f.M, f.rank, f.narrow, f.rank, across, count, size);
    Product p = plain(F32, f.rank, f.in, f.M, across, Right{f.x, f.in, type, 0, 1.0f}, f.of_A);
    p.left_ld = count; p.transposed = 1; p.out_ld = f.rank;
    run(p, type, thread, threads);
    transpose(f.M, f.rank, f.h, f.rank, across, count, size);
    p = plain(F32, f.rank, f.out, f.M, across, Right{f.grad, f.out, type, 0, 1.0f}, f.of_B);
    p.left_ld = count; p.out_scale = f.scaling;
    run(p, type, thread, threads);
}
void factors_backward(int type, const FactorsBackward *of, int count) {
    in_parallel([&](int thread, int threads) {
        for (int i = 0; i < count; i++) factors_backward(type, of[i], thread, threads);
    });
}
extern "C" void dw_factors_backward(int type, int64_t M, int64_t in, int64_t out, int64_t rank, const void *x, const void *h, const void *grad,
                                    const void *narrow, float scaling, float *of_A, float *of_B) {
    const FactorsBackward one{M, in, out, rank, x, h, grad, narrow, scaling, of_A, of_B};
    factors_backward(type, &one, 1);
}
