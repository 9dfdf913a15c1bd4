// Tests of decoding steps whose tensors end at guard pages: the head and its update against float64, bit-identical rows
// in any batch, and rejection of out-of-range arguments.
#include <memory>

#include "check.h"
#include "decode.h"
#include "kernels.h"
#include "stored_blocks.h"
#include "tests.h"

namespace {

const int64_t TOKENS = 32;

// A decoder with random weights and the buffers that own them.
struct Model {
    std::vector<std::unique_ptr<Buffer<float>>> floats;
    std::vector<std::unique_ptr<Buffer<bf16>>> halves;
    std::vector<std::unique_ptr<Buffer<int8_t>>> bytes;
    std::vector<std::unique_ptr<Buffer<int32_t>>> sums;
    std::vector<std::unique_ptr<StoredBlocks>> stored;
    std::vector<DecodeBlock> blocks;
    std::vector<DecodeFactors> factors;
    std::vector<const float *> cosines, sines;
    DecodeModel model{};
    const int type;

    const float *numbers(int64_t count, double scale, double offset = 0) {
        floats.push_back(std::make_unique<Buffer<float>>(count));
        return floats.back()->fill(scale, offset).data();
    }
    const void *matrix(int64_t count, double scale, int of) {
        if (of == 0) return numbers(count, scale);
        halves.push_back(std::make_unique<Buffer<bf16>>(count));
        return halves.back()->fill(scale).data();
    }
    DecodeLinear linear(int64_t out, int64_t in) {
        DecodeLinear l{nullptr, nullptr, nullptr, numbers(out, 0.1), nullptr, in, out, type};
        if (deltaw::stored_in_blocks(type)) {
            stored.push_back(std::make_unique<StoredBlocks>(type, out, in));
            l.weight = &stored.back()->at;
            return l;
        }
        if (type != 2) {
            l.weight = matrix(out * in, 0.2, type);
            return l;
        }
        bytes.push_back(std::make_unique<Buffer<int8_t>>(out * in));
        sums.push_back(std::make_unique<Buffer<int32_t>>(out));
        for (int64_t n = 0; n < out; n++) {
            (*sums.back())[n] = 0;
            for (int64_t k = 0; k < in; k++) {
                const int8_t w = (int8_t)std::max(-127.0, std::min(127.0, random_number() * 40));
                (*bytes.back())[n * in + k] = w, (*sums.back())[n] += w;
            }
        }
        l.weight = bytes.back()->data(), l.sums = sums.back()->data();
        l.scale = numbers(out, 0.0002, 0.004), l.columns = numbers(in, 0.1, 1);
        return l;
    }
    RowNorm norm(int64_t size, bool used = true) { return {numbers(size, 0.1, 1), numbers(size, 0.1), 1e-5f, 0.0f, 1, used}; }

    Model(int type, int count, int64_t split, int64_t heads, int64_t key_heads, int64_t size, int64_t hidden, int64_t inner,
          bool parallel) : type(type) {
        int64_t offset = 0;
        const bool apart = split == SEPARATE;
        const int64_t wide = heads * size, narrow = key_heads * size, turned = size / 2 / 2 * 2;
        for (int i = 0; i < count; i++) {
            DecodeBlock b{heads, key_heads, size, i % 4, i ? 40 : 0, turned, 0, split, 1, parallel, offset, 0.3f, i ? 6.0f : 0.0f,
                          {}, {}, norm(size), norm(size), {}, {}, {}, {}, {}, {}, {}};
            b.first.before = norm(hidden), b.second.before = norm(hidden);
            if (!parallel) b.first.after = norm(hidden), b.second.post = norm(hidden);
            b.query = linear(apart ? wide : wide + 2 * narrow, hidden);
            if (apart) b.key = linear(narrow, hidden), b.value = linear(narrow, hidden);
            b.output = linear(hidden, wide), b.down = linear(hidden, inner);
            b.gate = linear(apart ? inner : 2 * inner, hidden);
            if (apart) b.up = linear(inner, hidden);
            blocks.push_back(b);
            offset += (2 * narrow + key_heads * (type && size % 2)) * TOKENS;
        }
        const int64_t positions = 400;
        cosines.push_back(numbers(positions * turned, 0.7)), sines.push_back(numbers(positions * turned, 0.7));
        model = {blocks.data(), cosines.data(), sines.data(), count, 1, positions, hidden, type ? 1 : 0, TOKENS, offset, 0.5f, 0.0f, norm(hidden),
            linear(37, hidden)};
        for (const DecodeBlock &b : blocks)
            for (const DecodeLinear *l : {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down}) factors.push_back(update(*l, 5));
        factors.push_back(update(model.head, 19));
    }
    DecodeFactors update(const DecodeLinear &l, int64_t rank) {
        if (!l.weight) return {};
        const int64_t panels = (l.out + FACTOR_PANEL - 1) / FACTOR_PANEL, whole = type ? (rank + 1) / 2 * 2 : rank;
        return {matrix(rank * l.in, 0.2, type ? 1 : 0), matrix(panels * whole * FACTOR_PANEL, 0.2, type ? 1 : 0), rank};
    }
};

struct Rows {
    Buffer<float> hidden, out, logits;
    Buffer<int32_t> positions, sequence, adapter, table, output_rows;
    const int64_t rows, vocabulary;

    Rows(const Model &m, int64_t rows) : hidden(rows * m.model.hidden), out(rows * m.model.hidden), logits(rows * m.model.head.out),
        positions(rows), sequence(rows),
          adapter(rows), table(3 * 10), output_rows(rows), rows(rows), vocabulary(m.model.head.out) {
        hidden.fill();
        for (int64_t i = 0; i < rows; i++) output_rows[i] = (int32_t)i, adapter[i] = i % 3 ? 0 : -1;
        for (int64_t i = 0; i < 30; i++) table[i] = (int32_t)(i * 7 % 30);
    }
    int step(const Model &m, void *pages, int64_t from, int64_t count) {
        const DecodeFactors *const adapters[] = {m.factors.data()};
        const DecodeStep s{hidden.data() + from * m.model.hidden, positions.data() + from, sequence.data() + from, adapter.data() + from,
            table.data(), output_rows.data(),
                           adapters, pages, out.data() + from * m.model.hidden, logits.data() + from * vocabulary, count, 3, 10, count, 1, 30};
        return dw_decode(&m.model, &s);
    }
};

template <class T>
void test_company(int type, int64_t split, bool parallel, int64_t heads, int64_t key_heads, int64_t size, int64_t hidden, int64_t inner) {
    const std::string what = "a decoder's step, type " + std::to_string(type) + ", split " + std::to_string(split);
    const Model m(type, 2, split, heads, key_heads, size, hidden, inner, parallel);
    const int64_t counts[] = {290, 33, 3}, rows = 326;
    Rows together(m, rows), alone(m, rows);
    alone.hidden.copy(together.hidden);
    Buffer<T> one(30 * m.model.page_numbers), two(30 * m.model.page_numbers);  // initialized with NaN
    for (int64_t s = 0, i = 0; s < 3; s++)
        for (int64_t p = 0; p < counts[s]; p++, i++)
            for (Rows *r : {&together, &alone}) r->sequence[i] = (int32_t)s, r->positions[i] = (int32_t)p;
    expect(together.step(m, one.data(), 0, rows) == 0, what);
    bool fine = true;
    for (int64_t i = 0, n; i < rows; i += n) {
        n = std::min<int64_t>(1 + i % 5, rows - i);
        fine = fine && alone.step(m, two.data(), i, n) == 0;
    }
    expect(fine, what + " in small parts");
    expect(together.logits.same(alone.logits) && together.out.same(alone.out), what + ": the same bits alone");
    bool finite = true;
    for (double x : together.logits.numbers()) finite = finite && std::isfinite(x);
    expect(finite, what + ": numbers");
}

void test_head(int type) {
    const Model m(type, 0, SEPARATE, 1, 1, 4, deltaw::stored_in_blocks(type) ? 512 : 51, 4, false);
    Rows r(m, 9);
    Buffer<float> pages(1);
    for (int64_t i = 0; i < 9; i++) r.sequence[i] = 0, r.positions[i] = (int32_t)i;
    expect(r.step(m, pages.data(), 0, 9) == 0, "a head");
    const DecodeLinear &l = m.model.head;
    const DecodeFactors &f = m.factors.back();
    auto number = [&](const void *p, int64_t i, int of) {
        if (deltaw::stored_in_blocks(of)) return to_double(from_double<bf16>(m.stored.back()->value(i / l.in, i % l.in)));
        return of == 0 ? (double)((const float *)p)[i] : of == 1 ? to_double(((const bf16 *)p)[i]) : (double)((const int8_t *)p)[i];
    };
    Numbers expected(9 * l.out);
    for (int64_t i = 0; i < 9; i++)
        for (int64_t n = 0; n < l.out; n++) {
            double y = l.bias[n];
            for (int64_t k = 0; k < l.in; k++)
                y += r.out.at(i * l.in + k) * number(l.weight, n * l.in + k, type) * (type == 2 ? (double)l.scale[n] * l.columns[k] : 1.0);
            for (int64_t j = 0; r.adapter[i] >= 0 && j < f.rank; j++) {
                double h = 0;
                for (int64_t k = 0; k < l.in; k++) h += r.out.at(i * l.in + k) * number(f.A, j * l.in + k, type ? 1 : 0);
                const int64_t each = type ? 2 : 1, word = (n / FACTOR_PANEL * ((f.rank + each - 1) / each) + j / each) * FACTOR_PANEL +
                    n % FACTOR_PANEL;
                y += h * number(f.B, word * each + j % each, type ? 1 : 0);
            }
            expected[i * l.out + n] = 0.5 * y;
        }
    expect_close(r.logits.numbers(), expected, type == 0 ? 1e-6 : 1e-2, "a head with an update, type " + std::to_string(type));
}

void test_refusals() {
    const Model m(0, 1, SEPARATE, 2, 1, 8, 24, 16, false);
    Buffer<float> pages(30 * m.model.page_numbers);
    auto refused = [&](auto &&change) {
        Rows r(m, 2);
        for (int64_t i = 0; i < 2; i++) r.sequence[i] = 1, r.positions[i] = (int32_t)i;
        expect(r.step(m, pages.data(), 0, 2) == 0, "a step");
        change(r);
        expect(r.step(m, pages.data(), 0, 2) == 2, "what lies outside is refused");
    };
    refused([](Rows &r) { r.positions[1] = 320; });
    refused([](Rows &r) { r.positions[1] = -1; });
    refused([](Rows &r) { r.sequence[0] = 3; });
    refused([](Rows &r) { r.adapter[1] = 1; });
    refused([](Rows &r) { r.table[10] = 30; });
    refused([](Rows &r) { r.output_rows[1] = 2; });
}

}  // namespace

void test_decode() {
    for (int type = 0; type < 3; type++) {
        test_head(type);
        if (type == 0) test_company<float>(type, SEPARATE, false, 6, 2, 12, 40, 37);
        else test_company<bf16>(type, SEPARATE, false, 6, 2, 12, 40, 37);
    }
    test_company<float>(0, STACKED, false, 3, 3, 20, 33, 70);
    test_company<bf16>(2, GROUPED, true, 18, 1, 8, 64, 29);
    for (int type = deltaw::Q4_0; type <= deltaw::NF4; type++) {
        test_head(type);
        test_company<bf16>(type, type % 2 ? SEPARATE : STACKED, false, 4, 2, 64, 256, 512);
    }
    test_company<bf16>(1, STACKED, false, 2, 1, 7, 33, 18);  // odd head size
    test_refusals();
}
