// The right side of a product: where it lies, and how 32 of its columns are laid out for `products` to read.
// It is laid out anew for each call, which costs 1 to 3 % of the product and needs no second copy of the weights.
#pragma once
#include "blocks.h"
#include "multiply.h"
#include "scratch.h"

namespace deltaw {

const int PANEL = 32;  // columns that are laid out at a time

struct Right {  // (K, N): element (k, n) at n·ld + k where `by_column`, else at k·ld + n
    const void *data;  // of a type in blocks a BlockData, whose rows are `ld` numbers
    int64_t ld;
    int type;
    int by_column;
    float scale;  // of fp32 data
    // Of bf16 data that are rounded to int8 here: what they are divided by, (N) where `by_column`, else (K).
    const float *int8_scale = nullptr;

    // Whether rows of bf16 data are rounded to int8, each by a scale of its own.
    bool rounds_rows() const { return type == BF16 && !by_column && int8_scale; }
    int64_t number_size() const { return type == F32 ? 4 : type == BF16 ? 2 : 1; }
    // Bytes in front of number k of a row, or of the block that it stands in.
    int64_t bytes_to(int64_t k) const { return stored_in_blocks(type) ? bytes_before(type, k) : k * number_size(); }
    const char *memory() const { return (const char *)(stored_in_blocks(type) ? ((const BlockData *)data)->data : data); }
};

namespace packing {

inline F16 inverse(float scale) { return set_f(scale > 0 ? 1.0f / scale : 0.0f); }
// Of `count` scales, in room for a multiple of 16.
inline void inverses(const float *scales, int64_t count, float *to) {
    for (int64_t k = 0; k < count; k += 16) {
        const F16 x = load16(scales + k, first(count - k));
        store16(to + k, select(not_less(zero_f(), x), zero_f(), set_f(1.0f) / x));
    }
}

// How a group is made of PER_GROUP rows of numbers, and what a line of numbers becomes before it is cut into groups.
template <class Op>
struct Groups;

// fp32, one a group.
template <>
struct Groups<Fma> {
    typedef float Number;
    static I16 of_rows(const I16 *numbers) { return numbers[0]; }
    static void store(float *to, I16 numbers) { store_i(to, numbers); }
    static void store(float *to, I16 numbers, First m) { store_i(to, numbers, m); }
    static I16 number(F16 x) { return bits_of(x); }
    static I16 number(const float *p, First m) { return load_i(p, m); }
    static I16 number(const bf16 *p, First m) { return load_u16(p, m) << 16; }
    static I16 number(const int8_t *p, First m) { return bits_of(to_f(load_s8(p, m))); }
};

// Two numbers of 16 bits.
struct Pairs {
    typedef bf16 Number;
    static I16 of_rows(const I16 *numbers) { return (numbers[0] & set_i(0xffff)) | (numbers[1] << 16); }
    static void store(bf16 *to, I16 numbers, First m) { store_u16(to, numbers, m); }
};
#ifdef DW_BF16_DOT
template <>
struct Groups<Bf16Dot> : Pairs {
    static I16 number(F16 x) { return bf16_bits(x); }
    static I16 number(const float *p, First m) { return bf16_bits(load16(p, m)); }
    static I16 number(const bf16 *p, First m) { return load_u16(p, m); }
    static I16 number(const int8_t *p, First m) { return bf16_bits(to_f(load_s8(p, m))); }
};
#endif
template <>
struct Groups<Int16Dot> : Pairs {
    static I16 number(F16 x) { return to_int(x); }
    static I16 number(const float *p, First m) { return to_int(load16(p, m)); }
    static I16 number(const bf16 *p, First m) { return to_int(load16(p, m)); }
    static I16 number(const int8_t *p, First m) { return load_s8(p, m); }
};
#ifdef DW_INT8_DOT
template <>
struct Groups<Int8Dot> {
    typedef int8_t Number;
    static I16 of_rows(const I16 *numbers) {
        const I16 low = set_i(255);
        return (numbers[0] & low) | ((numbers[1] & low) << 8) | ((numbers[2] & low) << 16) | (numbers[3] << 24);
    }
    // Into room for 16, whatever m is.
    static void store(int8_t *to, I16 numbers, First) { store_s8(to, numbers); }
    static I16 number(F16 x) { return to_int(x); }
    static I16 number(const float *p, First m) { return to_int(load16(p, m)); }
    static I16 number(const bf16 *p, First m) { return to_int(load16(p, m)); }
    static I16 number(const int8_t *p, First m) { return load_s8(p, m); }
};
#endif

// Which of Groups an Op has: that of its base, which says how it multiplies.
template <class Op>
struct KindOf {
    static Fma of(const Fma *);
#ifdef DW_BF16_DOT
    static Bf16Dot of(const Bf16Dot *);
#endif
#ifdef DW_INT8_DOT
    static Int8Dot of(const Int8Dot *);
#endif
    static Int16Dot of(const Int16Dot *);
    typedef Groups<decltype(of((const Op *)nullptr))> type;
};

// Numbers of one row or column times its scale.
template <class G, class T>
inline I16 scaled(const T *p, First m, F16 by) {
    return G::number(load16(p, m) * by);
}

// Where `by_column`: numbers that lie as they are multiplied.
inline void columns_as_they_are(const Right &b, int64_t size, int64_t N, int64_t n0, int64_t k0, int64_t groups, int vecs, char *into) {
    for (int v = 0; v < vecs; v++) {
        const char *rows[16];
        for (int i = 0; i < 16; i++) {
            const int64_t n = n0 + 16 * v + i;
            rows[i] = n < N ? (const char *)b.data + (n * b.ld + k0) * size : nullptr;
        }
        pack_rows16(rows, groups, into + 64 * v, 128);
    }
}

// Where `by_column`: bf16 numbers widened to fp32, one a group.
inline void columns_widened(const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t groups, int vecs, char *into) {
    for (int v = 0; v < vecs; v++)
        for (int64_t g = 0; g < groups; g += 16) {
            const First m = first(groups - g);
            I16 r[16];
            for (int i = 0; i < 16; i++) {
                const int64_t n = n0 + 16 * v + i;
                r[i] = n < N ? load_u16((const bf16 *)b.data + n * b.ld + k0 + g, m) << 16 : zero_i();
            }
            transpose16(r);
            const int64_t count = std::min<int64_t>(16, groups - g);
            for (int i = 0; i < count; i++) store_i(into + (g + i) * 128 + 64 * v, r[i]);
        }
}

// Where `by_column`: numbers that are converted on the way, a line of each column at a time, by what `of_column` gives.
template <class Op, class T, class OfColumn>
inline void columns_converted(const T *data, const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t depth, int64_t groups, int vecs, char *into,
                              OfColumn &&of_column) {
    typedef typename KindOf<Op>::type G;
    typedef typename G::Number Number;
    const int64_t line = groups * Op::PER_GROUP;
    Scratch scratch;
    Number *const lines = scratch.take<Number>(16 * line + 16);
    for (int v = 0; v < vecs; v++) {
        const char *rows[16];
        for (int i = 0; i < 16; i++) {
            const int64_t n = n0 + 16 * v + i;
            Number *const to = lines + i * line;
            rows[i] = n < N ? (const char *)to : nullptr;
            if (n >= N) continue;
            const auto convert = of_column(n);
            const T *const from = data + n * b.ld + k0;
            for (int64_t k = 0; k < line; k += 16) G::store(to + k, convert(from + k, first(depth - k)), first(line - k));
        }
        pack_rows16(rows, groups, into + 64 * v, 128);
    }
}

// Not `by_column`: 16 columns from n on, whose groups span rows. `by` is given a row.
template <class Op, class T, class Scale>
inline void rows_converted(const T *data, const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, First m, char *to, Scale &&by) {
    typedef typename KindOf<Op>::type G;
    constexpr int PER = Op::PER_GROUP;
    for (int64_t g = 0; g < groups; g++, to += 128) {
        I16 numbers[PER];
        for (int j = 0; j < PER; j++) {
            const int64_t k = PER * g + j;
            numbers[j] = k < depth ? by(data + (k0 + k) * b.ld + n, m, k0 + k) : zero_i();
        }
        store_i(to, G::of_rows(numbers));
    }
}

#if defined(DW_INT8_DOT) && defined(__SSE2__)
// Signed numbers of 8 bits as they lie, four rows to a group.
inline void rows_of_int8(const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, int64_t columns, char *to) {
    const int8_t *q = (const int8_t *)b.data + k0 * b.ld + n;
    const size_t count = (size_t)std::min<int64_t>(16, columns);
    for (int64_t g = 0; g < groups; g++, q += 4 * b.ld, to += 128) {
        __m128i r[4];
        for (int j = 0; j < 4; j++) {
            r[j] = _mm_setzero_si128();
            if (4 * g + j >= depth) continue;
            if (count == 16) r[j] = _mm_loadu_si128((const __m128i *)(q + j * b.ld));
            else memcpy(&r[j], q + j * b.ld, count);
        }
        const __m128i low = _mm_unpacklo_epi8(r[0], r[1]), high = _mm_unpackhi_epi8(r[0], r[1]);
        const __m128i low2 = _mm_unpacklo_epi8(r[2], r[3]), high2 = _mm_unpackhi_epi8(r[2], r[3]);
        _mm_store_si128((__m128i *)to, _mm_unpacklo_epi16(low, low2));
        _mm_store_si128((__m128i *)to + 1, _mm_unpackhi_epi16(low, low2));
        _mm_store_si128((__m128i *)to + 2, _mm_unpacklo_epi16(high, high2));
        _mm_store_si128((__m128i *)to + 3, _mm_unpackhi_epi16(high, high2));
    }
}
#define DW_ROWS_OF_INT8 1
#elif defined(DW_INT8_DOT) && defined(__ARM_NEON)
inline void rows_of_int8(const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, int64_t columns, char *to) {
    const int8_t *q = (const int8_t *)b.data + k0 * b.ld + n;
    const size_t count = (size_t)std::min<int64_t>(16, columns);
    for (int64_t g = 0; g < groups; g++, q += 4 * b.ld, to += 128) {
        int8x16x4_t r{};
        for (int j = 0; j < 4 && 4 * g + j < depth; j++) {
            if (count == 16) r.val[j] = vld1q_s8(q + j * b.ld);
            else memcpy(&r.val[j], q + j * b.ld, count);
        }
        vst4q_s8((int8_t *)to, r);
    }
}
#define DW_ROWS_OF_INT8 1
#endif

// Numbers in blocks go in as products of bf16 have them: rounded to bf16, and widened again where a group is of fp32.
inline I16 wide_number(F16 x) { return bf16_bits(x) << 16; }

// Where `by_column`: 32 numbers of each of 16 rows of blocks at a time.
template <class Op, class Rows>
inline void columns_of_blocks(const Rows &rows, int64_t N, int64_t n0, int64_t k0, int64_t depth, int vecs, char *into) {
    constexpr int PER = Op::PER_GROUP;
    for (int v = 0; v < vecs; v++)
        for (int64_t k = 0; k < depth; k += UNIT) {
            I16 r[2 / PER][16];
            for (int i = 0; i < 16; i++) {
                const int64_t n = n0 + 16 * v + i;
                F16 x[2] = {zero_f(), zero_f()};
                if (n < N) rows.read(n, k0 + k, x);
                if constexpr (PER == 2) r[0][i] = bf16_bits_of_both(x[0], x[1]);
                else r[0][i] = wide_number(x[0]), r[1][i] = wide_number(x[1]);
            }
            for (int part = 0; part < 2 / PER; part++) {
                transpose16(r[part]);
                for (int i = 0; i < 16; i++) store_i(into + (k / PER + 16 * part + i) * 128 + 64 * v, r[part][i]);
            }
        }
}

// Not `by_column`: both halves of a panel at once, which is a unit of each row.
template <class Op, class Rows>
inline void rows_of_blocks(const Rows &rows, int64_t n0, int64_t k0, int64_t depth, int64_t groups, char *to) {
    constexpr int PER = Op::PER_GROUP;
    for (int64_t g = 0; g < groups; g++, to += 128) {
        F16 x[PER][2];
        for (int j = 0; j < PER; j++) {
            x[j][0] = x[j][1] = zero_f();
            if (PER * g + j < depth) rows.read(k0 + PER * g + j, n0, x[j]);
        }
        for (int v = 0; v < 2; v++) {
            if constexpr (PER == 2) store_i(to + 64 * v, bf16_bits_in_turn(x[0][v], x[1][v]));
            else store_i(to + 64 * v, wide_number(x[0][v]));
        }
    }
}

// Of products of fp32 or bf16; none of int8 has its right side in blocks.
template <class Op>
inline void pack_blocks(const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t depth, int64_t groups, int vecs, char *into) {
    if constexpr (!std::is_same<typename Op::Left, uint8_t>::value)
        with_format(b.type, [&](auto format) {
            const BlockRows<decltype(format)::value> rows(b.data, b.ld);
            if (b.by_column) columns_of_blocks<Op>(rows, N, n0, k0, depth, vecs, into);
            else rows_of_blocks<Op>(rows, n0, k0, depth, groups, into);
        });
}

template <class Op>
inline void pack_columns(const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t depth, int64_t groups, int vecs, char *into) {
    typedef typename KindOf<Op>::type G;
    constexpr int64_t SIZE = 4 / Op::PER_GROUP;
    if (b.type == F32) {
        if (Op::PER_GROUP == 1 && b.scale == 1.0f) return columns_as_they_are(b, SIZE, N, n0, k0, groups, vecs, into);
        const F16 by = set_f(b.scale);
        columns_converted<Op>((const float *)b.data, b, N, n0, k0, depth, groups, vecs, into,
                              [&](int64_t) { return [by](const float *p, First m) { return scaled<G>(p, m, by); }; });
    } else if (b.type == INT8) {
        if (Op::PER_GROUP == 4) return columns_as_they_are(b, SIZE, N, n0, k0, groups, vecs, into);
        columns_converted<Op>((const int8_t *)b.data, b, N, n0, k0, depth, groups, vecs, into,
                              [&](int64_t) { return [](const int8_t *p, First m) { return G::number(p, m); }; });
    } else if (b.int8_scale) {
        columns_converted<Op>((const bf16 *)b.data, b, N, n0, k0, depth, groups, vecs, into, [&](int64_t n) {
            return [by = inverse(b.int8_scale[n])](const bf16 *p, First m) { return scaled<G>(p, m, by); };
        });
    } else if (Op::PER_GROUP == 1) columns_widened(b, N, n0, k0, groups, vecs, into);
    else columns_as_they_are(b, SIZE, N, n0, k0, groups, vecs, into);
}

// `by`: what row k0 and the next ones are multiplied by, where they are rounded to int8.
template <class Op>
inline void pack_rows(const Right &b, int64_t N, int64_t n, int64_t k0, int64_t depth, int64_t groups, const float *by, char *to) {
    typedef typename KindOf<Op>::type G;
    const First m = first(N - n);
    if (b.type == F32) {
        const F16 scale = set_f(b.scale);
        rows_converted<Op>((const float *)b.data, b, n, k0, depth, groups, m, to,
                           [&](const float *p, First some, int64_t) { return scaled<G>(p, some, scale); });
    } else if (b.type == INT8) {
#if defined(DW_ROWS_OF_INT8)
        if (Op::PER_GROUP == 4) return rows_of_int8(b, n, k0, depth, groups, N - n, to);
#endif
        rows_converted<Op>((const int8_t *)b.data, b, n, k0, depth, groups, m, to,
                           [&](const int8_t *p, First some, int64_t) { return G::number(p, some); });
    } else if (b.int8_scale) {
        rows_converted<Op>((const bf16 *)b.data, b, n, k0, depth, groups, m, to,
                           [&](const bf16 *p, First some, int64_t k) { return scaled<G>(p, some, set_f(by[k - k0])); });
    } else
        rows_converted<Op>((const bf16 *)b.data, b, n, k0, depth, groups, m, to,
                           [&](const bf16 *p, First some, int64_t) { return G::number(p, some); });
}

}  // namespace packing

// Columns n0 … n0+31 and groups g0 … g0+groups-1 of the right side, as `products` reads them.
template <class Op>
inline void pack(const Right &b, int64_t K, int64_t N, int64_t n0, int64_t g0, int64_t groups, char *into) {
    const int64_t k0 = g0 * Op::PER_GROUP, depth = std::min(K - k0, groups * Op::PER_GROUP);
    const int vecs = N - n0 > 16 ? 2 : 1;
    if (stored_in_blocks(b.type)) return packing::pack_blocks<Op>(b, N, n0, k0, depth, groups, vecs, into);
    if (b.by_column) return packing::pack_columns<Op>(b, N, n0, k0, depth, groups, vecs, into);
    Scratch scratch;
    float *by = nullptr;
    if (b.rounds_rows()) {
        by = scratch.take<float>((depth + 15) / 16 * 16);
        packing::inverses(b.int8_scale + k0, depth, by);
    }
    for (int v = 0; v < vecs; v++) packing::pack_rows<Op>(b, N, n0 + 16 * v, k0, depth, groups, by, into + 64 * v);
}

// Fetches the memory that the next panel will be packed from, a few lines at a time while this one is worked on.
struct Ahead {
    const char *base = nullptr;
    int64_t rows = 0, bytes = 0, stride = 0, row = 0, at = 0;

    template <class Op>
    void panel(const Right &b, int64_t K, int64_t N, int64_t n0, int64_t g0, int64_t groups) {
        const int64_t k0 = g0 * Op::PER_GROUP, deep = std::min(K - k0, groups * Op::PER_GROUP), wide = std::min<int64_t>(N - n0, PANEL);
        const int64_t row0 = b.by_column ? n0 : k0, from = b.by_column ? k0 : n0, count = b.by_column ? deep : wide;
        rows = b.by_column ? wide : deep;
        stride = b.bytes_to(b.ld);
        const int64_t begin = b.bytes_to(from);
        bytes = stored_in_blocks(b.type) ? b.bytes_to(from + count - 1) + bytes_of_block(b.type) - begin : count * b.number_size();
        base = b.memory() + row0 * stride + begin;
        row = at = 0;
    }
    int64_t lines() const { return rows * ((bytes + 63) / 64); }
    // Into the second-level cache: lines whose distance is a large power of two would push each other out of the first.
    void fetch(int64_t count) {
        for (; count > 0 && row < rows; count--) {
            __builtin_prefetch(base + row * stride + at, 0, 2);
            at += 64;
            if (at >= bytes) at = 0, row++;
        }
    }
};

}  // namespace deltaw
