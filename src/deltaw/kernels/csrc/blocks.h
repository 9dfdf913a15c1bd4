// Weights in block formats, decoded 32 numbers at a time. kernels/block_linear.py documents the formats and implements
// the same in torch with bitwise equal results. The product of a scale and a code is exact in fp32, so results do not
// depend on whether the compiler contracts a multiply and add. For NF4's scales, where they would, contraction is
// prevented.
#pragma once
#include "vector.h"

struct BlockData {  // all fields for NF4, only `data` for other formats; see BlockWeight
    const uint8_t *data, *absmax;
    const float *group_scale, *codes, *offset;
};

namespace deltaw {

enum BlockFormat { Q4_0 = 3, Q4_1 = 4, Q8_0 = 5, Q4_K = 6, Q5_K = 7, Q6_K = 8, NF4 = 9 };  // type codes of the caller, continuing enum Type

inline bool stored_in_blocks(int type) { return type >= Q4_0; }

const int UNIT = 32;  // numbers decoded at a time; every block size is a multiple

// Convert the fp16 number at p.
inline float fp16_at(const uint8_t *p) {
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

// The low or high nibbles of 16 bytes.
inline I16 low_nibbles(const uint8_t *p) { return load_u8(p) & set_i(15); }
inline I16 high_nibbles(const uint8_t *p) { return load_u8(p) >> 4; }

// NUMBERS and BYTES of a block, and a function to read its `unit`-th 32 numbers.
template <int FORMAT>
struct Blocks;

template <>
struct Blocks<Q4_0> {
    static constexpr int NUMBERS = 32, BYTES = 18;
    static void read(const uint8_t *b, int, F16 (&x)[2]) {
        const F16 d = set_f(fp16_at(b));
        x[0] = to_f(low_nibbles(b + 2) + set_i(-8)) * d, x[1] = to_f(high_nibbles(b + 2) + set_i(-8)) * d;
    }
};

template <>
struct Blocks<Q4_1> {
    static constexpr int NUMBERS = 32, BYTES = 20;
    static void read(const uint8_t *b, int, F16 (&x)[2]) {
        const F16 d = set_f(fp16_at(b)), minimum = set_f(fp16_at(b + 2));
        x[0] = fma(to_f(low_nibbles(b + 4)), d, minimum), x[1] = fma(to_f(high_nibbles(b + 4)), d, minimum);
    }
};

template <>
struct Blocks<Q8_0> {
    static constexpr int NUMBERS = 32, BYTES = 34;
    static void read(const uint8_t *b, int, F16 (&x)[2]) {
        const F16 d = set_f(fp16_at(b));
        x[0] = to_f(load_s8((const int8_t *)b + 2)) * d, x[1] = to_f(load_s8((const int8_t *)b + 18)) * d;
    }
};

// 6-bit scales and minimums of 8 units.
struct KScales {
    F16 scale, minimum;

    KScales(const uint8_t *b, int unit) {
        const uint8_t *const s = b + 4;
        const int scale_codes = unit < 4 ? s[unit] & 63 : (s[unit + 4] & 15) | (s[unit - 4] >> 6) << 4;
        const int minimum_codes = unit < 4 ? s[unit + 4] & 63 : s[unit + 4] >> 4 | (s[unit] >> 6) << 4;
        scale = set_f(fp16_at(b) * (float)scale_codes), minimum = set_f(-fp16_at(b + 2) * (float)minimum_codes);
    }
};

template <>
struct Blocks<Q4_K> {
    static constexpr int NUMBERS = 256, BYTES = 144;
    static void read(const uint8_t *b, int unit, F16 (&x)[2]) {
        const KScales scales(b, unit);
        const uint8_t *const codes = b + 16 + 32 * (unit / 2);
        for (int i = 0; i < 2; i++)
            x[i] = fma(to_f(unit & 1 ? high_nibbles(codes + 16 * i) : low_nibbles(codes + 16 * i)), scales.scale, scales.minimum);
    }
};

template <>
struct Blocks<Q5_K> {
    static constexpr int NUMBERS = 256, BYTES = 176;
    static void read(const uint8_t *b, int unit, F16 (&x)[2]) {
        const KScales scales(b, unit);
        const uint8_t *const codes = b + 48 + 32 * (unit / 2);
        for (int i = 0; i < 2; i++) {
            const I16 low = unit & 1 ? high_nibbles(codes + 16 * i) : low_nibbles(codes + 16 * i), high = load_u8(b + 16 + 16 * i) >> unit & set_i(1);
            x[i] = fma(to_f(low | high << 4), scales.scale, scales.minimum);
        }
    }
};

template <>
struct Blocks<Q6_K> {
    static constexpr int NUMBERS = 256, BYTES = 210;
    static void read(const uint8_t *b, int unit, F16 (&x)[2]) {
        const int line = unit & 3;
        const uint8_t *const low = b + 64 * (unit / 4) + 32 * (line & 1), *const high = b + 128 + 32 * (unit / 4);
        const float d = fp16_at(b + 208);
        for (int i = 0; i < 2; i++) {
            const I16 four = line & 2 ? high_nibbles(low + 16 * i) : low_nibbles(low + 16 * i), two = load_u8(high + 16 * i) >> 2 * line & set_i(3);
            x[i] = to_f((four | two << 4) + set_i(-32)) * set_f(d * (float)(int8_t)b[192 + 2 * unit + i]);
        }
    }
};

template <>
struct Blocks<NF4> {
    static constexpr int NUMBERS = 64, BYTES = 32;
    static constexpr int64_t GROUP = 256;  // blocks per group scale
    // Decode without the block's scale.
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
        for (int i = 0; i < 2; i++) x[i] = lookup_16(values, unit & 1 ? high_nibbles(b + 16 * i) : low_nibbles(b + 16 * i));
    }
    static float scale(const BlockData &w, int64_t block) {
        volatile const float product = w.codes[w.absmax[block]] * w.group_scale[block / GROUP];  // rounded before the addition
        return product + *w.offset;
    }
};

// A matrix with rows of `columns` numbers in blocks.
template <int FORMAT>
class BlockRows {
  public:
    typedef Blocks<FORMAT> BlockType;

    BlockRows(const void *weight, int64_t columns) : w(*(const BlockData *)weight), blocks(columns / BlockType::NUMBERS) {}

    // Decode numbers k … k+31 of a row, k a multiple of 32.
    void read(int64_t row, int64_t k, F16 (&x)[2]) const { read_unit(row, k / BlockType::NUMBERS, (int)(k % BlockType::NUMBERS / UNIT), x); }

    // Decode the `unit`-th 32 numbers of a row's block.
    void read_unit(int64_t row, int64_t block, int unit, F16 (&x)[2]) const {
        const int64_t number = row * blocks + block;
        BlockType::read(w.data + number * BlockType::BYTES, unit, x);
        if constexpr (FORMAT == NF4) {
            const F16 scale = set_f(BlockType::scale(w, number));
            x[0] = x[0] * scale, x[1] = x[1] * scale;
        }
    }
    const uint8_t *at(int64_t row, int64_t block) const { return w.data + (row * blocks + block) * BlockType::BYTES; }

  private:
    const BlockData &w;
    const int64_t blocks;
};

// Call body(format) with the format's code as a constant, for a type that is stored_in_blocks.
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

// Byte offset of number k of a row, and bytes of a block.
inline int64_t block_byte_offset(int type, int64_t k) {
    int64_t bytes = 0;
    with_format(type, [&](auto format) { bytes = k / Blocks<decltype(format)::value>::NUMBERS * Blocks<decltype(format)::value>::BYTES; });
    return bytes;
}
inline int64_t block_bytes(int type) {
    int64_t bytes = 0;
    with_format(type, [&](auto format) { bytes = Blocks<decltype(format)::value>::BYTES; });
    return bytes;
}

}  // namespace deltaw
