#include "decode_products.h"

#include "activations.h"
#include "decode_blocks.h"
#include "decode_tiles.h"
#include "decode_words.h"

namespace deltaw {

namespace {

const int64_t BLOCK = 16;  // columns that are processed together
const int64_t MAX_COLUMNS = 128, ROW_TILE = 128;
const int64_t TILES_SIZE = 2 * ROW_TILE * MAX_COLUMNS;
const int64_t CHUNK_BYTES = 96 << 10;  // bytes of a weight that stay in the second-level cache while all rows are multiplied

const int64_t UNITS_PER_THREAD = 4;  // approximate number of work units per thread and phase

int64_t number_bytes(int64_t type) { return type == F32 ? 4 : type == BF16 ? 2 : 1; }

int64_t chunk_columns(const DecodeLinear &layer) {
    int64_t columns = MAX_COLUMNS;
    while (columns > BLOCK && columns * layer.in * number_bytes(multiplied_as(layer.type)) > CHUNK_BYTES) columns /= 2;
    return columns;
}

const DecodeFactors *find_factors(const Group &group, const Part &part) {
    const DecodeFactors &layer_factors = group.factors[part.number];
    return layer_factors.rank ? &layer_factors : nullptr;
}
int64_t factors_type(const DecodeLinear &layer) { return layer.type == F32 ? F32 : BF16; }

// ---- second half of an update: h · B ---------------------------------------------------------------------------
#if defined(__AVX512F__)
const int UPDATE_PANELS = 4;
#else
const int UPDATE_PANELS = 1;
#endif

int64_t panel_words(const DecodeLinear &layer, int64_t rank) { return words_of(factors_type(layer), rank) * FACTOR_PANEL; }

// tile rows += h rows · panels of `words` words per left row. A row's sum starts with its first term.
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
void add_panels_rows(float *const *tile, const char *const *h, int64_t rows, const char *panels, int64_t words) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_panels<Words, 4, PANELS>(tile + r, h + r, panels, words);
    if (rows - r == 3) add_panels<Words, 3, PANELS>(tile + r, h + r, panels, words);
    else if (rows - r == 2) add_panels<Words, 2, PANELS>(tile + r, h + r, panels, words);
    else if (rows > r) add_panels<Words, 1, PANELS>(tile + r, h + r, panels, words);
}

// Copy sixteen columns that span two panels to a separate panel, chunk by chunk.
template <class Words>
void add_split_panel(float *const *tile, const char *const *h, int64_t rows, const char *B, int64_t words, int64_t column, int64_t columns) {
    const int64_t WORD_TILE = 32, num_columns = std::min<int64_t>(16, columns - column);
    int32_t panel_copy[WORD_TILE * 16] = {};
    const char *shifted[ROW_TILE];
    for (int64_t k0 = 0; k0 < words; k0 += WORD_TILE) {
        const int64_t n = std::min(WORD_TILE, words - k0);
        for (int64_t k = 0; k < n; k++)
            for (int64_t j = 0; j < num_columns; j++)
                panel_copy[k * 16 + j] = word_at(B, ((column + j) / 16 * words + k0 + k) * 16 + (column + j) % 16);
        for (int64_t r = 0; r < rows; r++) shifted[r] = h[r] + 4 * k0;
        add_panels_rows<Words, 1>(tile, shifted, rows, (const char *)panel_copy, n);
    }
}

template <class Words>
void update_columns(float *const *tile, const char *const *h, int64_t rows, const char *B, int64_t words, int64_t column, int64_t end,
                    int64_t columns) {
    static_assert(FACTOR_PANEL == 16, "a panel is a vector wide");
    float *at[ROW_TILE];
    for (int64_t c = column; c < end;) {
        for (int64_t r = 0; r < rows; r++) at[r] = tile[r] + (c - column);
        const char *const panel = B + c / 16 * words * 64;
        if (c % 16) add_split_panel<Words>(at, h, rows, B, words, c, columns), c += 16;
        else if (c + 16 * UPDATE_PANELS <= end) add_panels_rows<Words, UPDATE_PANELS>(at, h, rows, panel, words), c += 16 * UPDATE_PANELS;
        else add_panels_rows<Words, 1>(at, h, rows, panel, words), c += 16;
    }
}

// ---- a tile of sums --------------------------------------------------------------------------------------------
struct Tile {  // rows m … and columns c … of a part
    float *at;
    int64_t m, rows, c, columns;
    float *row(int64_t r) const { return at + r * MAX_COLUMNS; }
};

// Prefetches the panels that a tile's updates read, while its sums are computed.
class PanelPrefetcher : public PrefetchSource {
  public:
    PanelPrefetcher(const Updates &updates, const Part &part, const Tile &t) : updates(updates), part(part), column(part.first + t.c),
        columns(t.columns) {
        for (int64_t g = 0; g < updates.count; g++)
            if (const DecodeFactors *const f = find_factors(updates.groups[g], part)) lines += group_bytes(*f) / 64;
    }
    void prefetch(int64_t count) override {
        for (; count > 0 && group < updates.count;) {
            const DecodeFactors *const f = find_factors(updates.groups[group], part);
            const int64_t bytes = f ? group_bytes(*f) : 0;
            const char *const from = f ? (const char *)f->B + column / FACTOR_PANEL * panel_words(*part.layer, f->rank) * 4 : nullptr;
            for (; count > 0 && prefetched < bytes; prefetched += 64, count--) __builtin_prefetch(from + prefetched, 0, 2);
            if (prefetched >= bytes) group++, prefetched = 0;
        }
    }

  private:
    const Updates &updates;
    const Part &part;
    const int64_t column, columns;
    int64_t group = 0, prefetched = 0;
    int64_t group_bytes(const DecodeFactors &f) const { return (columns + FACTOR_PANEL - 1) / FACTOR_PANEL * panel_words(*part.layer, f.rank) * 4; }
};

// Raw sums of a weight in blocks. `decoded` is a buffer for the decoded numbers of a chunk's columns.
void raw_block_sums(const Inputs &inputs, const Part &part, const Tile &t, PrefetchSource *other, bf16 *decoded) {
    const DecodeLinear &layer = *part.layer;
    const Inputs::Form &form = inputs.layer_input(part.input);
    const int64_t first = part.first + t.c;
    with_dot(BF16, [&](auto dot) {
        typedef decltype(dot) Dot;
        if constexpr (std::is_same<typename Dot::Right, bf16>::value)
            with_format((int)layer.type, [&](auto format) {
                const BlockRows<decltype(format)::value> w(layer.weight, layer.in);
                const typename Dot::Left *x[ROW_TILE];
                for (int64_t r = 0; r < t.rows; r++) x[r] = (const typename Dot::Left *)(form.data + (t.m + r) * form.stride);
                if (inputs.rows == 1) return dot_one_row<Dot>(x[0], w, first, layer.in, t.columns, t.at, other);
                write_numbers(w, first, t.columns, layer.in, decoded);
                all_dots<Dot>(x, t.rows, (const bf16 *)decoded, layer.in, layer.in, t.columns, t.at, MAX_COLUMNS, nullptr, 0, other);
            });
    });
}

#ifdef DW_AMX
// Raw sums with AMX tiles. If there are fewer than 16 columns, the tile is padded with zeros.
void raw_sums_in_tiles(const Inputs &inputs, const Part &part, const Tile &t, PrefetchSource *other, int64_t distance, int64_t prefetch_columns) {
    const int64_t depth = part.layer->in, full_columns = t.columns / BLOCK * BLOCK;
    const char *const data = inputs.layer_input(part.input).data;
    const bf16 *const w = (const bf16 *)part.layer->weight + (part.first + t.c) * depth;
    // Up to four tiles of columns are summed at a time, so those after them are prefetched.
    const char *const next = (const char *)(w + std::max<int64_t>(distance, 4 * BLOCK) * depth);
    tiles::all_sums(data, t.m, t.rows, w, depth, full_columns, t.at, MAX_COLUMNS, next, prefetch_columns * depth * 2, other);
    if (full_columns == t.columns) return;
    std::vector<bf16> last(BLOCK * depth);
    memcpy(last.data(), w + full_columns * depth, (t.columns - full_columns) * depth * 2);
    tiles::all_sums(data, t.m, t.rows, last.data(), depth, BLOCK, t.at + full_columns, MAX_COLUMNS, nullptr, 0, nullptr);
}
#endif

// Prefetches `prefetch_columns` columns, starting `distance` columns after the tile's first.
void raw_sums(const Inputs &inputs, const Part &part, const Tile &t, const Updates &updates, int64_t distance, int64_t prefetch_columns,
              bf16 *decoded) {
    const DecodeLinear &layer = *part.layer;
    PanelPrefetcher panels(updates, part, t);
    PrefetchSource *const other = panels.lines && !t.m ? &panels : nullptr;
    if (stored_in_blocks((int)layer.type)) return raw_block_sums(inputs, part, t, other, decoded);
#ifdef DW_AMX
    if (inputs.layer_input(part.input).type == TILED) return raw_sums_in_tiles(inputs, part, t, other, distance, prefetch_columns);
#endif
    with_dot(layer.type, [&](auto dot) {
        typedef decltype(dot) Dot;
        typedef typename Dot::Right Right;
        const Inputs::Form &form = inputs.layer_input(part.input);
        const typename Dot::Left *x[ROW_TILE];
        for (int64_t r = 0; r < t.rows; r++) x[r] = (const typename Dot::Left *)(form.data + (t.m + r) * form.stride);
        const Right *const w = (const Right *)layer.weight + (part.first + t.c) * layer.in;
        const int64_t bytes = prefetch_columns * layer.in * (int64_t)sizeof(Right);
        all_dots<Dot>(x, t.rows, w, layer.in, layer.in, t.columns, t.at, MAX_COLUMNS, (const char *)(w + distance * layer.in), bytes, other);
    });
}

// Convert raw sums to the layer's outputs.
void finish_sums(const Inputs &inputs, const Part &part, const Tile &t, const Updates &updates, const char *h) {
    const DecodeLinear &layer = *part.layer;
    const int64_t column = part.first + t.c;
    const bool is_int8 = layer.type == INT8;
    const float *const scales = inputs.layer_input(part.input).scales + t.m;
    for (int64_t c = 0; c < t.columns; c += 16) {
        const int64_t n = column + c;
        const First mask = first(t.columns - c);
        const F16 bias = layer.bias ? load16(layer.bias + n, mask) : zero_f();
        const F16 scale = is_int8 ? load16(layer.scale + n, mask) : zero_f();
        const I16 shift = is_int8 && DotInt8::OFFSET ? load_i(layer.sums + n, mask) * set_i(-DotInt8::OFFSET) : zero_i();
        if (!is_int8 && !layer.bias) continue;
        for (int64_t r = 0; r < t.rows; r++) {
            float *const at = t.row(r) + c;
            if (is_int8) store16(at, fma(to_f(load_i(at) + shift) * scale, set_f(scales[r]), bias));
            else store16(at, load16(at) + bias);
        }
    }
    for (int64_t g = 0; g < updates.count; g++) {
        const Group &group = updates.groups[g];
        const DecodeFactors *const f = find_factors(group, part);
        if (!f) continue;
        float *rows[ROW_TILE];
        const char *narrow[ROW_TILE];
        int64_t count = 0;
        for (int64_t i = group.first; i < group.first + group.count; i++) {
            const int64_t m = updates.order[i];
            if (m < t.m || m >= t.m + t.rows) continue;
            rows[count] = t.row(m - t.m);
            narrow[count++] = h + (part.input * inputs.rows + m) * updates.max_rank * 4;
        }
        if (!count) continue;
        const int64_t type = factors_type(layer);
        with_words(type, [&](auto words) {
            update_columns<decltype(words)>(rows, narrow, count, (const char *)f->B, words_of(type, f->rank), column, column + t.columns, layer.out);
        });
    }
}

void finish(const Task &task, const Tile &first_tile, const Tile &second_tile) {
    for (int64_t r = 0; r < first_tile.rows; r++) {
        float *const out = task.out + (first_tile.m + r) * task.ld + first_tile.c;
        for (int64_t c = 0; c < first_tile.columns; c += 16) {
            const First mask = first(first_tile.columns - c);
            F16 y = load16(first_tile.row(r) + c);
            if (task.end == ADD) y = y + load16(out + c, mask);
            else if (task.end == ACTIVATE) {
                F16 f, slope;
                activate(task.activation, y, f, slope);
                y = task.second.layer ? f * load16(second_tile.row(r) + c) : f;
            } else if (task.end == LOGITS) {
                y = y * set_f(task.scale);
                if (task.softcap > 0) y = set_f(task.softcap) * tanh_16(y / set_f(task.softcap));
            }
            store16(out + c, y, mask);
        }
    }
}

// Process columns begin … end of a task.
void run_columns(const Task &task, int64_t begin, int64_t end, const Inputs &inputs, const Updates &updates, const char *h, float *thread_scratch) {
    const int64_t columns = chunk_columns(*task.first.layer);
    bf16 *const numbers = (bf16 *)(thread_scratch + TILES_SIZE);
    for (int64_t c = begin; c < end; c += columns) {
        const int64_t n = std::min(columns, end - c), next = std::min(columns, end - c - n);
        for (int64_t m = 0; m < inputs.rows; m += ROW_TILE) {
            const int64_t rows = std::min(ROW_TILE, inputs.rows - m);
            const Tile first_tile{thread_scratch, m, rows, c, n}, second_tile{thread_scratch + ROW_TILE * MAX_COLUMNS, m, rows, c, n};
            // With several row tiles, the first one waits for the weight's bytes, so it prefetches those of the next
            // chunk.
            const int64_t distance = inputs.rows <= DOT_ROWS ? BLOCK : n, prefetch_columns = m ? 0 : inputs.rows <= DOT_ROWS ? n : next;
            raw_sums(inputs, task.first, first_tile, updates, distance, prefetch_columns, numbers);
            finish_sums(inputs, task.first, first_tile, updates, h);
            if (task.second.layer) {
                raw_sums(inputs, task.second, second_tile, updates, distance, prefetch_columns, numbers);
                finish_sums(inputs, task.second, second_tile, updates, h);
            }
            finish(task, first_tile, second_tile);
        }
    }
}

}  // namespace

int64_t product_scratch_size(const DecodeModel &model) {
    int64_t numbers = 0;
    bool blocks = false;
    auto add_layer = [&](const DecodeLinear &layer) {
        if (!layer.weight) return;
        numbers = std::max(numbers, chunk_columns(layer) * layer.in);
        blocks |= stored_in_blocks((int)layer.type);
    };
    for (int64_t i = 0; i < model.count; i++) {
        const DecodeBlock &b = model.blocks[i];
        for (const DecodeLinear *layer : {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down}) add_layer(*layer);
    }
    add_layer(model.head);
    return TILES_SIZE + (blocks ? (numbers + 1) / 2 : 0);
}

void run_tasks(Worker &worker, const Task *tasks, int count, const Inputs &inputs, const Updates &updates, const char *h, float *thread_scratch) {
    auto blocks = [](const Task &task) { return (task.columns + BLOCK - 1) / BLOCK; };
    int64_t all = 0;
    for (int i = 0; i < count; i++) all += blocks(tasks[i]);
    const int64_t units = std::max<int64_t>(1, std::min(all, UNITS_PER_THREAD * worker.threads));
    worker.run_loop(units, [&](int64_t unit) {
        const int64_t begin = all * unit / units, end = all * (unit + 1) / units;
        int64_t num_before = 0;
        for (int i = 0; i < count; i++) {
            const int64_t from = std::max<int64_t>(0, begin - num_before), to = std::min(blocks(tasks[i]), end - num_before);
            if (from < to) run_columns(tasks[i], from * BLOCK, std::min(tasks[i].columns, to * BLOCK), inputs, updates, h, thread_scratch);
            num_before += blocks(tasks[i]);
        }
    });
}

bool any_update(const Inputs &inputs, const Updates &updates) {
    for (int64_t g = 0; g < updates.count; g++)
        for (int i = 0; i < inputs.count; i++)
            if (find_factors(updates.groups[g], inputs.parts[i])) return true;
    return false;
}

namespace {

// Some rows of an A times the rows of its group.
const int64_t RANK_TILE = 8;
struct FirstProduct {
    const Group *group;
    const DecodeFactors *factors;
    int layer;
    int64_t k;
    int64_t count() const { return std::min(RANK_TILE, factors->rank - k); }
};

// Call body for each part of a phase's first products, in the memory order of an adapter's factors.
template <class Body>
void for_each_first_product(const Inputs &inputs, const Updates &updates, Body &&body) {
    for (int64_t g = 0; g < updates.count; g++)
        for (int i = 0; i < inputs.count; i++) {
            const DecodeFactors *const f = find_factors(updates.groups[g], inputs.parts[i]);
            for (int64_t k = 0; f && k < f->rank; k += RANK_TILE) body(FirstProduct{&updates.groups[g], f, i, k});
        }
}

// Prefetches the rows of `next` unless it is null.
void run_first_product(const Inputs &inputs, const Updates &updates, const FirstProduct &current, const FirstProduct *next, char *h) {
    const Inputs::Form &form = inputs.update_input(current.layer);
    const int64_t n = current.count();
    with_dot(form.type, [&](auto dot) {
        typedef decltype(dot) Dot;
        if constexpr (!Dot::IS_INTEGER) {
            typedef typename Dot::Right Right;
            const char *const prefetch_columns = next ? (const char *)((const Right *)next->factors->A + next->k * inputs.depth) : nullptr;
            for (int64_t from = 0; from < current.group->count; from += DOT_ROWS) {
                const int64_t rows = std::min<int64_t>(DOT_ROWS, current.group->count - from);
                const int64_t *const order = updates.order + current.group->first + from;
                const typename Dot::Left *x[DOT_ROWS];
                float sums[DOT_ROWS][16];
                for (int64_t r = 0; r < rows; r++) x[r] = (const typename Dot::Left *)(form.data + order[r] * form.stride);
                const Right *const A = (const Right *)current.factors->A + current.k * inputs.depth;
                const int64_t bytes = next && !from ? next->count() * inputs.depth * (int64_t)sizeof(Right) : 0;
                all_dots<Dot>(x, rows, A, inputs.depth, inputs.depth, n, sums[0], 16, prefetch_columns, bytes, nullptr);
                for (int64_t r = 0; r < rows; r++) {
                    char *const to = h + ((current.layer * inputs.rows + order[r]) * updates.max_rank + current.k / (form.type == F32 ? 1 : 2)) * 4;
                    write_words(form.type, sums[r], n, to);
                }
            }
        }
    });
}

}  // namespace

void first_products(Worker &worker, const Inputs &inputs, const Updates &updates, char *h) {
    int64_t all = 0;
    for_each_first_product(inputs, updates, [&](const FirstProduct &) { all++; });
    const int64_t units = std::min(all, UNITS_PER_THREAD * worker.threads);
    worker.run_loop(units, [&](int64_t unit) {
        const int64_t begin = all * unit / units, end = all * (unit + 1) / units;
        int64_t at = 0;
        FirstProduct last{};
        for_each_first_product(inputs, updates, [&](const FirstProduct &next) {
            const int64_t number = at++;
            if (number < begin || number > end) return;
            if (number > begin) run_first_product(inputs, updates, last, &next, h);
            last = next;
        });
        if (end == all) run_first_product(inputs, updates, last, nullptr, h);
    });
}

}  // namespace deltaw
