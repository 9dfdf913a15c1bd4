// Products of a decoding step: rows times weights that are read once for all rows, plus the update of each row's
// adapter.
#pragma once
#include "decode.h"
#include "threads.h"

namespace deltaw {

// Rows of a step that use the same adapter.
struct Group {
    const DecodeFactors *factors;
    int64_t first, count;  // in Updates::order
};
struct Updates {
    const Group *groups;
    const int64_t *order;  // rows sorted by adapter, ascending within an adapter
    int64_t count, max_rank;
};

// A range of columns of a layer in a phase, starting at `first`.
struct Part {
    const DecodeLinear *layer = nullptr;
    int64_t number = 0;  // index of the layer's factors in an adapter
    int64_t first = 0;
    int input = 0;  // index among the layers of the phase
};

const int MAX_LAYERS = 3;  // layers that read the same rows

// Input rows of a phase in the forms that its layers' products and updates read.
class Inputs {
  public:
    // memory: bytes(...) bytes, aligned to 64 bytes.
    Inputs(char *memory, int64_t rows, const Part *parts, int count, bool updates);
    // Write row m in all forms.
    void write(int64_t m, const float *row) const;
    static int64_t bytes(int64_t rows, int64_t depth);

    struct Form {
        int64_t type, stride;
        const float *columns;
        char *data;
        float *scales;
    };
    const Form &layer_input(int layer) const { return forms[layer_form[layer]]; }
    const Form &update_input(int layer) const { return forms[update_form[layer]]; }

    Part parts[MAX_LAYERS];
    int count;
    int64_t rows, depth;

  private:
    Form forms[MAX_LAYERS + 1];
    int layer_form[MAX_LAYERS], update_form[MAX_LAYERS], num_forms = 0;
    int form(char *memory, int64_t type, const float *columns);
};

// Compute x·Aᵀ of each row and layer into h (layers, rows, max_rank · 4 bytes), in the factors' type.
void first_products(Worker &worker, const Inputs &inputs, const Updates &updates, char *h);
// True if any row has an update of one of the layers.
bool any_update(const Inputs &inputs, const Updates &updates);

enum End { STORE, ADD, ACTIVATE, LOGITS };
struct Task {
    Part first, second;  // second: the layer that the activation is multiplied with, or an empty part
    int64_t columns;
    End end;
    float *out;
    int64_t ld;
    int activation = 0;
    float scale = 1, softcap = 0;
};
// Run all tasks, divided by columns. thread_scratch: product_scratch_size(model) floats of this thread.
void run_tasks(Worker &worker, const Task *tasks, int count, const Inputs &inputs, const Updates &updates, const char *h, float *thread_scratch);
int64_t product_scratch_size(const DecodeModel &model);

}  // namespace deltaw
