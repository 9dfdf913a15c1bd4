// bf16 numbers in memory: the upper halves of fp32 numbers.
#pragma once
#include <cstdint>
#include <cstring>

typedef uint16_t bf16;

namespace deltaw {

inline float to_float(bf16 v) { uint32_t b = (uint32_t)v << 16; float f; memcpy(&f, &b, 4); return f; }
inline float to_float(float v) { return v; }

}  // namespace deltaw
