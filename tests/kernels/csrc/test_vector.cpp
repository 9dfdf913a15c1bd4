// Bit-exact tests of the vector layer: loads, stores, masks and rounding.
#include "vector.h"

#include "check.h"
#include "tests.h"

using namespace deltaw;

namespace {

// Returns true if only the first n of 16 values were written.
template <class T>
bool only_first_written(const T *numbers, int64_t n, T untouched) {
    for (int64_t i = n; i < 16; i++)
        if (memcmp(numbers + i, &untouched, sizeof(T))) return false;
    return true;
}

void test_rows_ends() {
    for (int64_t n = 0; n <= 16; n++) {
        const std::string what = std::to_string(n) + " numbers of a row's end";
        const First m = first(n);
        Buffer<float> f(n);
        Buffer<bf16> h(n);
        Buffer<uint8_t> u(n);
        Buffer<int8_t> s(n);
        f.fill(), h.fill();
        for (int64_t i = 0; i < n; i++) u[i] = (uint8_t)(250 + i), s[i] = (int8_t)(-3 * i);
        float of_f[16], of_h[16];
        int32_t of_u[16], of_s[16];
        store16(of_f, load16(f.data(), m)), store16(of_h, load16(h.data(), m));
        store_i(of_u, load_u8(u.data(), m)), store_i(of_s, load_s8(s.data(), m));
        bool right = true;
        for (int64_t i = 0; i < 16; i++)
            right = right && of_f[i] == (i < n ? f[i] : 0) && of_h[i] == (i < n ? h.at(i) : 0) && of_u[i] == (i < n ? u[i] : 0) &&
                    of_s[i] == (i < n ? s[i] : 0);
        expect(right, what + " are read, and zeros");

        float to_f[16] = {};
        bf16 to_h[16] = {};
        uint8_t to_u[16] = {};
        store16(to_f, set_f(1.5f), m), store16(to_h, set_f(1.5f), m), store_u8(to_u, set_i(7), m);
        for (int64_t i = 0; i < n; i++) right = right && to_f[i] == 1.5f && to_h[i] == 0x3fc0 && to_u[i] == 7;
        expect(right && only_first_written(to_f, n, 0.0f) && only_first_written<bf16>(to_h, n, 0) && only_first_written<uint8_t>(to_u, n, 0),
               what + " are written, and no others");
        store16(of_f, select_first(m, set_f(2), set_f(3)));
        for (int64_t i = 0; i < 16; i++) right = right && of_f[i] == (i < n ? 2 : 3);
        expect(right, what + " are kept");
    }
}

void test_transpose() {
    I16 r[16];
    int32_t numbers[16][16], found[16][16];
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) numbers[i][j] = 1000 * i + j;
        r[i] = load_i(numbers[i]);
    }
    transpose16(r);
    bool right = true;
    for (int i = 0; i < 16; i++) store_i(found[i], r[i]);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) right = right && found[i][j] == numbers[j][i];
    expect(right, "16 rows become 16 columns");
}

void test_rounding() {
    // To bf16: round to nearest, ties to even, overflow to infinity. NaN remains NaN.
    const uint32_t given[16] = {0x3f808000, 0x3f818000, 0x3f808001, 0x3f817fff, 0xbf808000, 0x7f7fffff, 0x7f800000, 0xff800000,
                                0x00000000, 0x80000000, 0x3f7f8000, 0x00800000, 0x7f7f7fff, 0x42f6e979, 0xc2f6e979, 0x01018000};
    const bf16 expected[16] = {0x3f80, 0x3f82, 0x3f81, 0x3f81, 0xbf80, 0x7f80, 0x7f80, 0xff80, 0x0000, 0x8000, 0x3f80, 0x0080, 0x7f7f, 0x42f7,
        0xc2f7, 0x0102};
    bf16 found[16], lanes[16];
    store16(found, load16((const float *)given));
    store_u16(lanes, bf16_bits(load16((const float *)given)));
    for (int i = 0; i < 16; i++) {
        expect(found[i] == expected[i], "to bf16, number " + std::to_string(i));
        expect(found[i] == lanes[i], "to bf16 in lanes, number " + std::to_string(i));
    }
    store16(found, set_f(NAN));
    expect((found[0] & 0x7f80) == 0x7f80 && (found[0] & 0x7f), "to bf16, NaN");

    // To integers: ties to even. To bytes: clamped.
    const float ties[16] = {0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 126.5f, 127.5f, 300, -300, 1e6f, -1e6f, 0.49999997f, -128.5f, 255.5f, 0};
    const int whole[16] = {0, 2, 2, 0, -2, -2, 126, 128, 300, -300, 1000000, -1000000, 0, -128, 256, 0};
    int32_t ints[16];
    int8_t s[16];
    uint8_t u[16];
    const I16 rounded = to_int(load16(ties));
    store_i(ints, rounded), store_s8(s, rounded), store_u8(u, rounded, first(16));
    float nearest_of[16];
    store16(nearest_of, nearest(load16(ties)));
    for (int i = 0; i < 16; i++) {
        expect(ints[i] == whole[i] && nearest_of[i] == (float)whole[i], "to a whole number, number " + std::to_string(i));
        expect(s[i] == std::max(-128, std::min(127, whole[i])) && u[i] == std::max(0, std::min(255, whole[i])), "to a byte, number " + std::to_string(i));
    }
}

void test_over_lanes() {
    float numbers[16];
    double sum = 0;
    for (int i = 0; i < 16; i++) numbers[i] = (float)((i * 7 + 3) % 16 - 6), sum += numbers[i];
    const F16 a = load16(numbers);
    expect(sum_lanes(a) == (float)sum && max_lane(a) == 9 && min_lane(a) == -6, "sums and ends over lanes");
    for (int i = 0; i < 16; i++) {
        float one[16] = {};
        one[i] = 1;
        expect(any(load16(one) > zero_f()) && sum_lanes(load16(one)) == 1 && max_lane(load16(one)) == 1, "lane " + std::to_string(i));
    }
    expect(!any(zero_f() > zero_f()) && !any(no_lanes()), "no lane");
}

void test_powers() {
    double worst = 0, worst_coarse = 0;
    for (int i = -1259; i <= 1279; i += 16) {
        float x[16], y[16], z[16];
        for (int j = 0; j < 16; j++) x[j] = (float)std::min(1279, i + j) * 0.1f;
        store16(y, exp2_16(load16(x))), store16(z, exp2_16_for_bf16(load16(x)));
        for (int j = 0; j < 16; j++) {
            worst = std::max(worst, std::fabs(y[j] / std::exp2((double)x[j]) - 1));
            worst_coarse = std::max(worst_coarse, std::fabs(z[j] / std::exp2((double)x[j]) - 1));
        }
    }
    expect(worst < 3e-7, "powers of two: off by " + std::to_string(worst * 1e7) + "e-7");
    expect(worst_coarse < 4e-6, "powers of two for bf16: off by " + std::to_string(worst_coarse * 1e6) + "e-6");
    const float ends[16] = {-INFINITY, -1e30f, -127, 129, 1e30f, INFINITY, NAN, 0};
    float y[16], z[16];
    store16(y, exp2_16(load16(ends))), store16(z, exp2_16_for_bf16(load16(ends)));
    for (const float *p : {y, z}) {
        for (int i = 0; i < 3; i++) expect(p[i] == 0, "powers far below");
        for (int i = 3; i < 6; i++) expect(p[i] == INFINITY, "powers far above");
        expect(p[6] != p[6], "a power of NaN");
    }
    expect(y[7] == 1, "a power of 0");
}

}  // namespace

void test_vector() { test_rows_ends(), test_transpose(), test_rounding(), test_over_lanes(), test_powers(); }
