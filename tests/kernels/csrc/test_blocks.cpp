// Tests of block formats: dequantized values against an elementwise reference, and products.
#include "blocks.h"

#include <memory>

#include "check.h"
#include "kernels.h"
#include "stored_blocks.h"
#include "tests.h"

namespace {

template <class T>
void test_products_of(int format, int64_t M, int64_t out, int64_t blocks, int64_t rank) {
    const StoredBlocks w(format, out, blocks * StoredBlocks::numbers(format));
    const int64_t in = w.columns;
    const std::string what = "format " + std::to_string(format) + " type " + std::to_string(type_of<T>()) + " " + std::to_string(M) + "x" +
                             std::to_string(in) + "x" + std::to_string(out);
    const double tolerance = sizeof(T) == 4 ? 2e-6 : 6e-3;
    Buffer<T> x(M * in), y(M * out), h(M * rank), added(M * out), dx(M * in), narrow(M * rank);
    Buffer<float> A(in * rank), B(rank * out);
    x.fill(), added.fill();
    for (Buffer<float> *b : {&A, &B})
        for (int64_t i = 0; i < b->count; i++) (*b)[i] = (float)to_double(from_double<T>(0.1 * random_number()));
    const float *const a = rank ? A.data() : nullptr, *const b = rank ? B.data() : nullptr;
    Numbers values = w.values();
    for (double &value : values) value = to_double(from_double<bf16>(value));
    expect(dw_linear(type_of<T>(), M, out, in, x.data(), format, &w.at, 1, nullptr, nullptr, nullptr, 0, a, b, rank, 0.5f, added.data(), nullptr,
                     nullptr, 0,
                     0, y.data(), h.data()) == 0, what);
    Numbers expected = added.numbers();
    add_product(expected, x.numbers(), values, M, out, in, 1, true), add_product(expected, h.numbers(), B.numbers(), M, out, rank, 0.5);
    expect_close(y.numbers(), expected, tolerance, what + " y");
    expect(dw_linear_backward(type_of<T>(), M, out, in, y.data(), format, &w.at, 1, nullptr, nullptr, a, b, rank, 0.5f, x.data(), nullptr, nullptr,
                              dx.data(), narrow.data()) == 0, what + " backward");
    Numbers expected_dx = x.numbers();
    add_product(expected_dx, y.numbers(), values, M, in, out), add_product(expected_dx, narrow.numbers(), A.numbers(), M, in, rank, 1, true);
    expect_close(dx.numbers(), expected_dx, tolerance, what + " dx");
    expect(dw_linear_scratch_size(type_of<T>(), M, out, in, format, 1, 0, 0, rank, 0, 0) > 0, what + " takes memory");
}

void test_numbers(int format) {
    const std::string what = "numbers of format " + std::to_string(format);
    const int64_t rows = 5, columns = 2 * StoredBlocks::numbers(format);
    const StoredBlocks w(format, rows, columns);
    const Numbers expected = w.values();
    Buffer<float> all(rows * columns), two(2 * columns);
    expect(dw_dequantize(0, format, &w.at, rows, columns, 0, nullptr, rows, all.data()) == 0, what);
    bool same = true;
    for (int64_t i = 0; i < all.count; i++) same = same && all[i] == (float)expected[i];
    expect(same, what + " are the format's");
    Buffer<int64_t> places(2);
    places[0] = 4, places[1] = 1;
    expect(dw_dequantize(0, format, &w.at, rows, columns, 0, places.data(), 2, two.data()) == 0, what + " at places");
    expect(!memcmp(two.data(), all.data() + 4 * columns, columns * 4) && !memcmp(two.data() + columns, all.data() + columns, columns * 4), what + " at places");
    Buffer<bf16> narrow(columns);
    expect(dw_dequantize(1, format, &w.at, rows, columns, 3, nullptr, 1, narrow.data()) == 0, what + " in bf16");
    same = true;
    for (int64_t i = 0; i < columns; i++) same = same && to_double(narrow[i]) == to_double(from_double<bf16>(expected[3 * columns + i]));
    expect(same, what + " rounded to bf16");
    places[0] = rows;
    expect(dw_dequantize(0, format, &w.at, rows, columns, 0, places.data(), 2, two.data()) == 2, what + ": no such row");
    expect(dw_dequantize(0, format, &w.at, rows, columns, 4, nullptr, 2, two.data()) == 2, what + ": no such rows");
}

}  // namespace

void test_blocks() {
    for (int format = deltaw::Q4_0; format <= deltaw::NF4; format++) {
        test_numbers(format);
        // Fewer columns than a panel, more groups than one pass processes, rows split among threads or not.
        const int64_t few = StoredBlocks::numbers(format) < 256 ? 7 : 1, many = 1024 / StoredBlocks::numbers(format);
        test_products_of<float>(format, 3, 21, few, 0), test_products_of<bf16>(format, 13, 38, few, 4);
        test_products_of<float>(format, 26, 40, many, 2), test_products_of<bf16>(format, 5, 70, many, 0);
    }
    test_products_of<bf16>(deltaw::Q4_K, 1160, 34, 1, 2);
}
