// Tests of tile products with any number of rows, columns and groups against float64, with bounds checks.
#include "check.h"
#include "tests.h"

#include "arithmetic.h"

using namespace deltaw;

#ifdef DW_AMX

namespace {

// Element types of an Op, with random values and the conversion of sums.
struct OfBF16 {
    typedef TilesBF16 Op;
    typedef bf16 Left;
    typedef bf16 Right;
    static Left left() { return from_double<bf16>(random_number()); }
    static Right right() { return from_double<bf16>(random_number()); }
    static double sum(float stored) { return stored; }
    static constexpr double TOLERANCE = 2e-6;
};
struct OfInt8 {
    typedef TilesInt8 Op;
    typedef uint8_t Left;
    typedef int8_t Right;
    static Left left() { return (uint8_t)(128 + 35 * random_number()); }
    static Right right() { return (int8_t)(35 * random_number()); }
    static double sum(float stored) {
        int32_t bits;
        memcpy(&bits, &stored, 4);
        return bits;
    }
    static constexpr double TOLERANCE = 0;
};

// `gap`: bytes between rows of the left operand. `from_ld`: 0 starts from zero, a positive value adds to sums of each row, a
// negative one adds the same sums to all rows.
template <class Of>
void test_product(int64_t rows, int vecs, int64_t groups, int64_t gap, int from_ld) {
    const std::string what = "tiles " + std::to_string(rows) + "x" + std::to_string(vecs) + "x" + std::to_string(groups) + " of " +
                             std::to_string(Of::Op::PER_GROUP) + " gap " + std::to_string(gap) + " from " + std::to_string(from_ld);
    const int64_t PER = Of::Op::PER_GROUP, K = groups * PER, stride = groups * 4 + gap, columns = 16 * vecs, ld = 48;
    Buffer<char> left((rows - 1) * stride + groups * 4), right(groups * 128 - (vecs == 1 ? 64 : 0));
    Buffer<float> from(from_ld ? (rows - 1) * ld + columns : columns), tile((rows - 1) * ld + columns), again(columns);
    auto a = [&](int64_t m, int64_t k) { return (typename Of::Left *)(left.data() + m * stride) + k; };
    auto b = [&](int64_t k, int64_t n) { return (typename Of::Right *)(right.data() + k / PER * 128 + 4 * n) + k % PER; };
    for (int64_t m = 0; m < rows; m++)
        for (int64_t k = 0; k < K; k++) *a(m, k) = Of::left();
    for (int64_t k = 0; k < K; k++)
        for (int64_t n = 0; n < columns; n++) *b(k, n) = Of::right();
    memset(from.data(), 0, from.count * 4);
    if (from_ld) from.fill();
    if (from_ld && PER == 4)
        for (int64_t i = 0; i < from.count; i++) {
            const int32_t start = (int32_t)i * 1001;
            memcpy(&from[i], &start, 4);
        }
    const ProductScope<typename Of::Op> product_scope;
    // Sums of each row are in the output.
    if (from_ld > 0) tile.copy(from);
    if (from_ld)
        products_onto<typename Of::Op>(rows, vecs, left.data(), stride, right.data(), groups, from_ld > 0 ? tile.data() : from.data(),
                                       from_ld > 0 ? ld : 0,
                                       tile.data(), ld);
    else products<typename Of::Op>(rows, vecs, left.data(), stride, right.data(), groups, tile.data(), ld);
    Numbers found, expected;
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < columns; n++) {
            double sum = from_ld ? Of::sum(from[(from_ld > 0 ? m * ld : 0) + n]) : 0;
            for (int64_t k = 0; k < K; k++) sum += to_double(*a(m, k)) * to_double(*b(k, n));
            expected.push_back(sum), found.push_back(Of::sum(tile[m * ld + n]));
        }
    expect_close(found, expected, Of::TOLERANCE, what);
    for (int64_t m = 0; m + 1 < rows; m++) {
        const std::string unwritten(4 * (ld - columns), (char)0xff);
        if (from_ld <= 0) expect(!memcmp(&tile[m * ld + columns], unwritten.data(), unwritten.size()), what + " writes beyond");
    }
    // The bits of a row do not depend on the number of rows.
    if (from_ld > 0) return;
    for (int64_t m : {(int64_t)0, rows / 2, rows - 1}) {
        if (from_ld) products_onto<typename Of::Op>(1, vecs, (char *)a(m, 0), stride, right.data(), groups, from.data(), 0, again.data(), columns);
        else products<typename Of::Op>(1, vecs, (char *)a(m, 0), stride, right.data(), groups, again.data(), columns);
        expect(!memcmp(again.data(), &tile[m * ld], 4 * columns), what + " alone");
    }
}

}  // namespace

void test_tiles() {
    for (int64_t rows : {1, 7, 15, 16, 17, 31, 32, 33, 47, 48, 63, 96, 101})
        for (int vecs : {1, 2})
            for (int64_t groups : {1, 5, 16, 23, 32, 49})
                for (int from : {0, -1, 1}) {
                    const int64_t gap = rows % 3 * 12;
                    test_product<OfBF16>(rows, vecs, groups, gap, from), test_product<OfInt8>(rows, vecs, groups, gap, from);
                }
#ifdef DW_AMX_EMULATED
    expect(!tiles::state.product_scope, "tiles are released");
#endif
}

#else

void test_tiles() {}

#endif
