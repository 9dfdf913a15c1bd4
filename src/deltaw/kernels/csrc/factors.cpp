// The gradients of low-rank factors: products of a thin matrix, transposed, with a wide one, over all rows.
#include "factors.h"

#include "kernels.h"
#include "product.h"
#include "threads.h"

using namespace deltaw;

namespace {

// (M, N) of 2-byte or 4-byte elements to (N, M), rows `to_ld` elements apart; what is beyond M becomes 0.
void transpose(int64_t M, int64_t N, const void *from, int64_t ld, void *to, int64_t to_ld, int size) {
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

// C = scale·thinᵀ·wide, (r, N), or its transpose (N, r); thin (T, r) and wide (T, N) in bf16, r at most 16. Two rows of
// the wide side are interleaved in registers, 32 columns at a time, and go into the sums of eight thin columns.
const int64_t TOKENS_AT_ONCE = 256;  // 16 KiB of wide side, which stay in the first-level cache

void thin_product(int64_t T, int64_t N, int64_t r, const bf16 *thin, const bf16 *wide, float scale, bool transposed, float *out, int thread,
                  int threads) {
    const int64_t pairs = (T + 1) / 2, panels = (N + PANEL - 1) / PANEL;
    int64_t begin, end;
    part_of(panels, thread, threads, begin, end);
    if (begin == end) return;
    Scratch scratch;
    int32_t *const both = scratch.take<int32_t>(pairs * 16);  // two rows of the thin side, interleaved
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

// One thread's part. The thin sides are transposed by each thread for itself, which takes less time than waiting for
// another.
void factors_part(int type, const FactorsBackward &f, int thread, int threads) {
    if (type == BF16 && f.rank <= 16) {
        thin_product(f.M, f.in, f.rank, (const bf16 *)f.narrow, (const bf16 *)f.x, 1.0f, true, f.of_A, thread, threads);
        thin_product(f.M, f.out, f.rank, (const bf16 *)f.h, (const bf16 *)f.grad, f.scaling, false, f.of_B, thread, threads);
        return;
    }
    const int size = type == F32 ? 4 : 2;
    const int64_t count = (f.M + 1) / 2 * 2;  // read in pairs
    Scratch scratch;
    char *const across = scratch.take(f.rank * count * size);
    transpose(f.M, f.rank, f.narrow, f.rank, across, count, size);
    Product p = plain_product(F32, f.rank, f.in, f.M, across, Right{f.x, f.in, type, 0, 1.0f}, f.of_A);
    p.left_ld = count, p.transposed = 1, p.out_ld = f.rank;
    run_product(p, type, thread, threads);
    transpose(f.M, f.rank, f.h, f.rank, across, count, size);
    p = plain_product(F32, f.rank, f.out, f.M, across, Right{f.grad, f.out, type, 0, 1.0f}, f.of_B);
    p.left_ld = count, p.out_scale = f.scaling;
    run_product(p, type, thread, threads);
}

}  // namespace

void deltaw::factors_backward(int type, const FactorsBackward *of, int count) {
    in_parallel([&](int thread, int threads) {
        for (int i = 0; i < count; i++) factors_part(type, of[i], thread, threads);
    });
}

// of_A (in, r) = xᵀ·narrow and of_B (r, out) = scaling·hᵀ·grad, both in fp32.
int dw_factors_backward(int type, int64_t M, int64_t in, int64_t out, int64_t rank, const void *x, const void *h, const void *grad,
                        const void *narrow, float scaling, float *of_A, float *of_B) {
    return guarded([&] {
        const FactorsBackward one{M, in, out, rank, x, h, grad, narrow, scaling, of_A, of_B};
        factors_backward(type, &one, 1);
    });
}
