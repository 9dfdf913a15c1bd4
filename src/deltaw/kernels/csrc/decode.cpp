// One step of a decoder: rows of tokens through all blocks, last norm and head, in one team of threads that work through
// the same phases. Between products each row is one thread's; in products each column is; in attention each query.
#include <vector>

#include "decode_attention.h"
#include "decode_dots.h"
#include "kernels.h"
#include "scratch.h"
#include "status.h"

using namespace deltaw;

namespace {

const int MOST_PHASES = 16;  // of a block, and of the end

// What all threads share, made before they begin: nothing in the team's region allocates or fails.
struct Work {
    const DecodeModel &model;
    const DecodeStep &step;
    Updates updates;
    std::vector<Queries> queries;          // of the present block's size at most, see plan_queries
    float *x, *y, *qkv, *q, *mixed, *inner, *partial;
    char *h, *first_inputs, *second_inputs;
    float *room;                           // of each thread
    int64_t room_of_each;

    Work(const DecodeModel &model, const DecodeStep &step) : model(model), step(step) {}
};

// ---- one row ---------------------------------------------------------------------------------------------------

// y = the norm of x, which may be y.
void norm_row(const RowNorm &norm, int64_t size, const float *x, float *y) {
    const float *const weight = (const float *)norm.weight, *const bias = (const float *)norm.bias;
    F16 sum = zero_f();
    float mean = 0;
    if (norm.centered) {
        for (int64_t d = 0; d < size; d += 16) sum = sum + load16(x + d, first(size - d));
        mean = sum_of(sum) / size;
    }
    const F16 mu = set_f(mean);
    sum = zero_f();
    for (int64_t d = 0; d < size; d += 16) {
        const First k = first(size - d);
        const F16 v = keep_first(k, load16(x + d, k) - mu);
        sum = fma(v, v, sum);
    }
    const F16 by = set_f(1.0f / __builtin_sqrtf(sum_of(sum) / size + norm.eps)), shift = set_f(norm.offset);
    for (int64_t d = 0; d < size; d += 16) {
        const First k = first(size - d);
        F16 v = (load16(x + d, k) - mu) * by;
        if (weight) v = v * (load16(weight + d, k) + shift);
        if (bias) v = v + load16(bias + d, k);
        store16(y + d, v, k);
    }
}

// A head's first `turned` numbers turned by a position, in place.
void turn_head(int64_t turned, float *x, const float *cosine, const float *sine) {
    const int64_t half = turned / 2;
    for (int64_t i = 0; i < half; i += 16) {
        const First k = first(half - i);
        const F16 a = load16(x + i, k), b = load16(x + half + i, k);
        const F16 one = fnma(b, load16(sine + i, k), a * load16(cosine + i, k));
        const F16 two = fma(a, load16(sine + half + i, k), b * load16(cosine + half + i, k));
        store16(x + i, one, k);
        store16(x + half + i, two, k);
    }
}

// Where heads begin in a row of queries, keys and values.
int64_t place_of_head(const DecodeBlock &b, int kind, int64_t head) {
    const int64_t group = b.group(), size = b.head_size;
    if (b.split != GROUPED) return (kind == 0 ? head : kind == 1 ? b.heads + head : b.heads + b.key_heads + head) * size;
    if (kind == 0) return (head / group * (group + 2) + head % group) * size;
    return (head * (group + 2) + group + kind - 1) * size;
}

// Norms and rotary positions of a row's queries and keys; keys and values go to the cache.
void place_row(Work &w, const DecodeBlock &b, int64_t m) {
    const int64_t size = b.head_size, width = b.wide() + 2 * b.narrow(), position = w.step.positions[m];
    float *const row = w.qkv + m * width;
    const float *const cosine = b.turned ? w.model.cosines[b.table] + position * b.turned : nullptr;
    const float *const sine = b.turned ? w.model.sines[b.table] + position * b.turned : nullptr;
    for (int64_t head = 0; head < b.heads; head++) {
        float *const at = row + place_of_head(b, 0, head), *const q = w.q + (m * b.heads + head) * size;
        if (b.of_query.used) norm_row(b.of_query, size, at, at);
        if (b.turned) turn_head(b.turned, at, cosine, sine);
        for (int64_t d = 0; d < size; d += 16) store16(q + d, load16(at + d, first(size - d)) * set_f(b.scaling), first(size - d));
    }
    for (int64_t head = 0; head < b.key_heads; head++) {
        float *const key = row + place_of_head(b, 1, head);
        if (b.of_key.used) norm_row(b.of_key, size, key, key);
        if (b.turned) turn_head(b.turned, key, cosine, sine);
        write_cache(w.model, b, w.step, m, head, key, row + place_of_head(b, 2, head));
    }
}

// The end of a half: its outputs in y go to the stream x where they are not there already.
void end_row(const HalfNorms &norms, int64_t size, float *x, float *y) {
    if (norms.after.used) {
        norm_row(norms.after, size, y, y);
        for (int64_t d = 0; d < size; d += 16) store16(x + d, load16(x + d, first(size - d)) + load16(y + d, first(size - d)), first(size - d));
    }
    if (norms.post.used) norm_row(norms.post, size, x, x);
}

// ---- phases ----------------------------------------------------------------------------------------------------

template <class Body>
void each_row(Crew &crew, int64_t rows, Body &&body) {
    const int64_t units = std::min<int64_t>(rows, 4 * crew.threads);
    crew.share(units, [&](int64_t unit) {
        for (int64_t m = rows * unit / units; m < rows * (unit + 1) / units; m++) body(m);
    });
}

// The row that a half's layers read.
void write_normed(const Work &w, const RowNorm &norm, const Inputs &inputs, int64_t m, float *room) {
    const float *const x = w.x + m * w.model.hidden;
    if (norm.used) norm_row(norm, w.model.hidden, x, room);
    inputs.write(m, norm.used ? room : x);
}

void run_products(Work &w, Crew &crew, const Inputs &inputs, const Task *tasks, int count, float *room) {
    if (any_update(inputs, w.updates)) narrow_products(crew, inputs, w.updates, w.h);
    products_of_phase(crew, tasks, count, inputs, w.updates, w.h, room);
}

// The last layer of a half, onto the stream, or to y where a norm stands between.
void run_last(Work &w, Crew &crew, const Inputs &inputs, bool onto, float *room) {
    const Task task{inputs.parts[0], Part(), w.model.hidden, onto ? ADD : STORE, onto ? w.x : w.y, w.model.hidden};
    run_products(w, crew, inputs, &task, 1, room);
}

struct Phases {  // the layers of a block's phases
    Part first[MOST_LAYERS], output, second[2], down;
    int first_count, second_count;

    Phases(const DecodeBlock &b, int64_t number) {
        const int64_t at = number * LAYERS_OF_BLOCK;
        const DecodeLinear *const layers[] = {&b.query, &b.key, &b.value, &b.output, &b.gate, &b.up, &b.down};
        auto part = [&](int i) { return Part{layers[i], at + i, 0, 0}; };
        first_count = b.split == APART ? 3 : 1;
        for (int i = 0; i < first_count; i++) first[i] = part(i);
        output = part(3), second[0] = part(4), second[1] = part(5), down = part(6);
        second_count = b.up.weight ? 2 : 1;
    }
};

void attention_half(Work &w, Crew &crew, const DecodeBlock &b, const Inputs &inputs, const Inputs &outputs, float *room) {
    const int64_t rows = w.step.rows, width = b.wide() + 2 * b.narrow();
    Task tasks[MOST_LAYERS];
    int64_t column = 0;
    for (int i = 0; i < inputs.count; i++) {
        tasks[i] = Task{inputs.parts[i], Part(), inputs.parts[i].layer->out, STORE, w.qkv + column, width};
        column += inputs.parts[i].layer->out;
    }
    run_products(w, crew, inputs, tasks, inputs.count, room);
    each_row(crew, rows, [&](int64_t m) { place_row(w, b, m); });
    const Attention a{&w.model, &b, &w.step, w.queries.data(), (int64_t)w.queries.size(), w.q, w.mixed, w.partial};
    attend(crew, a, room);
    each_row(crew, rows, [&](int64_t m) {
        if (w.partial) join_ranges(a, m);
        outputs.write(m, w.mixed + m * b.wide());
    });
    run_last(w, crew, outputs, !b.first.after.used, room);
}

void mlp_half(Work &w, Crew &crew, const DecodeBlock &b, const Inputs &inputs, const Inputs &outputs, float *room) {
    Task task{inputs.parts[0], Part(), b.inner(), ACTIVATE, w.inner, b.inner(), (int)b.activation};
    if (b.up.weight) task.second = inputs.parts[1];
    else if (b.gated) task.second = inputs.parts[0], task.second.first = b.inner();
    run_products(w, crew, inputs, &task, 1, room);
    each_row(crew, w.step.rows, [&](int64_t m) { outputs.write(m, w.inner + m * b.inner()); });
    run_last(w, crew, outputs, !b.second.after.used, room);
}

void run_block(Work &w, Crew &crew, int64_t number, float *room) {
    const DecodeBlock &b = w.model.blocks[number];
    const int64_t rows = w.step.rows, size = w.model.hidden;
    const bool updates = w.updates.count > 0;
    const Phases p(b, number);
    const Inputs first(w.first_inputs, rows, p.first, p.first_count, updates), output(w.first_inputs, rows, &p.output, 1, updates);
    const Inputs second(w.second_inputs, rows, p.second, p.second_count, updates), down(w.second_inputs, rows, &p.down, 1, updates);
    each_row(crew, rows, [&](int64_t m) {
        write_normed(w, b.first.before, first, m, room);
        if (b.parallel) write_normed(w, b.second.before, second, m, room);
    });
    attention_half(w, crew, b, first, output, room);
    if (!b.parallel)
        each_row(crew, rows, [&](int64_t m) {
            end_row(b.first, size, w.x + m * size, w.y + m * size);
            write_normed(w, b.second.before, second, m, room);
        });
    mlp_half(w, crew, b, second, down, room);
    if (b.second.after.used || b.second.post.used)
        each_row(crew, rows, [&](int64_t m) { end_row(b.second, size, w.x + m * size, w.y + m * size); });
}

// The wanted rows take the first places of the step's: their updates' groups are of these.
void run_end(Work &w, const Updates &updates, Crew &crew, float *room) {
    const int64_t rows = w.step.wanted_count, size = w.model.hidden;
    const Part part{&w.model.head, w.model.count * LAYERS_OF_BLOCK, 0, 0};
    const Inputs inputs(w.first_inputs, rows, &part, 1, updates.count > 0);
    each_row(crew, rows, [&](int64_t m) {
        const float *const x = w.x + w.step.wanted[m] * size;
        float *const out = w.step.out + m * size;
        if (w.model.final_norm.used) norm_row(w.model.final_norm, size, x, out);
        else memcpy(out, x, size * sizeof(float));
        inputs.write(m, out);
    });
    if (any_update(inputs, updates)) narrow_products(crew, inputs, updates, w.h);
    const Task task{inputs.parts[0], Part(), w.model.head.out, LOGITS, w.step.logits, w.model.head.out, 0, w.model.logits_scale, w.model.logits_softcap};
    products_of_phase(crew, &task, 1, inputs, updates, w.h, room);
}

// ---- before the team begins ------------------------------------------------------------------------------------

void check_step(const DecodeModel &model, const DecodeStep &step) {
    int64_t window = model.count ? 1 : 0;  // the widest; 0 is none
    for (int64_t b = 0; b < model.count; b++) window = window && model.blocks[b].window > 0 ? std::max(window, model.blocks[b].window) : 0;
    for (int64_t m = 0; m < step.rows; m++) {
        const int64_t position = step.positions[m], sequence = step.sequence[m];
        require_in_bounds(position >= 0 && position < model.positions && position / PAGE_TOKENS < step.most);
        require_in_bounds(sequence >= 0 && sequence < step.sequences && step.adapter[m] >= -1 && step.adapter[m] < step.adapter_count);
        const int64_t from = window ? std::max<int64_t>(0, position - window + 1) : 0;
        for (int64_t p = from / PAGE_TOKENS; p <= position / PAGE_TOKENS; p++) {
            const int64_t page = step.page_table[sequence * step.most + p];
            require_in_bounds(page >= 0 && page < step.page_count);
        }
    }
    for (int64_t k = 0; k < step.wanted_count; k++) require_in_bounds(step.wanted[k] >= 0 && step.wanted[k] < step.rows);
}

struct Sorted {  // rows by adapter
    std::vector<Group> groups;
    std::vector<int64_t> order;

    // adapter_of(m): of each of so many rows.
    template <class AdapterOf>
    Sorted(const DecodeStep &step, int64_t rows, AdapterOf &&adapter_of) {
        for (int64_t a = 0; a < step.adapter_count; a++) {
            const int64_t begin = (int64_t)order.size();
            for (int64_t m = 0; m < rows; m++)
                if (adapter_of(m) == a) order.push_back(m);
            if ((int64_t)order.size() > begin) groups.push_back({step.adapters[a], begin, (int64_t)order.size() - begin});
        }
    }
    Updates updates(int64_t most_rank) const { return {groups.data(), order.data(), (int64_t)groups.size(), most_rank}; }
};

int64_t highest_rank(const DecodeModel &model, const DecodeStep &step) {
    int64_t most = 0;
    for (int64_t a = 0; a < step.adapter_count; a++)
        for (int64_t i = 0; i <= model.count * LAYERS_OF_BLOCK; i++) most = std::max(most, step.adapters[a][i].rank);
    return (most + 15) / 16 * 16;
}

// Rows that follow one another in a sequence, as many as share loads of keys and the same ranges of their contexts.
std::vector<Queries> plan_queries(const DecodeStep &step, int64_t at_once) {
    std::vector<Queries> found;
    for (int64_t m = 0; m < step.rows; m++) {
        if (!found.empty()) {
            Queries &last = found.back();
            const int64_t n = last.count, before = last.first + n - 1;
            if (n < at_once && step.sequence[before] == step.sequence[m] && step.positions[before] + 1 == step.positions[m] &&
                range_tokens(step.positions[last.first]) == range_tokens(step.positions[m])) {
                last.count++;
                continue;
            }
        }
        found.push_back({m, 1});
    }
    return found;
}

struct Widest {  // numbers of a row
    int64_t qkv = 0, wide = 0, inner = 0, heads = 0, head_size = 0, units = 0, inputs = 0, at_once = MOST_QUERIES;

    explicit Widest(const DecodeModel &model) {
        inputs = model.hidden;
        for (int64_t i = 0; i < model.count; i++) {
            const DecodeBlock &b = model.blocks[i];
            qkv = std::max(qkv, b.wide() + 2 * b.narrow()), wide = std::max(wide, b.wide()), inner = std::max(inner, b.inner());
            heads = std::max(heads, b.heads), head_size = std::max(head_size, b.head_size), units = std::max(units, b.key_heads * head_slices(b));
            at_once = std::min(at_once, rows_at_once(b));
        }
        inputs = std::max({inputs, wide, inner});
    }
};

}  // namespace

// A step; see decode.h. The rows' keys and values are written to their pages.
int dw_decode(const DecodeModel *model, const DecodeStep *step) {
    return guarded([&] {
        if (model->page_tokens != PAGE_TOKENS) throw Failure{FAILED};
        check_step(*model, *step);
        if (!step->rows) return;
        const int64_t rows = step->rows, threads = thread_count();
        const Widest widest(*model);
        const Sorted sorted(*step, rows, [&](int64_t m) { return step->adapter[m]; });
        const Sorted of_wanted(*step, step->wanted_count, [&](int64_t m) { return step->adapter[step->wanted[m]]; });
        const int64_t rank = sorted.groups.empty() ? 0 : highest_rank(*model, *step);
        std::vector<Phase> phases(MOST_PHASES * (model->count + 1));
        Scratch scratch;
        Work w(*model, *step);
        w.updates = sorted.updates(rank);
        w.queries = plan_queries(*step, widest.at_once);
        w.x = scratch.take<float>(rows * model->hidden), w.y = scratch.take<float>(rows * model->hidden);
        w.qkv = scratch.take<float>(rows * widest.qkv), w.q = scratch.take<float>(rows * widest.wide);
        w.mixed = scratch.take<float>(rows * widest.wide), w.inner = scratch.take<float>(rows * widest.inner);
        w.h = scratch.take(MOST_LAYERS * std::max(rows, step->wanted_count) * rank * 4);
        w.first_inputs = scratch.take(Inputs::bytes(std::max(rows, step->wanted_count), widest.inputs));
        w.second_inputs = scratch.take(Inputs::bytes(rows, widest.inputs));
        int64_t longest = 0;
        for (int64_t m = 0; m < rows; m++) longest = std::max<int64_t>(longest, step->positions[m]);
        // Few units of work: each thread takes parts of contexts.
        const bool split = threads > 1 && longest >= STRETCH && (int64_t)w.queries.size() * widest.units < 2 * threads;
        w.partial = split ? scratch.take<float>(rows * widest.heads * (MOST_RANGES + 1) * (2 + widest.head_size)) : nullptr;
        w.room_of_each = (std::max({product_room(*model), attention_room(*model), model->hidden}) + 15) / 16 * 16;
        w.room = scratch.take<float>(threads * w.room_of_each);
        memcpy(w.x, step->hidden, rows * model->hidden * sizeof(float));
        struct Job {
            Work *w;
            Updates at_end;
            Phase *phases;
            int threads;
        } job{&w, of_wanted.updates(rank), phases.data(), (int)threads};
        auto part = [](void *data, int thread) {
            const Job *const job = static_cast<Job *>(data);
            Work &w = *job->w;
            Crew crew(job->phases, job->threads);
            float *const room = w.room + thread * w.room_of_each;
            for (int64_t b = 0; b < w.model.count; b++) run_block(w, crew, b, room);
            run_end(w, job->at_end, crew, room);
        };
        if (threads == 1) part(&job, 0);
        else run_team(part, &job, (int)threads);
    });
}
