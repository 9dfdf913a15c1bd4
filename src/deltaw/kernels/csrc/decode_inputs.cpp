// Input rows of products: in the type of the weights, or quantized to int8 with a scale per row.
#include "decode_dots.h"
#include "decode_products.h"
#include "decode_tiles.h"
#include "quantize.h"

namespace deltaw {

namespace {

int64_t row_stride(int64_t type, int64_t depth) {
    int64_t bytes = 0;
    with_dot(type, [&](auto dot) {
        typedef decltype(dot) Dot;
        bytes = (depth + Dot::STEP - 1) / Dot::STEP * Dot::STEP * (int64_t)sizeof(typename Dot::Left);
    });
    return (bytes + 63) / 64 * 64;
}

// Bytes of all rows in a form.
int64_t form_bytes(int64_t type, int64_t rows, int64_t depth) {
#ifdef DW_AMX
    if (type == TILED) return (rows + tiles::SIDE - 1) / tiles::SIDE * tiles::side_bytes_of(depth);
#endif
    return rows * row_stride(type, depth);
}

// Same rounding as quantize_rows.
void write_int8(int64_t depth, const float *row, const float *columns, DotInt8::Left *out, float *scale) {
    auto number = [&](int64_t k) {
        const First mask = first(depth - k);
        const F16 v = load16(row + k, mask);
        return columns ? v * load16(columns + k, mask) : v;
    };
    LargestMagnitude magnitude;
    for (int64_t k = 0; k < depth; k += 16) magnitude.add_value(number(k));
    const float top = magnitude.value();
    *scale = top / 127.0f;
    const F16 by = set_f(top > 0 ? 127.0f / top : 0.0f);
    const int64_t padded_depth = (depth + DotInt8::STEP - 1) / DotInt8::STEP * DotInt8::STEP;
    for (int64_t k = 0; k < padded_depth; k += 16) DotInt8::put(out + k, min(max(to_int(number(k) * by), set_i(-127)), set_i(127)));
}

}  // namespace

int64_t Inputs::bytes(int64_t rows, int64_t depth) {
    int64_t widest = 0;
    for (int64_t type : {(int64_t)F32, (int64_t)BF16, (int64_t)INT8, form_type(BF16)}) widest = std::max(widest, form_bytes(type, rows, depth));
    return (MAX_LAYERS + 1) * (widest + (rows + 15) / 16 * 64);
}

Inputs::Inputs(char *memory, int64_t rows, const Part *from, int count, bool updates) : count(count), rows(rows), depth(from[0].layer->in) {
    for (int i = 0; i < count; i++) {
        parts[i] = from[i], parts[i].input = i;
        const DecodeLinear &layer = *parts[i].layer;
        layer_form[i] = form(memory, form_type(layer.type), layer.columns);
    }
    for (int i = 0; i < count; i++) {
        const int64_t type = parts[i].layer->type;
        const bool needs_update_form = type == INT8 || form_type(type) == TILED;  // another form than that of the updates
        update_form[i] = needs_update_form && updates ? form(memory, BF16, nullptr) : layer_form[i];
    }
}

int Inputs::form(char *memory, int64_t type, const float *columns) {
    for (int i = 0; i < num_forms; i++)
        if (forms[i].type == type && forms[i].columns == columns) return i;
    char *const at = num_forms ? forms[num_forms - 1].data + form_bytes(forms[num_forms - 1].type, rows, depth) : memory;
    const int64_t stride = type == TILED ? 0 : row_stride(type, depth), scales = (rows + 15) / 16 * 64;
    forms[num_forms] = {type, stride, columns, at + scales, (float *)at};
    return num_forms++;
}

void Inputs::write(int64_t m, const float *row) const {
    for (int i = 0; i < num_forms; i++) {
        const Form &f = forms[i];
        char *const to = f.data + m * f.stride;
        if (f.type == INT8) {
            write_int8(depth, row, f.columns, (DotInt8::Left *)to, f.scales + m);
            continue;
        }
#ifdef DW_AMX
        if (f.type == TILED) {
            tiles::write_row(f.data, m, depth, row);
            continue;
        }
#endif
        with_dot(f.type, [&](auto dot) {
            typedef decltype(dot) Dot;
            if constexpr (!Dot::IS_INTEGER) {
                const int64_t padded_depth = (depth + Dot::STEP - 1) / Dot::STEP * Dot::STEP;
                for (int64_t k = 0; k < padded_depth; k += 16) Dot::put((typename Dot::Left *)to + k, load16(row + k, first(depth - k)));
            }
        });
    }
}

}  // namespace deltaw
