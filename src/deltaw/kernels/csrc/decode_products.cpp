#include "decode_products.h"

#include "activations.h"
#include "decode_dots.h"

namespace deltaw {

namespace {

const int64_t BLOCK = 16;                  // columns that stay together
const int64_t MOST_COLUMNS = 128, ROWS_AT_ONCE = 128;
const int64_t CHUNK_BYTES = 96 << 10;      // of a weight, which stay in the second-level cache while all rows pass

const int64_t UNITS_OF_EACH = 4;           // that a phase has for each thread, about

int64_t bytes_of(int64_t type) { return type == F32 ? 4 : type == BF16 ? 2 : 1; }

int64_t chunk_columns(const DecodeLinear &layer) {
    int64_t columns = MOST_COLUMNS;
    while (columns > BLOCK && columns * layer.in * bytes_of(layer.type) > CHUNK_BYTES) columns /= 2;
    return columns;
}

const DecodeFactors *factors_of(const Group &group, const Part &part) {
    const DecodeFactors &found = group.factors[part.number];
    return found.rank ? &found : nullptr;
}

// ---- the wide half of an update --------------------------------------------------------------------------------
#if defined(__AVX512F__)
const int UPDATE_VECS = 2;
#else
const int UPDATE_VECS = 1;
#endif

// tile rows += h rows · panel, for 16·VECS columns; a row's sum is made from its first term on.
template <class T, int ROWS, int VECS>
void add_update(float *const *tile, const float *const *h, const T *panel, int64_t rank) {
    F16 sum[ROWS][VECS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) sum[r][v] = load16(tile[r] + 16 * v);
    for (int64_t k = 0; k < rank; k++) {
        F16 b[VECS];
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) b[v] = load16(panel + k * FACTOR_PANEL + 16 * v);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const F16 a = set_f(h[r][k]);
#pragma GCC unroll 2
            for (int v = 0; v < VECS; v++) sum[r][v] = fma(a, b[v], sum[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECS; v++) store16(tile[r] + 16 * v, sum[r][v]);
}

template <class T, int VECS>
void add_update_to(float *const *tile, const float *const *h, int64_t rows, const T *panel, int64_t rank) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_update<T, 4, VECS>(tile + r, h + r, panel, rank);
    if (rows - r >= 2) add_update<T, 2, VECS>(tile + r, h + r, panel, rank), r += 2;
    if (rows > r) add_update<T, 1, VECS>(tile + r, h + r, panel, rank);
}

// Sixteen columns that two panels share become a panel of their own, piece by piece.
template <class T>
void add_across(float *const *tile, const float *const *h, int64_t rows, const T *B, int64_t rank, int64_t column, int64_t columns) {
    const int64_t AT_ONCE = 32;
    T piece[AT_ONCE * FACTOR_PANEL] = {};
    const float *shifted[ROWS_AT_ONCE];
    for (int64_t k0 = 0; k0 < rank; k0 += AT_ONCE) {
        const int64_t n = std::min(AT_ONCE, rank - k0);
        for (int64_t k = 0; k < n; k++)
            for (int64_t j = 0; j < std::min<int64_t>(16, columns - column); j++)
                piece[k * FACTOR_PANEL + j] = B[((column + j) / FACTOR_PANEL * rank + k0 + k) * FACTOR_PANEL + (column + j) % FACTOR_PANEL];
        for (int64_t r = 0; r < rows; r++) shifted[r] = h[r] + k0;
        add_update_to<T, 1>(tile, shifted, rows, piece, n);
    }
}

template <class T>
void update_columns(float *const *tile, const float *const *h, int64_t rows, const DecodeFactors &f, int64_t column, int64_t end, int64_t columns) {
    const T *const B = (const T *)f.B;
    float *at[ROWS_AT_ONCE];
    for (int64_t c = column; c < end;) {
        const int64_t panel = c / FACTOR_PANEL, within = c % FACTOR_PANEL;
        for (int64_t r = 0; r < rows; r++) at[r] = tile[r] + (c - column);
        const T *const from = B + panel * f.rank * FACTOR_PANEL + within;
        if (within + 16 > FACTOR_PANEL) add_across(at, h, rows, B, f.rank, c, columns), c += 16;
        else if (c + 16 * UPDATE_VECS <= end && within + 16 * UPDATE_VECS <= FACTOR_PANEL) add_update_to<T, UPDATE_VECS>(at, h, rows, from, f.rank), c += 16 * UPDATE_VECS;
        else add_update_to<T, 1>(at, h, rows, from, f.rank), c += 16;
    }
}

// ---- a tile of sums --------------------------------------------------------------------------------------------
struct Tile {  // rows m … of a part, columns c … from its first
    float *at;
    int64_t m, rows, c, columns;
    float *row(int64_t r) const { return at + r * MOST_COLUMNS; }
};

// Meanwhile `ahead` columns are asked for, which begin `distance` columns after the tile's first.
void raw_sums(const Inputs &inputs, const Part &part, const Tile &t, int64_t distance, int64_t ahead) {
    const DecodeLinear &layer = *part.layer;
    with_dot(layer.type, [&](auto dot) {
        typedef decltype(dot) Dot;
        typedef typename Dot::Right Right;
        const Inputs::Form &form = inputs.of(part.input);
        const typename Dot::Left *x[ROWS_AT_ONCE];
        for (int64_t r = 0; r < t.rows; r++) x[r] = (const typename Dot::Left *)(form.data + (t.m + r) * form.stride);
        const Right *const w = (const Right *)layer.weight + (part.first + t.c) * layer.in;
        const int64_t bytes = ahead * layer.in * (int64_t)sizeof(Right);
        all_dots<Dot>(x, t.rows, w, layer.in, layer.in, t.columns, t.at, MOST_COLUMNS, (const char *)(w + distance * layer.in), bytes);
    });
}

// Raw sums become the layer's outputs.
void settle(const Inputs &inputs, const Part &part, const Tile &t, const Updates &updates, const float *h) {
    const DecodeLinear &layer = *part.layer;
    const int64_t column = part.first + t.c;
    const bool whole = layer.type == INT8;
    const float *const scales = inputs.of(part.input).scales + t.m;
    for (int64_t c = 0; c < t.columns; c += 16) {
        const int64_t n = column + c;
        const First mask = first(t.columns - c);
        const F16 bias = layer.bias ? load16(layer.bias + n, mask) : zero_f();
        const F16 scale = whole ? load16(layer.scale + n, mask) : zero_f();
        const I16 shift = whole && DotInt8::OFFSET ? load_i(layer.sums + n, mask) * set_i(-DotInt8::OFFSET) : zero_i();
        if (!whole && !layer.bias) continue;
        for (int64_t r = 0; r < t.rows; r++) {
            float *const at = t.row(r) + c;
            if (whole) store16(at, fma(to_f(load_i(at) + shift) * scale, set_f(scales[r]), bias));
            else store16(at, load16(at) + bias);
        }
    }
    for (int64_t g = 0; g < updates.count; g++) {
        const Group &group = updates.groups[g];
        const DecodeFactors *const f = factors_of(group, part);
        if (!f) continue;
        float *rows[ROWS_AT_ONCE];
        const float *narrow[ROWS_AT_ONCE];
        int64_t count = 0;
        for (int64_t i = group.first; i < group.first + group.count; i++) {
            const int64_t m = updates.order[i];
            if (m < t.m || m >= t.m + t.rows) continue;
            rows[count] = t.row(m - t.m);
            narrow[count++] = h + (part.input * inputs.rows + m) * updates.most_rank;
        }
        if (!count) continue;
        if (layer.type == F32) update_columns<float>(rows, narrow, count, *f, column, column + t.columns, layer.out);
        else update_columns<bf16>(rows, narrow, count, *f, column, column + t.columns, layer.out);
    }
}

void finish(const Task &task, const Tile &one, const Tile &two) {
    for (int64_t r = 0; r < one.rows; r++) {
        float *const out = task.out + (one.m + r) * task.ld + one.c;
        for (int64_t c = 0; c < one.columns; c += 16) {
            const First mask = first(one.columns - c);
            F16 y = load16(one.row(r) + c);
            if (task.end == ADD) y = y + load16(out + c, mask);
            else if (task.end == ACTIVATE) {
                F16 f, slope;
                activate(task.activation, y, f, slope);
                y = task.second.layer ? f * load16(two.row(r) + c) : f;
            } else if (task.end == LOGITS) {
                y = y * set_f(task.scale);
                if (task.softcap > 0) y = set_f(task.softcap) * tanh_16(y / set_f(task.softcap));
            }
            store16(out + c, y, mask);
        }
    }
}

// Columns begin … end of a task.
void run_columns(const Task &task, int64_t begin, int64_t end, const Inputs &inputs, const Updates &updates, const float *h, float *room) {
    const int64_t columns = chunk_columns(*task.first.layer);
    for (int64_t c = begin; c < end; c += columns) {
        const int64_t n = std::min(columns, end - c), next = std::min(columns, end - c - n);
        for (int64_t m = 0; m < inputs.rows; m += ROWS_AT_ONCE) {
            const int64_t rows = std::min(ROWS_AT_ONCE, inputs.rows - m);
            const Tile one{room, m, rows, c, n}, two{room + ROWS_AT_ONCE * MOST_COLUMNS, m, rows, c, n};
            // Of many rows the first ones wait for a weight's bytes, so those of the next chunk are asked for meanwhile.
            const int64_t distance = inputs.rows <= DOT_ROWS ? BLOCK : n, ahead = m ? 0 : inputs.rows <= DOT_ROWS ? n : next;
            raw_sums(inputs, task.first, one, distance, ahead);
            settle(inputs, task.first, one, updates, h);
            if (task.second.layer) {
                raw_sums(inputs, task.second, two, distance, ahead);
                settle(inputs, task.second, two, updates, h);
            }
            finish(task, one, two);
        }
    }
}

}  // namespace

int64_t product_room() { return 2 * ROWS_AT_ONCE * MOST_COLUMNS; }

void products_of_phase(Crew &crew, const Task *tasks, int count, const Inputs &inputs, const Updates &updates, const float *h, float *room) {
    auto blocks = [](const Task &task) { return (task.columns + BLOCK - 1) / BLOCK; };
    int64_t all = 0;
    for (int i = 0; i < count; i++) all += blocks(tasks[i]);
    const int64_t units = std::max<int64_t>(1, std::min(all, UNITS_OF_EACH * crew.threads));
    crew.share(units, [&](int64_t unit) {
        const int64_t begin = all * unit / units, end = all * (unit + 1) / units;
        int64_t before = 0;
        for (int i = 0; i < count; i++) {
            const int64_t from = std::max<int64_t>(0, begin - before), to = std::min(blocks(tasks[i]), end - before);
            if (from < to) run_columns(tasks[i], from * BLOCK, std::min(tasks[i].columns, to * BLOCK), inputs, updates, h, room);
            before += blocks(tasks[i]);
        }
    });
}

bool any_update(const Inputs &inputs, const Updates &updates) {
    for (int64_t g = 0; g < updates.count; g++)
        for (int i = 0; i < inputs.count; i++)
            if (factors_of(updates.groups[g], inputs.parts[i])) return true;
    return false;
}

void narrow_products(Crew &crew, const Inputs &inputs, const Updates &updates, float *h) {
    const int64_t AT_ONCE = 8;  // rows of A
    int64_t all = 0;
    auto each = [&](auto &&body) {
        for (int64_t g = 0; g < updates.count; g++)
            for (int i = 0; i < inputs.count; i++) {
                const DecodeFactors *const f = factors_of(updates.groups[g], inputs.parts[i]);
                for (int64_t k = 0; f && k < f->rank; k += AT_ONCE) body(updates.groups[g], i, *f, k);
            }
    };
    each([&](const Group &, int, const DecodeFactors &, int64_t) { all++; });
    const int64_t units = std::min(all, UNITS_OF_EACH * crew.threads);
    auto some = [&](int64_t begin, int64_t end) {
        int64_t at = 0;
        each([&](const Group &group, int i, const DecodeFactors &f, int64_t k) {
        if (at++ < begin || at > end) return;
        const int64_t n = std::min(AT_ONCE, f.rank - k);
        const Inputs::Form &form = inputs.of_update(i);
        with_dot(form.type, [&](auto dot) {
            typedef decltype(dot) Dot;
            if constexpr (!Dot::WHOLE) {
                for (int64_t from = 0; from < group.count; from += DOT_ROWS) {
                    const int64_t rows = std::min<int64_t>(DOT_ROWS, group.count - from);
                    const typename Dot::Left *x[DOT_ROWS];
                    float sums[DOT_ROWS][AT_ONCE];
                    for (int64_t r = 0; r < rows; r++) x[r] = (const typename Dot::Left *)(form.data + updates.order[group.first + from + r] * form.stride);
                    const typename Dot::Right *const A = (const typename Dot::Right *)f.A + k * inputs.depth;
                    all_dots<Dot>(x, rows, A, inputs.depth, inputs.depth, n, sums[0], AT_ONCE, nullptr, 0);
                    for (int64_t r = 0; r < rows; r++)
                        memcpy(h + (i * inputs.rows + updates.order[group.first + from + r]) * updates.most_rank + k, sums[r], n * sizeof(float));
                }
            }
        });
        });
    };
    crew.share(units, [&](int64_t unit) { some(all * unit / units, all * (unit + 1) / units); });
}

}  // namespace deltaw
