#include "decode_products.h"

#include "activations.h"
#include "decode_blocks.h"
#include "decode_tiles.h"
#include "decode_words.h"

namespace deltaw {

namespace {

const int64_t BLOCK = 16;                  // columns that stay together
const int64_t MOST_COLUMNS = 128, ROWS_AT_ONCE = 128;
const int64_t TILES_ROOM = 2 * ROWS_AT_ONCE * MOST_COLUMNS;
const int64_t CHUNK_BYTES = 96 << 10;      // of a weight, which stay in the second-level cache while all rows pass

const int64_t UNITS_OF_EACH = 4;           // that a phase has for each thread, about

int64_t bytes_of(int64_t type) { return type == F32 ? 4 : type == BF16 ? 2 : 1; }

int64_t chunk_columns(const DecodeLinear &layer) {
    int64_t columns = MOST_COLUMNS;
    while (columns > BLOCK && columns * layer.in * bytes_of(multiplied_as(layer.type)) > CHUNK_BYTES) columns /= 2;
    return columns;
}

const DecodeFactors *factors_of(const Group &group, const Part &part) {
    const DecodeFactors &found = group.factors[part.number];
    return found.rank ? &found : nullptr;
}
int64_t factors_type(const DecodeLinear &layer) { return layer.type == F32 ? F32 : BF16; }

// ---- the wide half of an update --------------------------------------------------------------------------------
#if defined(__AVX512F__)
const int UPDATE_PANELS = 4;
#else
const int UPDATE_PANELS = 1;
#endif

int64_t panel_words(const DecodeLinear &layer, int64_t rank) { return words_of(factors_type(layer), rank) * FACTOR_PANEL; }

// tile rows += h rows · panels, which are `words` words a row of the left side long; a row's sum is made from its first term on.
template <class Words, int ROWS, int PANELS>
__attribute__((noinline)) void add_panels(float *const *tile, const char *const *h, const char *panels, int64_t words) {
    F16 sum[ROWS][PANELS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) sum[r][p] = load16(tile[r] + 16 * p);
    for (int64_t k = 0; k < words; k++) {
        I16 b[PANELS];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) b[p] = load_i(panels + (p * words + k) * 64);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const I16 a = set_i(word_at(h[r], k));
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++) Words::add(sum[r][p], a, b[p]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) store16(tile[r] + 16 * p, sum[r][p]);
}

template <class Words, int PANELS>
void add_panels_to(float *const *tile, const char *const *h, int64_t rows, const char *panels, int64_t words) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_panels<Words, 4, PANELS>(tile + r, h + r, panels, words);
    if (rows - r == 3) add_panels<Words, 3, PANELS>(tile + r, h + r, panels, words);
    else if (rows - r == 2) add_panels<Words, 2, PANELS>(tile + r, h + r, panels, words);
    else if (rows > r) add_panels<Words, 1, PANELS>(tile + r, h + r, panels, words);
}

// Sixteen columns that two panels share become a panel of their own, piece by piece.
template <class Words>
void add_across(float *const *tile, const char *const *h, int64_t rows, const char *B, int64_t words, int64_t column, int64_t columns) {
    const int64_t AT_ONCE = 32, there = std::min<int64_t>(16, columns - column);
    int32_t piece[AT_ONCE * 16] = {};
    const char *shifted[ROWS_AT_ONCE];
    for (int64_t k0 = 0; k0 < words; k0 += AT_ONCE) {
        const int64_t n = std::min(AT_ONCE, words - k0);
        for (int64_t k = 0; k < n; k++)
            for (int64_t j = 0; j < there; j++) piece[k * 16 + j] = word_at(B, ((column + j) / 16 * words + k0 + k) * 16 + (column + j) % 16);
        for (int64_t r = 0; r < rows; r++) shifted[r] = h[r] + 4 * k0;
        add_panels_to<Words, 1>(tile, shifted, rows, (const char *)piece, n);
    }
}

template <class Words>
void update_columns(float *const *tile, const char *const *h, int64_t rows, const char *B, int64_t words, int64_t column, int64_t end, int64_t columns) {
    static_assert(FACTOR_PANEL == 16, "a panel is a vector wide");
    float *at[ROWS_AT_ONCE];
    for (int64_t c = column; c < end;) {
        for (int64_t r = 0; r < rows; r++) at[r] = tile[r] + (c - column);
        const char *const panel = B + c / 16 * words * 64;
        if (c % 16) add_across<Words>(at, h, rows, B, words, c, columns), c += 16;
        else if (c + 16 * UPDATE_PANELS <= end) add_panels_to<Words, UPDATE_PANELS>(at, h, rows, panel, words), c += 16 * UPDATE_PANELS;
        else add_panels_to<Words, 1>(at, h, rows, panel, words), c += 16;
    }
}

// ---- a tile of sums --------------------------------------------------------------------------------------------
struct Tile {  // rows m … of a part, columns c … from its first
    float *at;
    int64_t m, rows, c, columns;
    float *row(int64_t r) const { return at + r * MOST_COLUMNS; }
};

// The panels that a tile's updates read, which are asked for while its sums are made.
class PanelsAhead : public Ahead {
  public:
    PanelsAhead(const Updates &updates, const Part &part, const Tile &t) : updates(updates), part(part), column(part.first + t.c), columns(t.columns) {
        for (int64_t g = 0; g < updates.count; g++)
            if (const DecodeFactors *const f = factors_of(updates.groups[g], part)) lines += bytes_of_group(*f) / 64;
    }
    void ask(int64_t count) override {
        for (; count > 0 && group < updates.count;) {
            const DecodeFactors *const f = factors_of(updates.groups[group], part);
            const int64_t bytes = f ? bytes_of_group(*f) : 0;
            const char *const from = f ? (const char *)f->B + column / FACTOR_PANEL * panel_words(*part.layer, f->rank) * 4 : nullptr;
            for (; count > 0 && asked < bytes; asked += 64, count--) __builtin_prefetch(from + asked, 0, 2);
            if (asked >= bytes) group++, asked = 0;
        }
    }

  private:
    const Updates &updates;
    const Part &part;
    const int64_t column, columns;
    int64_t group = 0, asked = 0;
    int64_t bytes_of_group(const DecodeFactors &f) const { return (columns + FACTOR_PANEL - 1) / FACTOR_PANEL * panel_words(*part.layer, f.rank) * 4; }
};

// Sums of a weight in blocks; `room` is for the numbers of a chunk's columns.
void raw_sums_of_blocks(const Inputs &inputs, const Part &part, const Tile &t, Ahead *other, bf16 *room) {
    const DecodeLinear &layer = *part.layer;
    const Inputs::Form &form = inputs.of(part.input);
    const int64_t first = part.first + t.c;
    with_dot(BF16, [&](auto dot) {
        typedef decltype(dot) Dot;
        if constexpr (std::is_same<typename Dot::Right, bf16>::value)
            with_format((int)layer.type, [&](auto format) {
                const BlockRows<decltype(format)::value> w(layer.weight, layer.in);
                const typename Dot::Left *x[ROWS_AT_ONCE];
                for (int64_t r = 0; r < t.rows; r++) x[r] = (const typename Dot::Left *)(form.data + (t.m + r) * form.stride);
                if (inputs.rows == 1) return dots_of_one_row<Dot>(x[0], w, first, layer.in, t.columns, t.at, other);
                write_numbers(w, first, t.columns, layer.in, room);
                all_dots<Dot>(x, t.rows, (const bf16 *)room, layer.in, layer.in, t.columns, t.at, MOST_COLUMNS, nullptr, 0, other);
            });
    });
}

#ifdef DW_AMX
// Sums in tiles; of columns that are less than a tile's 16, the others of the tile are zeros.
void raw_sums_in_tiles(const Inputs &inputs, const Part &part, const Tile &t, Ahead *other, int64_t distance, int64_t ahead) {
    const int64_t depth = part.layer->in, whole = t.columns / BLOCK * BLOCK;
    const char *const data = inputs.of(part.input).data;
    const bf16 *const w = (const bf16 *)part.layer->weight + (part.first + t.c) * depth;
    // Up to four tiles of columns are summed at a time, and those behind them are asked for.
    const char *const next = (const char *)(w + std::max<int64_t>(distance, 4 * BLOCK) * depth);
    tiles::all_sums(data, t.m, t.rows, w, depth, whole, t.at, MOST_COLUMNS, next, ahead * depth * 2, other);
    if (whole == t.columns) return;
    std::vector<bf16> last(BLOCK * depth);
    memcpy(last.data(), w + whole * depth, (t.columns - whole) * depth * 2);
    tiles::all_sums(data, t.m, t.rows, last.data(), depth, BLOCK, t.at + whole, MOST_COLUMNS, nullptr, 0, nullptr);
}
#endif

// Meanwhile `ahead` columns are asked for, which begin `distance` columns after the tile's first.
void raw_sums(const Inputs &inputs, const Part &part, const Tile &t, const Updates &updates, int64_t distance, int64_t ahead, bf16 *room) {
    const DecodeLinear &layer = *part.layer;
    PanelsAhead panels(updates, part, t);
    Ahead *const other = panels.lines && !t.m ? &panels : nullptr;
    if (stored_in_blocks((int)layer.type)) return raw_sums_of_blocks(inputs, part, t, other, room);
#ifdef DW_AMX
    if (inputs.of(part.input).type == TILED) return raw_sums_in_tiles(inputs, part, t, other, distance, ahead);
#endif
    with_dot(layer.type, [&](auto dot) {
        typedef decltype(dot) Dot;
        typedef typename Dot::Right Right;
        const Inputs::Form &form = inputs.of(part.input);
        const typename Dot::Left *x[ROWS_AT_ONCE];
        for (int64_t r = 0; r < t.rows; r++) x[r] = (const typename Dot::Left *)(form.data + (t.m + r) * form.stride);
        const Right *const w = (const Right *)layer.weight + (part.first + t.c) * layer.in;
        const int64_t bytes = ahead * layer.in * (int64_t)sizeof(Right);
        all_dots<Dot>(x, t.rows, w, layer.in, layer.in, t.columns, t.at, MOST_COLUMNS, (const char *)(w + distance * layer.in), bytes, other);
    });
}

// Raw sums become the layer's outputs.
void settle(const Inputs &inputs, const Part &part, const Tile &t, const Updates &updates, const char *h) {
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
        const char *narrow[ROWS_AT_ONCE];
        int64_t count = 0;
        for (int64_t i = group.first; i < group.first + group.count; i++) {
            const int64_t m = updates.order[i];
            if (m < t.m || m >= t.m + t.rows) continue;
            rows[count] = t.row(m - t.m);
            narrow[count++] = h + (part.input * inputs.rows + m) * updates.most_rank * 4;
        }
        if (!count) continue;
        const int64_t type = factors_type(layer);
        with_words(type, [&](auto words) {
            update_columns<decltype(words)>(rows, narrow, count, (const char *)f->B, words_of(type, f->rank), column, column + t.columns, layer.out);
        });
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
void run_columns(const Task &task, int64_t begin, int64_t end, const Inputs &inputs, const Updates &updates, const char *h, float *room) {
    const int64_t columns = chunk_columns(*task.first.layer);
    bf16 *const numbers = (bf16 *)(room + TILES_ROOM);
    for (int64_t c = begin; c < end; c += columns) {
        const int64_t n = std::min(columns, end - c), next = std::min(columns, end - c - n);
        for (int64_t m = 0; m < inputs.rows; m += ROWS_AT_ONCE) {
            const int64_t rows = std::min(ROWS_AT_ONCE, inputs.rows - m);
            const Tile one{room, m, rows, c, n}, two{room + ROWS_AT_ONCE * MOST_COLUMNS, m, rows, c, n};
            // Of many rows the first ones wait for a weight's bytes, so those of the next chunk are asked for meanwhile.
            const int64_t distance = inputs.rows <= DOT_ROWS ? BLOCK : n, ahead = m ? 0 : inputs.rows <= DOT_ROWS ? n : next;
            raw_sums(inputs, task.first, one, updates, distance, ahead, numbers);
            settle(inputs, task.first, one, updates, h);
            if (task.second.layer) {
                raw_sums(inputs, task.second, two, updates, distance, ahead, numbers);
                settle(inputs, task.second, two, updates, h);
            }
            finish(task, one, two);
        }
    }
}

}  // namespace

int64_t product_room(const DecodeModel &model) {
    int64_t numbers = 0;
    bool blocks = false;
    auto look = [&](const DecodeLinear &layer) {
        if (!layer.weight) return;
        numbers = std::max(numbers, chunk_columns(layer) * layer.in);
        blocks |= stored_in_blocks((int)layer.type);
    };
    for (int64_t i = 0; i < model.count; i++) {
        const DecodeBlock &b = model.blocks[i];
        for (const DecodeLinear *layer : {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down}) look(*layer);
    }
    look(model.head);
    return TILES_ROOM + (blocks ? (numbers + 1) / 2 : 0);
}

void products_of_phase(Crew &crew, const Task *tasks, int count, const Inputs &inputs, const Updates &updates, const char *h, float *room) {
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

namespace {

// Some rows of an A times the rows of its group.
const int64_t RANKS_AT_ONCE = 8;
struct Narrow {
    const Group *group;
    const DecodeFactors *factors;
    int layer;
    int64_t k;
    int64_t count() const { return std::min(RANKS_AT_ONCE, factors->rank - k); }
};

// body of each part of a phase's narrow products, in the order in which memory holds an adapter's factors.
template <class Body>
void each_narrow(const Inputs &inputs, const Updates &updates, Body &&body) {
    for (int64_t g = 0; g < updates.count; g++)
        for (int i = 0; i < inputs.count; i++) {
            const DecodeFactors *const f = factors_of(updates.groups[g], inputs.parts[i]);
            for (int64_t k = 0; f && k < f->rank; k += RANKS_AT_ONCE) body(Narrow{&updates.groups[g], f, i, k});
        }
}

// Meanwhile the rows of `next` are asked for, if there are any.
void run_narrow(const Inputs &inputs, const Updates &updates, const Narrow &now, const Narrow *next, char *h) {
    const Inputs::Form &form = inputs.of_update(now.layer);
    const int64_t n = now.count();
    with_dot(form.type, [&](auto dot) {
        typedef decltype(dot) Dot;
        if constexpr (!Dot::WHOLE) {
            typedef typename Dot::Right Right;
            const char *const ahead = next ? (const char *)((const Right *)next->factors->A + next->k * inputs.depth) : nullptr;
            for (int64_t from = 0; from < now.group->count; from += DOT_ROWS) {
                const int64_t rows = std::min<int64_t>(DOT_ROWS, now.group->count - from);
                const int64_t *const order = updates.order + now.group->first + from;
                const typename Dot::Left *x[DOT_ROWS];
                float sums[DOT_ROWS][16];
                for (int64_t r = 0; r < rows; r++) x[r] = (const typename Dot::Left *)(form.data + order[r] * form.stride);
                const Right *const A = (const Right *)now.factors->A + now.k * inputs.depth;
                const int64_t bytes = next && !from ? next->count() * inputs.depth * (int64_t)sizeof(Right) : 0;
                all_dots<Dot>(x, rows, A, inputs.depth, inputs.depth, n, sums[0], 16, ahead, bytes, nullptr);
                for (int64_t r = 0; r < rows; r++) {
                    char *const to = h + ((now.layer * inputs.rows + order[r]) * updates.most_rank + now.k / (form.type == F32 ? 1 : 2)) * 4;
                    write_words(form.type, sums[r], n, to);
                }
            }
        }
    });
}

}  // namespace

void narrow_products(Crew &crew, const Inputs &inputs, const Updates &updates, char *h) {
    int64_t all = 0;
    each_narrow(inputs, updates, [&](const Narrow &) { all++; });
    const int64_t units = std::min(all, UNITS_OF_EACH * crew.threads);
    crew.share(units, [&](int64_t unit) {
        const int64_t begin = all * unit / units, end = all * (unit + 1) / units;
        int64_t at = 0;
        Narrow last{};
        each_narrow(inputs, updates, [&](const Narrow &next) {
            const int64_t number = at++;
            if (number < begin || number > end) return;
            if (number > begin) run_narrow(inputs, updates, last, &next, h);
            last = next;
        });
        if (end == all) run_narrow(inputs, updates, last, nullptr, h);
    });
}

}  // namespace deltaw
