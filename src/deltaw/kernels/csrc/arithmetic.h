// Which of a library's ways to multiply numbers of a type is in use. A caller measures them and sets one.
#pragma once
#include <cstdint>

#include "multiply_tiles.h"

namespace deltaw {

// The processor's own product of the type; bf16 widened to fp32; tiles of AMX.
enum Arithmetic { DOT = 0, WIDE = 1, TILES = 2 };

Arithmetic arithmetic_of(int type);

// Bytes of a left side that stay in the second-level cache beside panels and sums.
int64_t left_at_once();

// body(op) with the Op that multiplies numbers of `type`, which is F32 or BF16.
template <class Body>
inline void with_op(int type, Body &&body) {
    if (type == F32) return body(OpF32());
#ifdef DW_AMX
    if (arithmetic_of(BF16) == TILES) return body(TilesBF16());
#endif
#ifdef DW_BF16_DOT
    if (arithmetic_of(BF16) == DOT) return body(OpBF16());
#endif
    body(OpWide());
}

}  // namespace deltaw
