// A weight in blocks of random bytes, with an elementwise reference implementation of dequantization.
#pragma once
#include <memory>

#include "blocks.h"
#include "check.h"

struct StoredBlocks {
    const int format;
    const int64_t rows, columns;
    Buffer<uint8_t> data;
    Buffer<uint8_t> absmax;
    Buffer<float> group_scale, codes, offset;
    BlockData at;

    static int64_t numbers(int format) { return deltaw::block_bytes(format) > 64 ? 256 : format == deltaw::NF4 ? 64 : 32; }
    static int64_t bytes(int format) { return deltaw::block_bytes(format); }

    StoredBlocks(int format, int64_t rows, int64_t columns)
        : format(format), rows(rows), columns(columns), data(rows * columns / numbers(format) * bytes(format)),
          absmax(format == deltaw::NF4 ? rows * columns / 64 : 0), group_scale(rows * columns / 64 / 256 + 1), codes(256), offset(1),
          at{data.data(), absmax.data(), group_scale.data(), codes.data(), offset.data()} {
        for (int64_t i = 0; i < data.count; i++) data[i] = (uint8_t)(int)(random_number() * 1000);
        for (int64_t i = 0; i < absmax.count; i++) absmax[i] = (uint8_t)(int)(random_number() * 1000);
        for (int64_t i = 0; i < group_scale.count; i++) group_scale[i] = 0.03f + 0.01f * (float)(i % 3);
        for (int i = 0; i < 256; i++) codes[i] = (float)(i - 127) / 128.3f;
        offset[0] = 0.11f;
        // Realistic fp16 scales instead of random bits, some of them subnormal.
        const int64_t size = bytes(format);
        for (int64_t b = 0; format != deltaw::NF4 && b < data.count; b += size) {
            const int64_t first = format == deltaw::Q6_K ? 208 : 0;
            const bool two = format == deltaw::Q4_1 || format == deltaw::Q4_K || format == deltaw::Q5_K;
            for (int64_t i = first; i <= first + 2 * two; i += 2) {
                uint8_t &upper = data[b + i + 1];
                const int64_t kind = b / size % 9;
                upper = kind == 4 ? 0 : kind == 5 ? 0x82 : 0x24 | (upper & 0x83);
            }
        }
    }

    static double half(const uint8_t *p) {
        const int h = p[0] | p[1] << 8, exponent = h >> 10 & 31;
        const double size = exponent ? std::ldexp(1024 + (h & 1023), exponent - 25) : std::ldexp(h & 1023, -24);
        return h & 0x8000 ? -size : size;
    }

    // Products of a scale and a code are exact, so each value is rounded once to fp32.
    double value(int64_t row, int64_t k) const {
        using namespace deltaw;
        const int64_t block = (row * columns + k) / numbers(format);
        const uint8_t *const b = data.data() + block * bytes(format);
        const int n = (int)(k % numbers(format)), i = n % 32, unit = n / 32;
        auto nibble = [](uint8_t byte, int upper) { return upper ? byte >> 4 : byte & 15; };
        if (format == Q4_0) return half(b) * (nibble(b[2 + n % 16], n / 16) - 8);
        if (format == Q4_1) return (float)(half(b) * nibble(b[4 + n % 16], n / 16) + half(b + 2));
        if (format == Q8_0) return half(b) * (int8_t)b[2 + n];
        if (format == Q4_K || format == Q5_K) {
            const uint8_t *const s = b + 4;
            const int scale = unit < 4 ? s[unit] & 63 : (s[unit + 4] & 15) + 16 * (s[unit - 4] >> 6);
            const int below = unit < 4 ? s[unit + 4] & 63 : (s[unit + 4] >> 4) + 16 * (s[unit] >> 6);
            int code = nibble(b[(format == Q4_K ? 16 : 48) + 32 * (unit / 2) + i], unit % 2);
            if (format == Q5_K) code += 16 * (b[16 + i] >> unit & 1);
            return (float)(half(b) * scale * code - half(b + 2) * below);
        }
        if (format == Q6_K) {
            const int code = nibble(b[64 * (unit / 4) + 32 * (unit % 2) + i], unit % 4 / 2) + 16 * (b[128 + 32 * (unit / 4) +
                i] >> 2 * (unit % 4) & 3);
            return half(b + 208) * (int8_t)b[192 + n / 16] * (code - 32);
        }
        static const float values[16] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
                                         -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
                                         0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
                                         0.7229568362236023f, 1.0f};
        volatile const float product = codes[absmax[block]] * group_scale[block / 256];
        const float scale = product + offset[0];
        return values[nibble(b[i], unit)] * scale;
    }

    Numbers values() const {
        Numbers found(rows * columns);
        for (int64_t i = 0; i < rows * columns; i++) found[i] = value(i / columns, i % columns);
        return found;
    }
};
