// Gradients of low-rank factors: products of a transposed thin matrix with a wide one, over all rows.
#include "factors.h"

#include "arithmetic.h"
#include "kernels.h"
#include "right_side.h"
#include "threads.h"

using namespace deltaw;

namespace {

// C = scale·thinᵀ·wide, (r, N), or its transpose (N, r), for thin (T, r) in fp32 and wide (T, N). The wide side is read
// in place, panel by panel. Sums of some thin columns stay in registers.
struct ThinProduct {
    int64_t T, N, r;
    const float *thin;
    float scale;
    bool transposed;
    float *out;
};

// sums (ROWS, 32) of thin columns j … and columns n … += those of tokens t0 … t1 - 1.
template <int ROWS, int VECS, class W>
__attribute__((noinline)) void add_tokens(const ThinProduct &c, const W *wide, int64_t t0, int64_t t1, int64_t j, int64_t n, float *sums) {
    F16 s[ROWS][VECS];
    First columns[VECS];
#pragma GCC unroll 2
    for (int v = 0; v < VECS; v++) columns[v] = first(c.N - n - 16 * v);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) s[i][v] = load16(sums + i * PANEL + 16 * v);
    for (int64_t t = t0; t < t1; t++) {
        I16 w[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) w[v] = bits_of(load16(wide + t * c.N + n + 16 * v, columns[v]));
        const float *const by = c.thin + t * c.r + j;
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const Word a = word_at(by + i);
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) Fma::add(s[i][v], a, w[v]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) store16(sums + i * PANEL + 16 * v, s[i][v]);
}

void write_lines(const ThinProduct &c, const float *lines, int64_t n0) {
    const int64_t count = std::min<int64_t>(PANEL, c.N - n0);
    for (int64_t j = 0; j < c.r; j++)
        for (int64_t n = 0; n < count; n++) c.out[c.transposed ? (n0 + n) * c.r + j : j * c.N + n0 + n] = lines[j * PANEL + n] * c.scale;
}

const int64_t TOKEN_TILE = 256;  // tokens for which a panel of the wide side fits in the first-level cache

template <class W>
void thin_product(const ThinProduct &c, const W *wide, int thread, int threads) {
    int64_t begin, end;
    split_range((c.N + PANEL - 1) / PANEL, thread, threads, begin, end);
    const int64_t passes = (c.r + MAX_ROWS - 1) / MAX_ROWS, rows_per_pass = (c.r + passes - 1) / std::max<int64_t>(passes, 1);
    Scratch scratch;
    float *const sums = scratch.take<float>(c.r * PANEL);
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t n0 = panel * PANEL;
        memset(sums, 0, c.r * PANEL * 4);
        for (int64_t t0 = 0; t0 < c.T; t0 += TOKEN_TILE)
            for (int64_t j = 0; j < c.r;) {
                const int rows = max_tile_rows(std::min(rows_per_pass, c.r - j));
                with_rows(rows, [&](auto count) {
                    with_vecs(c.N - n0 > 16 ? 2 : 1, [&](auto vecs, int v) {
                        add_tokens<decltype(count)::value, decltype(vecs)::value>(c, wide, t0, std::min(c.T, t0 + TOKEN_TILE), j, n0 + 16 * v,
                                                                                  sums + j * PANEL + 16 * v);
                    });
                });
                j += rows;
            }
        write_lines(c, sums, n0);
    }
}

// Widens a bf16 `c.thin`.
template <class T>
void typed_thin_product(ThinProduct c, const T *thin, const T *wide, int thread, int threads) {
    Scratch scratch;
    if (std::is_same<T, bf16>::value) {
        float *const widened = scratch.take<float>(c.T * c.r + 16);
        for (int64_t i = 0; i < c.T * c.r; i += 16) store16(widened + i, load16(thin + i, first(c.T * c.r - i)));
        c.thin = widened;
    } else c.thin = (const float *)thin;
    thin_product(c, wide, thread, threads);
}

#ifdef __AVX512BF16__
// Like ThinProduct for bf16 thin and wide sides and the bf16 dot product, with r at most 16. Two rows of the wide side
// are interleaved in registers, 32 columns at a time, and multiplied into the sums of eight thin columns.

const int64_t PREFETCH_TOKENS = 32;  // tokens to prefetch ahead, since rows are far apart in memory

// sums (8, 32) of thin columns, whose pairs of tokens start at `by`, += those of `tokens` rows of the wide side. `left`
// is the number of rows that exist from here. A separate function, because the sums would not stay in registers if it
// were inlined.
template <bool FETCH>
__attribute__((noinline)) void add_pairs(const int32_t *by, const bf16 *wide, int64_t N, __mmask32 columns, int64_t tokens, int64_t left,
                                         F16 (*sums)[2]) {
    F16 s[8][2];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) s[j][v] = sums[j][v];
    const bf16 *at = wide;
    for (int64_t t = 0; t < tokens; t += 2, at += 2 * N, by += 16) {
        if (FETCH && t + PREFETCH_TOKENS + 1 < left) {
            __builtin_prefetch(at + PREFETCH_TOKENS * N);
            __builtin_prefetch(at + (PREFETCH_TOKENS + 1) * N);
        }
        const __m512i one = _mm512_maskz_loadu_epi16(columns, at);
        const __m512i two = _mm512_maskz_loadu_epi16(t + 1 < left ? columns : 0, t + 1 < left ? at + N : at);
        const I16 low{_mm512_unpacklo_epi16(one, two)}, high{_mm512_unpackhi_epi16(one, two)};
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const I16 b = set_i(by[j]);
            OpBF16::add(s[j][0], low, b);
            OpBF16::add(s[j][1], high, b);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) sums[j][v] = s[j][v];
}

void thin_dot_product(int64_t T, int64_t N, int64_t r, const bf16 *thin, const bf16 *wide, float scale, bool transposed, float *out, int thread,
                  int threads) {
    const int64_t pairs = (T + 1) / 2, panels = (N + PANEL - 1) / PANEL;
    int64_t begin, end;
    split_range(panels, thread, threads, begin, end);
    if (begin == end) return;
    Scratch scratch;
    int32_t *const interleaved = scratch.take<int32_t>(pairs * 16);  // two rows of the thin side, interleaved
    const First lanes = first(r);
    for (int64_t t = 0; t < T; t += 2) {
        const I16 low = load_u16(thin + t * r, lanes);
        I16 high = zero_i();
        if (t + 1 < T) high = load_u16(thin + (t + 1) * r, lanes);
        store_i(interleaved + t / 2 * 16, low | (high << 16));
    }
    // Interleaving places columns 0-3, 8-11, … in one vector and 4-7, 12-15, … in the other.
    const __m512i first_half = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second_half = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t n0 = panel * PANEL;
        const __mmask32 columns = N - n0 >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (N - n0)) - 1;
        F16 sums[16][2] = {};
        for (int64_t t0 = 0; t0 < T; t0 += TOKEN_TILE) {
            const int64_t tokens = std::min(T - t0, TOKEN_TILE);
            for (int64_t j0 = 0; j0 < r; j0 += 8) {
                const auto add = j0 == 0 ? add_pairs<true> : add_pairs<false>;
                add(interleaved + t0 / 2 * 16 + j0, wide + t0 * N + n0, N, columns, tokens, T - t0, sums + j0);
            }
        }
        const F16 by = set_f(scale);
        alignas(64) float lines[16][PANEL];
        for (int j = 0; j < r; j++) {
            store16(lines[j], by * F16{_mm512_permutex2var_ps(sums[j][0].v, first_half, sums[j][1].v)});
            store16(lines[j] + 16, by * F16{_mm512_permutex2var_ps(sums[j][0].v, second_half, sums[j][1].v)});
        }
        const int64_t count = std::min<int64_t>(PANEL, N - n0);
        if (transposed)
            for (int64_t n = 0; n < count; n++)
                for (int64_t j = 0; j < r; j++) out[(n0 + n) * r + j] = lines[j][n];
        else
            for (int64_t j = 0; j < r; j++) memcpy(out + j * N + n0, lines[j], count * 4);
    }
}

#endif

#ifdef DW_AMX
// Like ThinProduct with AMX tiles. The transposed thin side is the left side. The wide side is the right side, whose
// panels are packed and multiplied some groups at a time.
struct TransposedThin {
    static constexpr int64_t TOKENS = 2 * tiles::GROUPS;  // per step
    static constexpr int64_t GROUP_TILE = 128;  // 16 KiB of a panel
    const int64_t steps, groups, rows;

    TransposedThin(int64_t T, int64_t r) : steps((T + TOKENS - 1) / TOKENS), groups(steps * tiles::GROUPS), rows((r + 15) / 16 * 16) {}

    int64_t scratch_bytes() const { return rows * groups * 4 + GROUP_TILE * 128 + rows * PANEL * 4; }

    // Write (rows, T) of pairs of tokens from thin (T, r), padded with zeros.
    void transpose(const bf16 *thin, int64_t T, int64_t r, char *into) const {
        for (int64_t j = 0; j < rows; j += 16)
            for (int64_t step = 0; step < steps; step++) {
                I16 pairs[16];
                for (int i = 0; i < 16; i++) {
                    const int64_t t = step * TOKENS + 2 * i;
                    pairs[i] = zero_i();
                    if (t < T) pairs[i] = load_u16(thin + t * r + j, first(r - j));
                    if (t + 1 < T) pairs[i] = pairs[i] | (load_u16(thin + (t + 1) * r + j, first(r - j)) << 16);
                }
                transpose16(pairs);
                for (int i = 0; i < 16; i++) store_i(into + ((j + i) * groups + step * tiles::GROUPS) * 4, pairs[i]);
            }
    }
};

void thin_tile_product(const ThinProduct &c, const bf16 *thin, const bf16 *wide, int thread, int threads) {
    const TransposedThin size(c.T, c.r);
    int64_t begin, end;
    split_range((c.N + PANEL - 1) / PANEL, thread, threads, begin, end);
    if (begin == end) return;
    Scratch scratch;
    char *const thin_pairs = scratch.take(size.rows * size.groups * 4), *const lines = scratch.take(size.GROUP_TILE * 128);
    float *const sums = scratch.take<float>(size.rows * PANEL);
    size.transpose(thin, c.T, c.r, thin_pairs);
    const Right right{wide, c.N, BF16, 0, 1.0f};
    const ProductScope<TilesBF16> product_scope;
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t n0 = panel * PANEL;
        memset(sums, 0, size.rows * PANEL * 4);
        for (int64_t g0 = 0; g0 < size.groups; g0 += size.GROUP_TILE) {
            const int64_t deep = std::min(size.groups - g0, size.GROUP_TILE);
            pack<TilesBF16>(right, c.T, c.N, n0, g0, deep, lines);
            products_onto<TilesBF16>(size.rows, c.N - n0 > 16 ? 2 : 1, thin_pairs + g0 * 4, size.groups * 4, lines, deep, sums, PANEL, sums, PANEL);
        }
        write_lines(c, sums, n0);
    }
}
#endif

// One thread's part. Each thread widens the thin sides redundantly, which is faster than synchronizing.
void factors_part(int type, const FactorsBackward &f, int thread, int threads) {
#ifdef __AVX512BF16__
    if (type == BF16 && f.rank <= 16 && selected_arithmetic(BF16) == DOT) {
        thin_dot_product(f.M, f.in, f.rank, (const bf16 *)f.narrow, (const bf16 *)f.x, 1.0f, true, f.grad_A, thread, threads);
        thin_dot_product(f.M, f.out, f.rank, (const bf16 *)f.h, (const bf16 *)f.grad, f.scaling, false, f.grad_B, thread, threads);
        return;
    }
#endif
    const ThinProduct grad_A{f.M, f.in, f.rank, nullptr, 1.0f, true, f.grad_A}, grad_B{f.M, f.out, f.rank, nullptr, f.scaling, false, f.grad_B};
#ifdef DW_AMX
    if (type == BF16 && selected_arithmetic(BF16) == TILES) {
        thin_tile_product(grad_A, (const bf16 *)f.narrow, (const bf16 *)f.x, thread, threads);
        thin_tile_product(grad_B, (const bf16 *)f.h, (const bf16 *)f.grad, thread, threads);
        return;
    }
#endif
    if (type == F32) {
        typed_thin_product(grad_A, (const float *)f.narrow, (const float *)f.x, thread, threads);
        typed_thin_product(grad_B, (const float *)f.h, (const float *)f.grad, thread, threads);
    } else {
        typed_thin_product(grad_A, (const bf16 *)f.narrow, (const bf16 *)f.x, thread, threads);
        typed_thin_product(grad_B, (const bf16 *)f.h, (const bf16 *)f.grad, thread, threads);
    }
}

}  // namespace

void deltaw::factors_backward(int type, const FactorsBackward *layers, int count) {
    in_parallel([&](int thread, int threads) {
        for (int i = 0; i < count; i++) factors_part(type, layers[i], thread, threads);
    });
}

// grad_A (in, r) = xᵀ·narrow and grad_B (r, out) = scaling·hᵀ·grad, both in fp32.
int dw_factors_backward(int type, int64_t M, int64_t in, int64_t out, int64_t rank, const void *x, const void *h, const void *grad,
                        const void *narrow, float scaling, float *grad_A, float *grad_B) {
    return guarded([&] {
        const FactorsBackward one{M, in, out, rank, x, h, grad, narrow, scaling, grad_A, grad_B};
        factors_backward(type, &one, 1);
    });
}

// Peak bytes that dw_factors_backward takes from the threads' arenas.
int64_t dw_factors_scratch_size(int type, int64_t M, int64_t rank) {
    const int64_t threads = thread_count();
#ifdef DW_AMX
    if (type == BF16 && selected_arithmetic(BF16) == TILES) return threads * TransposedThin(M, rank).scratch_bytes();
#endif
#ifdef __AVX512BF16__
    if (type == BF16 && rank <= 16 && selected_arithmetic(BF16) == DOT) return threads * ((M + 1) / 2 * 64);
#endif
    return threads * (rank * PANEL * 4 + (type == BF16 ? (M * rank + 16) * 4 : 0));
}
