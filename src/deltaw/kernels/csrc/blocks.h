// Weights in blocks of a few bits, 32 numbers at a time; kernels/block_linear.py says what the formats are and has the same
// in torch, equal to the bit. A scale times a code is exact in fp32, so it makes no difference whether a compiler rounds
// between a product and a sum; where it would (NF4's scales), it is kept from choosing.
#pragma once
#include "vector.h"

struct BlockData {  // of NF4 all, of other formats `data` alone; see BlockWeight
    const uint8_t *data, *absmax;
    const float *group_scale, *codes, *offset;
};

namespace deltaw {

enum BlockFormat { Q4_0 = 3, Q4_1 = 4, Q8_0 = 5, Q4_K = 6, Q5_K = 7, Q6_K = 8, NF4 = 9 };  // beside Type's, as the caller numbers them

inline bool stored_in_blocks(int type) { return type >= Q4_0; }

const int UNIT = 32;  // numbers that are read at a time; every block is a whole number of them

// The fp16 number at p.
inline float half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(h);
#elif defined(__ARM_NEON)
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
#else
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (!exponent) {
        const float f = (float)fraction * 0x1p-24f;
        return sign ? -f : f;
    }
    const uint32_t bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f;
#endif
}

// The lower or the upper four bits of 16 bytes.
inline I16 lower4(const uint8_t *p) { return load_u8(p) & set_i(15); }
inline I16 upper4(const uint8_t *p) { return load_u8(p) >> 4; }

// NUMBERS and BYTES of a block, and its `unit`-th 32 numbers.
template <int FORMAT>
struct Blocks;

template <>
struct Blocks<Q4_0> {
    static constexpr int NUMBERS = 32, BYTES = 18;
    static void read(const uint8_t *b, int, F16 (&x)[2]) {
        const F16 d = set_f(half_at(b));
        x[0] = to_f(lower4(b + 2) + set_i(-8)) * d, x[1] = to_f(upper4(b + 2) + set_i(-8)) * d;
    }
};

template <>
struct Blocks<Q4_1> {
    static constexpr int NUMBERS = 32, BYTES = 20;
    static void read(const uint8_t *b, int, F16 (&x)[2]) {
        const F16 d = set_f(half_at(b)), least = set_f(half_at(b + 2));
        x[0] = fma(to_f(lower4(b + 4)), d, least), x[1] = fma(to_f(upper4(b + 4)), d, least);
    }
};

template <>
struct Blocks<Q8_0> {
    static constexpr int NUMBERS = 32, BYTES = 34;
    static void read(const uint8_t *b, int, F16 (&x)[2]) {
        const F16 d = set_f(half_at(b));
        x[0] = to_f(load_s8((const int8_t *)b + 2)) * d, x[1] = to_f(load_s8((const int8_t *)b + 18)) * d;
    }
};

// Scales of 6 bits and what is subtracted, for 8 units.
struct ScalesOf8 {
    F16 scale, below;

    ScalesOf8(const uint8_t *b, int unit) {
        const uint8_t *const s = b + 4;
        const int of_scale = unit < 4 ? s[unit] & 63 : (s[unit + 4] & 15) | (s[unit - 4] >> 6) << 4;
        const int of_below = unit < 4 ? s[unit + 4] & 63 : s[unit + 4] >> 4 | (s[unit] >> 6) << 4;
        scale = set_f(half_at(b) * (float)of_scale), below = set_f(-half_at(b + 2) * (float)of_below);
    }
};

template <>
struct Blocks<Q4_K> {
    static constexpr int NUMBERS = 256, BYTES = 144;
    static void read(const uint8_t *b, int unit, F16 (&x)[2]) {
        const ScalesOf8 of(b, unit);
        const uint8_t *const codes = b + 16 + 32 * (unit / 2);
        for (int i = 0; i < 2; i++) x[i] = fma(to_f(unit & 1 ? upper4(codes + 16 * i) : lower4(codes + 16 * i)), of.scale, of.below);
    }
};

template <>
struct Blocks<Q5_K> {
    static constexpr int NUMBERS = 256, BYTES = 176;
    static void read(const uint8_t *b, int unit, F16 (&x)[2]) {
        const ScalesOf8 of(b, unit);
        const uint8_t *const codes = b + 48 + 32 * (unit / 2);
        for (int i = 0; i < 2; i++) {
            const I16 low = unit & 1 ? upper4(codes + 16 * i) : lower4(codes + 16 * i), high = load_u8(b + 16 + 16 * i) >> unit & set_i(1);
            x[i] = fma(to_f(low | high << 4), of.scale, of.below);
        }
    }
};

template <>
struct Blocks<Q6_K> {
    static constexpr int NUMBERS = 256, BYTES = 210;
    static void read(const uint8_t *b, int unit, F16 (&x)[2]) {
        const int line = unit & 3;
        const uint8_t *const low = b + 64 * (unit / 4) + 32 * (line & 1), *const high = b + 128 + 32 * (unit / 4);
        const float d = half_at(b + 208);
        for (int i = 0; i < 2; i++) {
            const I16 four = line & 2 ? upper4(low + 16 * i) : lower4(low + 16 * i), two = load_u8(high + 16 * i) >> 2 * line & set_i(3);
            x[i] = to_f((four | two << 4) + set_i(-32)) * set_f(d * (float)(int8_t)b[192 + 2 * unit + i]);
        }
    }
};

template <>
struct Blocks<NF4> {
    static constexpr int NUMBERS = 64, BYTES = 32;
    static constexpr int64_t GROUP = 256;  // blocks with one scale of scales
    // Without the block's scale.
    static void read(const uint8_t *b, int unit, F16 (&x)[2]) {
        alignas(64) static const float values[16] = {-1.0f,
                                                     -0.6961928009986877f,
                                                     -0.5250730514526367f,
                                                     -0.39491748809814453f,
                                                     -0.28444138169288635f,
                                                     -0.18477343022823334f,
                                                     -0.09105003625154495f,
                                                     0.0f,
                                                     0.07958029955625534f,
                                                     0.16093020141124725f,
                                                     0.24611230194568634f,
                                                     0.33791524171829224f,
                                                     0.44070982933044434f,
                                                     0.5626170039176941f,
                                                     0.7229568362236023f,
                                                     1.0f};
        for (int i = 0; i < 2; i++) x[i] = one_of_16(values, unit & 1 ? upper4(b + 16 * i) : lower4(b + 16 * i));
    }
    static float scale(const BlockData &w, int64_t block) {
        volatile const float product = w.codes[w.absmax[block]] * w.group_scale[block / GROUP];  // rounded before the sum
        return product + *w.offset;
    }
};

// A matrix whose rows are `columns` numbers in blocks.
template <int FORMAT>
class BlockRows {
  public:
    typedef Blocks<FORMAT> Of;

    BlockRows(const void *weight, int64_t columns) : w(*(const BlockData *)weight), blocks(columns / Of::NUMBERS) {}

    // Numbers k … k+31 of a row, k a multiple of 32.
    void read(int64_t row, int64_t k, F16 (&x)[2]) const { read_unit(row, k / Of::NUMBERS, (int)(k % Of::NUMBERS / UNIT), x); }

    // The `unit`-th 32 numbers of a row's block.
    void read_unit(int64_t row, int64_t block, int unit, F16 (&x)[2]) const {
        const int64_t number = row * blocks + block;
        Of::read(w.data + number * Of::BYTES, unit, x);
        if constexpr (FORMAT == NF4) {
            const F16 scale = set_f(Of::scale(w, number));
            x[0] = x[0] * scale, x[1] = x[1] * scale;
        }
    }
    const uint8_t *at(int64_t row, int64_t block) const { return w.data + (row * blocks + block) * Of::BYTES; }

  private:
    const BlockData &w;
    const int64_t blocks;
};

// body(format) with the number of a format as a constant, for a type that is stored_in_blocks.
template <int N>
struct Format {
    static constexpr int value = N;
};
template <class Body>
inline void with_format(int type, Body &&body) {
    switch (type) {
        case Q4_0: return body(Format<Q4_0>());
        case Q4_1: return body(Format<Q4_1>());
        case Q8_0: return body(Format<Q8_0>());
        case Q4_K: return body(Format<Q4_K>());
        case Q5_K: return body(Format<Q5_K>());
        case Q6_K: return body(Format<Q6_K>());
        default: return body(Format<NF4>());
    }
}

// Where a row's block with number k begins, in bytes, and what a block takes.
inline int64_t bytes_before(int type, int64_t k) {
    int64_t bytes = 0;
    with_format(type, [&](auto format) { bytes = k / Blocks<decltype(format)::value>::NUMBERS * Blocks<decltype(format)::value>::BYTES; });
    return bytes;
}
inline int64_t bytes_of_block(int type) {
    int64_t bytes = 0;
    with_format(type, [&](auto format) { bytes = Blocks<decltype(format)::value>::BYTES; });
    return bytes;
}

}  // namespace deltaw
