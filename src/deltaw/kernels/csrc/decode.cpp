// One decoding step: rows of tokens through all blocks, final norm and head, in one parallel region whose workers run
// the same loops. Between products the loops are over rows, in products over columns, in attention over query groups.
#include <vector>

#include "decode_attention.h"
#include "decode_dots.h"
#include "kernels.h"
#include "scratch.h"
#include "status.h"

using namespace deltaw;

namespace {

const int MAX_LOOPS = 16;  // of a block, and of the final norm and head

// State shared by all workers. It is prepared before the parallel region, in which there are no allocations and no
// errors.
struct StepState {
    const DecodeModel &model;
    const DecodeStep &step;
    Updates updates;
    std::vector<QueryGroup> queries;  // groups no larger than the current block allows, see plan_queries
    float *x, *y, *qkv, *q, *attended, *inner, *partial;
    char *h, *first_inputs, *second_inputs;
    float *thread_scratch;  // scratch of each thread
    int64_t scratch_per_thread;

    StepState(const DecodeModel &model, const DecodeStep &step) : model(model), step(step) {}
};

// ---- one row ---------------------------------------------------------------------------------------------------

// y = norm of x. y can be x.
void norm_row(const RowNorm &norm, int64_t size, const float *x, float *y) {
    const float *const weight = (const float *)norm.weight, *const bias = (const float *)norm.bias;
    F16 sum = zero_f();
    float mean = 0;
    if (norm.centered) {
        for (int64_t d = 0; d < size; d += 16) sum = sum + load16(x + d, first(size - d));
        mean = sum_lanes(sum) / size;
    }
    const F16 mu = set_f(mean);
    sum = zero_f();
    for (int64_t d = 0; d < size; d += 16) {
        const First k = first(size - d);
        const F16 v = select_first(k, load16(x + d, k) - mu);
        sum = fma(v, v, sum);
    }
    const F16 by = set_f(1.0f / __builtin_sqrtf(sum_lanes(sum) / size + norm.eps)), shift = set_f(norm.offset);
    for (int64_t d = 0; d < size; d += 16) {
        const First k = first(size - d);
        F16 v = (load16(x + d, k) - mu) * by;
        if (weight) v = v * (load16(weight + d, k) + shift);
        if (bias) v = v + load16(bias + d, k);
        store16(y + d, v, k);
    }
}

// Rotate a head's first `rotary_dims` numbers in place.
void rotate_head(int64_t rotary_dims, float *x, const float *cosine, const float *sine) {
    const int64_t half = rotary_dims / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const First k = first(half - i);
        const F16 a = load16(x + i, k), b = load16(x + half + i, k);
        const F16 one = fnma(b, load16(sine + i, k), a * load16(cosine + i, k));
        const F16 two = fma(a, load16(sine + half + i, k), b * load16(cosine + half + i, k));
        store16(x + i, one, k);
        store16(x + half + i, two, k);
    }
}

// Offset of a head in a row of queries, keys and values.
int64_t head_offset(const DecodeBlock &b, int kind, int64_t head) {
    const int64_t group = b.group(), size = b.head_size;
    if (b.split != GROUPED) return (kind == 0 ? head : kind == 1 ? b.heads + head : b.heads + b.key_heads + head) * size;
    if (kind == 0) return (head / group * (group + 2) + head % group) * size;
    return (head * (group + 2) + group + kind - 1) * size;
}

// Apply norms and rotary positions to a row's queries and keys, and write keys and values to the cache.
void prepare_row(StepState &w, const DecodeBlock &b, int64_t m) {
    const int64_t size = b.head_size, width = b.query_size() + 2 * b.key_size(), position = w.step.positions[m];
    float *const row = w.qkv + m * width;
    const float *const cosine = b.rotary_dims ? w.model.cosines[b.table] + position * b.rotary_dims : nullptr;
    const float *const sine = b.rotary_dims ? w.model.sines[b.table] + position * b.rotary_dims : nullptr;
    for (int64_t head = 0; head < b.heads; head++) {
        float *const at = row + head_offset(b, 0, head), *const q = w.q + (m * b.heads + head) * size;
        if (b.query_norm.used) norm_row(b.query_norm, size, at, at);
        if (b.rotary_dims) rotate_head(b.rotary_dims, at, cosine, sine);
        for (int64_t d = 0; d < size; d += 16) store16(q + d, load16(at + d, first(size - d)) * set_f(b.scaling), first(size - d));
    }
    for (int64_t head = 0; head < b.key_heads; head++) {
        float *const key = row + head_offset(b, 1, head);
        if (b.key_norm.used) norm_row(b.key_norm, size, key, key);
        if (b.rotary_dims) rotate_head(b.rotary_dims, key, cosine, sine);
        write_cache(w.model, b, w.step, m, head, key, row + head_offset(b, 2, head));
    }
}

// Finish a half: apply norms and add y to the stream x, unless it has already been added.
void finish_row(const HalfNorms &norms, int64_t size, float *x, float *y) {
    if (norms.after.used) {
        norm_row(norms.after, size, y, y);
        for (int64_t d = 0; d < size; d += 16) store16(x + d, load16(x + d, first(size - d)) + load16(y + d, first(size - d)), first(size - d));
    }
    if (norms.post.used) norm_row(norms.post, size, x, x);
}

// ---- phases ----------------------------------------------------------------------------------------------------

template <class Body>
void for_each_row(Worker &worker, int64_t rows, Body &&body) {
    const int64_t units = std::min<int64_t>(rows, 4 * worker.threads);
    worker.run_loop(units, [&](int64_t unit) {
        for (int64_t m = rows * unit / units; m < rows * (unit + 1) / units; m++) body(m);
    });
}

// Write the normed row that a half's layers read.
void write_normed(const StepState &w, const RowNorm &norm, const Inputs &inputs, int64_t m, float *thread_scratch) {
    const float *const x = w.x + m * w.model.hidden;
    if (norm.used) norm_row(norm, w.model.hidden, x, thread_scratch);
    inputs.write(m, norm.used ? thread_scratch : x);
}

void run_products(StepState &w, Worker &worker, const Inputs &inputs, const Task *tasks, int count, float *thread_scratch) {
    if (any_update(inputs, w.updates)) first_products(worker, inputs, w.updates, w.h);
    run_tasks(worker, tasks, count, inputs, w.updates, w.h, thread_scratch);
}

// Run the last layer of a half. Adds to the stream, or writes to y if a norm follows.
void run_output_layer(StepState &w, Worker &worker, const Inputs &inputs, bool adds_to_stream, float *thread_scratch) {
    const Task task{inputs.parts[0], Part(), w.model.hidden, adds_to_stream ? ADD : STORE, adds_to_stream ? w.x : w.y, w.model.hidden};
    run_products(w, worker, inputs, &task, 1, thread_scratch);
}

struct BlockLayers {  // layers of a block's phases
    Part first[MAX_LAYERS], output, second[2], down;
    int first_count, second_count;

    BlockLayers(const DecodeBlock &b, int64_t number) {
        const int64_t at = number * LAYERS_PER_BLOCK;
        const DecodeLinear *const layers[] = {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down};
        auto part = [&](int i) { return Part{layers[i], at + i, 0, 0}; };
        first_count = b.split == SEPARATE ? 3 : 1;
        for (int i = 0; i < first_count; i++) first[i] = part(i);
        output = part(3), second[0] = part(4), second[1] = part(5), down = part(6);
        second_count = b.up.weight ? 2 : 1;
    }
};

void attention_half(StepState &w, Worker &worker, const DecodeBlock &b, const Inputs &inputs, const Inputs &outputs, float *thread_scratch) {
    const int64_t rows = w.step.rows, width = b.query_size() + 2 * b.key_size();
    Task tasks[MAX_LAYERS];
    int64_t column = 0;
    for (int i = 0; i < inputs.count; i++) {
        tasks[i] = Task{inputs.parts[i], Part(), inputs.parts[i].layer->out, STORE, w.qkv + column, width};
        column += inputs.parts[i].layer->out;
    }
    run_products(w, worker, inputs, tasks, inputs.count, thread_scratch);
    for_each_row(worker, rows, [&](int64_t m) { prepare_row(w, b, m); });
    const Attention a{&w.model, &b, &w.step, w.queries.data(), (int64_t)w.queries.size(), w.q, w.attended, w.partial};
    attend(worker, a, thread_scratch);
    for_each_row(worker, rows, [&](int64_t m) {
        if (w.partial) merge_ranges(a, m);
        outputs.write(m, w.attended + m * b.query_size());
    });
    run_output_layer(w, worker, outputs, !b.first.after.used, thread_scratch);
}

void mlp_half(StepState &w, Worker &worker, const DecodeBlock &b, const Inputs &inputs, const Inputs &outputs, float *thread_scratch) {
    Task task{inputs.parts[0], Part(), b.inner(), ACTIVATE, w.inner, b.inner(), (int)b.activation};
    if (b.up.weight) task.second = inputs.parts[1];
    else if (b.gated) task.second = inputs.parts[0], task.second.first = b.inner();
    run_products(w, worker, inputs, &task, 1, thread_scratch);
    for_each_row(worker, w.step.rows, [&](int64_t m) { outputs.write(m, w.inner + m * b.inner()); });
    run_output_layer(w, worker, outputs, !b.second.after.used, thread_scratch);
}

void run_block(StepState &w, Worker &worker, int64_t number, float *thread_scratch) {
    const DecodeBlock &b = w.model.blocks[number];
    const int64_t rows = w.step.rows, size = w.model.hidden;
    const bool updates = w.updates.count > 0;
    const BlockLayers p(b, number);
    const Inputs first(w.first_inputs, rows, p.first, p.first_count, updates), output(w.first_inputs, rows, &p.output, 1, updates);
    const Inputs second(w.second_inputs, rows, p.second, p.second_count, updates), down(w.second_inputs, rows, &p.down, 1, updates);
    for_each_row(worker, rows, [&](int64_t m) {
        write_normed(w, b.first.before, first, m, thread_scratch);
        if (b.parallel) write_normed(w, b.second.before, second, m, thread_scratch);
    });
    attention_half(w, worker, b, first, output, thread_scratch);
    if (!b.parallel)
        for_each_row(worker, rows, [&](int64_t m) {
            finish_row(b.first, size, w.x + m * size, w.y + m * size);
            write_normed(w, b.second.before, second, m, thread_scratch);
        });
    mlp_half(w, worker, b, second, down, thread_scratch);
    if (b.second.after.used || b.second.post.used)
        for_each_row(worker, rows, [&](int64_t m) { finish_row(b.second, size, w.x + m * size, w.y + m * size); });
}

// Move the output rows to the front, which the updates' groups refer to.
void run_head(StepState &w, const Updates &updates, Worker &worker, float *thread_scratch) {
    const int64_t rows = w.step.output_count, size = w.model.hidden;
    const Part part{&w.model.head, w.model.count * LAYERS_PER_BLOCK, 0, 0};
    const Inputs inputs(w.first_inputs, rows, &part, 1, updates.count > 0);
    for_each_row(worker, rows, [&](int64_t m) {
        const float *const x = w.x + w.step.output_rows[m] * size;
        float *const out = w.step.out + m * size;
        if (w.model.final_norm.used) norm_row(w.model.final_norm, size, x, out);
        else memcpy(out, x, size * sizeof(float));
        inputs.write(m, out);
    });
    if (any_update(inputs, updates)) first_products(worker, inputs, updates, w.h);
    const Task task{inputs.parts[0], Part(), w.model.head.out, LOGITS, w.step.logits, w.model.head.out, 0, w.model.logits_scale,
        w.model.logits_softcap};
    run_tasks(worker, &task, 1, inputs, updates, w.h, thread_scratch);
}

// ---- preparation -----------------------------------------------------------------------------------------------

void check_step(const DecodeModel &model, const DecodeStep &step) {
    int64_t window = model.count ? 1 : 0;  // the largest of all blocks; 0 is unlimited
    for (int64_t b = 0; b < model.count; b++) window = window && model.blocks[b].window > 0 ? std::max(window, model.blocks[b].window) : 0;
    for (int64_t m = 0; m < step.rows; m++) {
        const int64_t position = step.positions[m], sequence = step.sequence[m];
        require_in_bounds(position >= 0 && position < model.positions && position / PAGE_TOKENS < step.pages_per_sequence);
        require_in_bounds(sequence >= 0 && sequence < step.sequences && step.adapter[m] >= -1 && step.adapter[m] < step.adapter_count);
        const int64_t from = window ? std::max<int64_t>(0, position - window + 1) : 0;
        for (int64_t p = from / PAGE_TOKENS; p <= position / PAGE_TOKENS; p++) {
            const int64_t page = step.page_table[sequence * step.pages_per_sequence + p];
            require_in_bounds(page >= 0 && page < step.page_count);
        }
    }
    for (int64_t k = 0; k < step.output_count; k++) require_in_bounds(step.output_rows[k] >= 0 && step.output_rows[k] < step.rows);
}

struct RowsByAdapter {  // rows sorted by adapter
    std::vector<Group> groups;
    std::vector<int64_t> order;

    // adapter_of(m): adapter of row m.
    template <class AdapterOf>
    RowsByAdapter(const DecodeStep &step, int64_t rows, AdapterOf &&adapter_of) {
        for (int64_t a = 0; a < step.adapter_count; a++) {
            const int64_t begin = (int64_t)order.size();
            for (int64_t m = 0; m < rows; m++)
                if (adapter_of(m) == a) order.push_back(m);
            if ((int64_t)order.size() > begin) groups.push_back({step.adapters[a], begin, (int64_t)order.size() - begin});
        }
    }
    Updates updates(int64_t max_rank) const { return {groups.data(), order.data(), (int64_t)groups.size(), max_rank}; }
};

int64_t highest_rank(const DecodeModel &model, const DecodeStep &step) {
    int64_t maximum = 0;
    for (int64_t a = 0; a < step.adapter_count; a++)
        for (int64_t i = 0; i <= model.count * LAYERS_PER_BLOCK; i++) maximum = std::max(maximum, step.adapters[a][i].rank);
    return (maximum + 15) / 16 * 16;
}

// Group consecutive rows of a sequence that share loads of keys and have the same context ranges.
std::vector<QueryGroup> plan_queries(const DecodeStep &step, int64_t max_group_rows_limit) {
    std::vector<QueryGroup> result;
    for (int64_t m = 0; m < step.rows; m++) {
        if (!result.empty()) {
            QueryGroup &last = result.back();
            const int64_t n = last.count, last_row = last.first + n - 1;
            if (n < max_group_rows_limit && step.sequence[last_row] == step.sequence[m] && step.positions[last_row] + 1 == step.positions[m] &&
                range_tokens(step.positions[last.first]) == range_tokens(step.positions[m])) {
                last.count++;
                continue;
            }
        }
        result.push_back({m, 1});
    }
    return result;
}

struct MaxSizes {  // in numbers per row
    int64_t qkv = 0, wide = 0, inner = 0, heads = 0, head_size = 0, units = 0, inputs = 0, max_group_rows_limit = MAX_QUERIES;

    explicit MaxSizes(const DecodeModel &model) {
        inputs = model.hidden;
        for (int64_t i = 0; i < model.count; i++) {
            const DecodeBlock &b = model.blocks[i];
            qkv = std::max(qkv, b.query_size() + 2 * b.key_size()), wide = std::max(wide, b.query_size()), inner = std::max(inner, b.inner());
            heads = std::max(heads, b.heads), head_size = std::max(head_size, b.head_size), units = std::max(units, b.key_heads * head_slices(b));
            max_group_rows_limit = std::min(max_group_rows_limit, max_group_rows(b));
        }
        inputs = std::max({inputs, wide, inner});
    }
};

// True if contexts are split into ranges, because there are fewer work units than threads need.
bool splits_contexts(const StepState &w, const MaxSizes &sizes) {
    const int64_t threads = thread_count();
    int64_t longest = 0;
    for (int64_t m = 0; m < w.step.rows; m++) longest = std::max<int64_t>(longest, w.step.positions[m]);
    return threads > 1 && longest >= STRETCH && (int64_t)w.queries.size() * sizes.units < 2 * threads;
}
int64_t partial_numbers(int64_t rows, const MaxSizes &sizes) { return rows * sizes.heads * (MAX_RANGES + 1) * (2 + sizes.head_size); }

// Call body(worker, scratch of the thread) on all threads.
template <class Body>
void on_workers(std::vector<ParallelLoop> &loops, float *scratch, int64_t scratch_per_thread, const Body &body) {
    struct Job {
        const Body *body;
        ParallelLoop *loops;
        int threads;
        float *scratch;
        int64_t scratch_per_thread;
    } job{&body, loops.data(), (int)thread_count(), scratch, scratch_per_thread};
    auto part = [](void *data, int thread) {
        const Job *const job = static_cast<Job *>(data);
        Worker worker(job->loops, job->threads);
        (*job->body)(worker, job->scratch + thread * job->scratch_per_thread);
    };
    if (job.threads == 1) part(&job, 0);
    else run_on_threads(part, &job, job.threads);
}

}  // namespace

// Run a step; see decode.h. Writes the rows' keys and values to their pages.
int dw_decode(const DecodeModel *model, const DecodeStep *step) {
    return guarded([&] {
        if (model->page_tokens != PAGE_TOKENS) throw Failure{FAILED};
        check_step(*model, *step);
        if (!step->rows) return;
        const int64_t rows = step->rows;
        const MaxSizes max_sizes(*model);
        const RowsByAdapter row_adapters(*step, rows, [&](int64_t m) { return step->adapter[m]; });
        const RowsByAdapter output_adapters(*step, step->output_count, [&](int64_t m) { return step->adapter[step->output_rows[m]]; });
        const int64_t rank = row_adapters.groups.empty() ? 0 : highest_rank(*model, *step);
        std::vector<ParallelLoop> loops(MAX_LOOPS * (model->count + 1));
        Scratch scratch;
        StepState w(*model, *step);
        w.updates = row_adapters.updates(rank);
        w.queries = plan_queries(*step, max_sizes.max_group_rows_limit);
        w.x = scratch.take<float>(rows * model->hidden), w.y = scratch.take<float>(rows * model->hidden);
        w.qkv = scratch.take<float>(rows * max_sizes.qkv), w.q = scratch.take<float>(rows * max_sizes.wide);
        w.attended = scratch.take<float>(rows * max_sizes.wide), w.inner = scratch.take<float>(rows * max_sizes.inner);
        w.h = scratch.take(MAX_LAYERS * std::max(rows, step->output_count) * rank * 4);
        w.first_inputs = scratch.take(Inputs::bytes(std::max(rows, step->output_count), max_sizes.inputs));
        w.second_inputs = scratch.take(Inputs::bytes(rows, max_sizes.inputs));
        w.partial = splits_contexts(w, max_sizes) ? scratch.take<float>(partial_numbers(rows, max_sizes)) : nullptr;
        w.scratch_per_thread = (std::max({product_scratch_size(*model), attention_scratch_size(*model), model->hidden}) + 15) / 16 * 16;
        w.thread_scratch = scratch.take<float>(thread_count() * w.scratch_per_thread);
        memcpy(w.x, step->hidden, rows * model->hidden * sizeof(float));
        const Updates head_updates = output_adapters.updates(rank);
        on_workers(loops, w.thread_scratch, w.scratch_per_thread, [&](Worker &worker, float *thread_scratch) {
            for (int64_t b = 0; b < w.model.count; b++) run_block(w, worker, b, thread_scratch);
            run_head(w, head_updates, worker, thread_scratch);
        });
    });
}

// Write the keys and values (rows, key heads, head size) of a step to their pages, and attend with queries (rows, heads,
// head size) that are multiplied by the scaling. `out` has the shape of the queries. The model has one block, of which
// the layers are unused.
int dw_decode_attention(const DecodeModel *model, const DecodeStep *step, const float *query, const float *key, const float *value, float *out) {
    return guarded([&] {
        if (model->page_tokens != PAGE_TOKENS || model->count != 1) throw Failure{FAILED};
        check_step(*model, *step);
        if (!step->rows) return;
        const DecodeBlock &b = model->blocks[0];
        const MaxSizes sizes(*model);
        std::vector<ParallelLoop> loops(3);
        Scratch scratch;
        StepState w(*model, *step);
        w.queries = plan_queries(*step, sizes.max_group_rows_limit);
        float *const partial = splits_contexts(w, sizes) ? scratch.take<float>(partial_numbers(step->rows, sizes)) : nullptr;
        const int64_t scratch_per_thread = (attention_scratch_size(*model) + 15) / 16 * 16;
        float *const thread_scratch = scratch.take<float>(thread_count() * scratch_per_thread);
        const Attention a{model, &b, step, w.queries.data(), (int64_t)w.queries.size(), query, out, partial};
        on_workers(loops, thread_scratch, scratch_per_thread, [&](Worker &worker, float *own) {
            for_each_row(worker, step->rows, [&](int64_t m) {
                for (int64_t head = 0; head < b.key_heads; head++) {
                    const int64_t at = (m * b.key_heads + head) * b.head_size;
                    write_cache(*model, b, *step, m, head, key + at, value + at);
                }
            });
            attend(worker, a, own);
            if (partial) for_each_row(worker, step->rows, [&](int64_t m) { merge_ranges(a, m); });
        });
    });
}
