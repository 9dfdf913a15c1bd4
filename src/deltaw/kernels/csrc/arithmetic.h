// Selected arithmetic of each number type. The caller measures the available ones and sets one.
#pragma once
#include <cstdint>

#include "multiply_tiles.h"

namespace deltaw {

// DOT: the instruction set's product of the type. WIDE: bf16 widened to fp32. TILES: AMX tiles.
enum Arithmetic { DOT = 0, WIDE = 1, TILES = 2 };

Arithmetic selected_arithmetic(int type);

// Bytes of the left side that fit in the second-level cache in addition to panels and sums.
int64_t left_cache_bytes();

// Call body(op) with the Op that multiplies numbers of `type`, F32 or BF16.
template <class Body>
inline void with_op(int type, Body &&body) {
    if (type == F32) return body(OpF32());
#ifdef DW_AMX
    if (selected_arithmetic(BF16) == TILES) return body(TilesBF16());
#endif
#ifdef DW_BF16_DOT
    if (selected_arithmetic(BF16) == DOT) return body(OpBF16());
#endif
    body(OpWide());
}

}  // namespace deltaw
