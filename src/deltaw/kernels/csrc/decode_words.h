// Products of one word of the left side with 16 words of the right side. A word is one fp32 number, or two bf16 numbers
// that are multiplied with two others and summed.
#pragma once
#include "decode_dots.h"

namespace deltaw {

inline int32_t word_at(const void *words, int64_t i) {
    int32_t word;
    memcpy(&word, (const char *)words + 4 * i, 4);
    return word;
}
inline int64_t words_of(int64_t type, int64_t numbers) { return type == F32 ? numbers : (numbers + 1) / 2; }

struct WordsF32 {
    static constexpr int EACH = 1;  // numbers per word
    static void add(F16 &s, I16 a, I16 b) { add_product(s, from_bits(a), from_bits(b)); }
};
struct WordsWide {  // bf16, widened to fp32
    static constexpr int EACH = 2;
    static void add(F16 &s, I16 a, I16 b) {
        const I16 upper = set_i((int32_t)0xffff0000);
        add_product(s, from_bits(a << 16), from_bits(b << 16));
        add_product(s, from_bits(a & upper), from_bits(b & upper));
    }
};
#ifdef DW_BF16_DOT
struct WordsDot {
    static constexpr int EACH = 2;
    static void add(F16 &s, I16 a, I16 b) { DotBF16::add(s, a, b); }
};
#endif

// Call body(words) with the Words for a type, F32 or BF16.
template <class Body>
inline void with_words(int64_t type, Body &&body) {
    if (type == F32) return body(WordsF32());
#ifdef DW_BF16_DOT
    if (selected_arithmetic(BF16) != WIDE) return body(WordsDot());
#endif
    body(WordsWide());
}

// Write numbers as words of a type. out: words_of(type, size) words.
inline void write_words(int64_t type, const float *numbers, int64_t size, void *out) {
    if (type == F32) {
        memcpy(out, numbers, size * sizeof(float));
        return;
    }
    for (int64_t c = 0; c < size; c += 16)
        store_u16((bf16 *)out + c, bf16_bits(load16(numbers + c, first(size - c))), first(2 * words_of(BF16, size) - c));
}

}  // namespace deltaw
