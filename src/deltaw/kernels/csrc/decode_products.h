// The products of a decoding step: rows of a step times weights that are read where they lie, once for all rows, each row
// with the update of its own adapter.
#pragma once
#include "decode.h"
#include "threads.h"

namespace deltaw {

// The rows of a step that an adapter belongs to.
struct Group {
    const DecodeFactors *factors;
    int64_t first, count;  // in Updates::order
};
struct Updates {
    const Group *groups;
    const int64_t *order;  // rows by adapter, ascending within one
    int64_t count, most_rank;
};

// One product of a phase: columns of a layer from `first` on.
struct Part {
    const DecodeLinear *layer = nullptr;
    int64_t number = 0;  // of the layer's factors in an adapter
    int64_t first = 0;
    int input = 0;       // which of the phase's layers this is
};

const int MOST_LAYERS = 3;  // that read the same rows

// The rows of a phase as its layers' products take them, for each layer, and for the updates of each.
class Inputs {
  public:
    // memory: bytes(...) of it, aligned to 64 bytes.
    Inputs(char *memory, int64_t rows, const Part *parts, int count, bool updates);
    // Writes row m, for all layers.
    void write(int64_t m, const float *row) const;
    static int64_t bytes(int64_t rows, int64_t depth);

    struct Form {
        int64_t type, stride;
        const float *columns;
        char *data;
        float *scales;
    };
    const Form &of(int layer) const { return forms[form_of[layer]]; }
    const Form &of_update(int layer) const { return forms[update_of[layer]]; }

    Part parts[MOST_LAYERS];
    int count;
    int64_t rows, depth;

  private:
    Form forms[MOST_LAYERS + 1];
    int form_of[MOST_LAYERS], update_of[MOST_LAYERS], made = 0;
    int form(char *memory, int64_t type, const float *columns);
};

// x·Aᵀ of each row and layer into h (layers, rows, most_rank · 4 bytes), in the factors' type.
void narrow_products(Crew &crew, const Inputs &inputs, const Updates &updates, char *h);
// Whether a row of the step has an update of one of the layers.
bool any_update(const Inputs &inputs, const Updates &updates);

enum End { STORE, ADD, ACTIVATE, LOGITS };
struct Task {
    Part first, second;  // second: what an activation is multiplied with, or nothing
    int64_t columns;
    End end;
    float *out;
    int64_t ld;
    int activation = 0;
    float scale = 1, softcap = 0;
};
// All tasks, shared out by columns; room: product_room(model) floats of this thread.
void products_of_phase(Crew &crew, const Task *tasks, int count, const Inputs &inputs, const Updates &updates, const char *h, float *room);
int64_t product_room(const DecodeModel &model);

}  // namespace deltaw
