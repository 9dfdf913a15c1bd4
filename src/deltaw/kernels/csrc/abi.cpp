// What a caller compares before it calls anything else.
#include <cstddef>

#include "block.h"
#include "kernels.h"

int dw_abi() { return DW_ABI; }

// Of struct `which` (0: Layer, 1: RowNorm, 2: HalfNorms, 3: BlockParts) its size and the offset of each field, in order, in bytes, into
// the first `capacity` places of `into`. Returns how many there are; 0 where there is no such struct.
int64_t dw_layout_of(int which, int64_t *into, int64_t capacity) {
#define AT(field) (int64_t) offsetof(Struct, field)
    auto copy = [&](const int64_t *from, int64_t count) {
        for (int64_t i = 0; i < count && i < capacity; i++) into[i] = from[i];
        return count;
    };
    if (which == 0) {
        typedef Layer Struct;
        const int64_t found[] = {sizeof(Struct), AT(weight), AT(scale), AT(smooth), AT(bias), AT(A), AT(B), AT(in), AT(out), AT(rank),
                                 AT(weight_type), AT(by_column), AT(bias_f32), AT(scaling)};
        return copy(found, sizeof(found) / sizeof(*found));
    }
    if (which == 1) {
        typedef RowNorm Struct;
        const int64_t found[] = {sizeof(Struct), AT(weight), AT(bias), AT(eps), AT(offset), AT(centred), AT(used)};
        return copy(found, sizeof(found) / sizeof(*found));
    }
    if (which == 2) {
        typedef HalfNorms Struct;
        const int64_t found[] = {sizeof(Struct), AT(before), AT(after), AT(post)};
        return copy(found, sizeof(found) / sizeof(*found));
    }
    if (which == 3) {
        typedef BlockParts Struct;
        const int64_t found[] = {sizeof(Struct), AT(type), AT(heads), AT(key_heads), AT(head_size), AT(activation), AT(window), AT(turned),
                                 AT(causal), AT(split), AT(gated), AT(parallel), AT(scaling), AT(softcap), AT(first), AT(second), AT(of_query),
                                 AT(of_key), AT(query), AT(key), AT(value), AT(output), AT(gate), AT(up), AT(down)};
        return copy(found, sizeof(found) / sizeof(*found));
    }
#undef AT
    return 0;
}
