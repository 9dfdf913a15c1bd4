// Struct layouts for the loader to compare before it calls other functions.
#include <algorithm>
#include <cstddef>
#include <cstring>

#include "blocks.h"
#include "decode.h"
#include "kernels.h"

int dw_abi() { return DW_ABI; }

#define TEXT_OF(macro) TEXT(macro)
#define TEXT(value) #value
#ifndef DW_SOURCES
#define DW_SOURCES unknown
#endif
int64_t dw_build_info(char *into, int64_t capacity) {
    const char text[] = TEXT_OF(DW_SOURCES) " " __VERSION__;
    const int64_t size = std::min(capacity, (int64_t)sizeof(text));
    if (size <= 0) return 0;
    std::memcpy(into, text, size - 1);
    into[size - 1] = 0;
    return size;
}

// Write the size in bytes of a struct, followed by the offset of each field in order. `index` is 0: Layer, 1: RowNorm,
// 2: HalfNorms, 3: BlockParts, 4: DecodeLinear, 5: DecodeBlock, 6: DecodeModel, 7: DecodeFactors, 8: DecodeStep, 9:
// BlockData. At most `capacity` numbers are written to `into`. Returns how many numbers the struct has, or 0 for an
// unknown index.
int64_t dw_struct_layout(int index, int64_t *into, int64_t capacity) {
#define AT(field) (int64_t) offsetof(Struct, field)
    auto copy = [&](const int64_t *from, int64_t count) {
        for (int64_t i = 0; i < count && i < capacity; i++) into[i] = from[i];
        return count;
    };
    if (index == 0) {
        typedef Layer Struct;
        const int64_t layout[] = {sizeof(Struct), AT(weight), AT(scale), AT(smooth), AT(bias), AT(A), AT(B), AT(in), AT(out), AT(rank),
                                 AT(weight_type), AT(by_column), AT(bias_f32), AT(in_blocks), AT(scaling)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
    if (index == 1) {
        typedef RowNorm Struct;
        const int64_t layout[] = {sizeof(Struct), AT(weight), AT(bias), AT(eps), AT(offset), AT(centered), AT(used)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
    if (index == 2) {
        typedef HalfNorms Struct;
        const int64_t layout[] = {sizeof(Struct), AT(before), AT(after), AT(post)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
    if (index == 3) {
        typedef BlockParts Struct;
        const int64_t layout[] = {sizeof(Struct), AT(type), AT(heads), AT(key_heads), AT(head_size), AT(activation), AT(window), AT(rotary_dims),
                                 AT(causal), AT(split), AT(gated), AT(parallel), AT(int8_gradients), AT(scaling), AT(softcap), AT(first), AT(second),
                                 AT(query_norm), AT(key_norm), AT(query), AT(key), AT(value), AT(output), AT(gate), AT(up), AT(down)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
    if (index == 4) {
        typedef DecodeLinear Struct;
        const int64_t layout[] = {sizeof(Struct), AT(weight), AT(scale), AT(columns), AT(bias), AT(sums), AT(in), AT(out), AT(type)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
    if (index == 5) {
        typedef DecodeBlock Struct;
        const int64_t layout[] = {sizeof(Struct), AT(heads), AT(key_heads), AT(head_size), AT(activation), AT(window), AT(rotary_dims), AT(table),
                                 AT(split), AT(gated), AT(parallel), AT(cache_offset), AT(scaling), AT(softcap), AT(first), AT(second),
                                 AT(query_norm), AT(key_norm), AT(query), AT(key), AT(value), AT(output), AT(gate), AT(up), AT(down)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
    if (index == 6) {
        typedef DecodeModel Struct;
        const int64_t layout[] = {sizeof(Struct), AT(blocks), AT(cosines), AT(sines), AT(count), AT(tables), AT(positions), AT(hidden),
            AT(cache_type),
                                 AT(page_tokens), AT(page_numbers), AT(logits_scale), AT(logits_softcap), AT(final_norm), AT(head)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
    if (index == 7) {
        typedef DecodeFactors Struct;
        const int64_t layout[] = {sizeof(Struct), AT(A), AT(B), AT(rank)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
    if (index == 8) {
        typedef DecodeStep Struct;
        const int64_t layout[] = {sizeof(Struct), AT(hidden), AT(positions), AT(sequence), AT(adapter), AT(page_table), AT(output_rows), AT(adapters),
                                 AT(pages), AT(out), AT(logits), AT(rows), AT(sequences), AT(pages_per_sequence), AT(output_count), AT(adapter_count),
                                 AT(page_count)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
    if (index == 9) {
        typedef BlockData Struct;
        const int64_t layout[] = {sizeof(Struct), AT(data), AT(absmax), AT(group_scale), AT(codes), AT(offset)};
        return copy(layout, sizeof(layout) / sizeof(*layout));
    }
#undef AT
    return 0;
}
