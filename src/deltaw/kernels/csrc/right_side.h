// Right side of a product: its storage, and the packing of 32 of its columns for `products`. It is packed again for
// each call, which costs 1 to 3 % of the product and avoids a second copy of the weights.
#pragma once
#include "blocks.h"
#include "multiply.h"
#include "scratch.h"

namespace deltaw {

const int PANEL = 32;  // columns packed at a time

struct Right {  // (K, N): element (k, n) at n·ld + k if `by_column`, else at k·ld + n
    const void *data;  // for block types a BlockData with rows of `ld` numbers
    int64_t ld;
    int type;
    int by_column;
    float scale;  // factor of fp32 data
    // Scales for quantizing bf16 data to int8 while packing: (N) if `by_column`, else (K).
    const float *int8_scale = nullptr;

    // True if rows of bf16 data are quantized to int8 with a scale per row.
    bool quantizes_rows() const { return type == BF16 && !by_column && int8_scale; }
    int64_t number_size() const { return type == F32 ? 4 : type == BF16 ? 2 : 1; }
    // Byte offset of number k in a row, or of the block that contains it.
    int64_t byte_offset(int64_t k) const { return stored_in_blocks(type) ? block_byte_offset(type, k) : k * number_size(); }
    const char *memory() const { return (const char *)(stored_in_blocks(type) ? ((const BlockData *)data)->data : data); }
};

namespace packing {

inline F16 inverse(float scale) { return set_f(scale > 0 ? 1.0f / scale : 0.0f); }
// Write the inverses of `count` scales to an array whose size is a multiple of 16.
inline void inverses(const float *scales, int64_t count, float *to) {
    for (int64_t k = 0; k < count; k += 16) {
        const F16 x = load16(scales + k, first(count - k));
        store16(to + k, select(not_less(zero_f(), x), zero_f(), set_f(1.0f) / x));
    }
}

// How a group is formed from PER_GROUP rows of numbers, and how a line of numbers is converted before it is split into
// groups.
template <class Op>
struct Groups;

// fp32, one number per group.
template <>
struct Groups<Fma> {
    typedef float Number;
    static I16 pack_group(const I16 *numbers) { return numbers[0]; }
    static void store(float *to, I16 numbers) { store_i(to, numbers); }
    static void store(float *to, I16 numbers, First m) { store_i(to, numbers, m); }
    static I16 number(F16 x) { return bits_of(x); }
    static I16 number(const float *p, First m) { return load_i(p, m); }
    static I16 number(const bf16 *p, First m) { return load_u16(p, m) << 16; }
    static I16 number(const int8_t *p, First m) { return bits_of(to_f(load_s8(p, m))); }
};

// Two 16-bit numbers per group.
struct Pairs {
    typedef bf16 Number;
    static I16 pack_group(const I16 *numbers) { return (numbers[0] & set_i(0xffff)) | (numbers[1] << 16); }
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
    static I16 pack_group(const I16 *numbers) {
        const I16 low = set_i(255);
        return (numbers[0] & low) | ((numbers[1] & low) << 8) | ((numbers[2] & low) << 16) | (numbers[3] << 24);
    }
    // Writes 16 numbers regardless of m.
    static void store(int8_t *to, I16 numbers, First) { store_s8(to, numbers); }
    static I16 number(F16 x) { return to_int(x); }
    static I16 number(const float *p, First m) { return to_int(load16(p, m)); }
    static I16 number(const bf16 *p, First m) { return to_int(load16(p, m)); }
    static I16 number(const int8_t *p, First m) { return load_s8(p, m); }
};
#endif

// Selects the Groups of an Op from its base class, which defines the multiplication.
template <class Op>
struct GroupsOf {
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

// Load numbers of one row or column times its scale.
template <class G, class T>
inline I16 scaled(const T *p, First m, F16 by) {
    return G::number(load16(p, m) * by);
}

// `by_column`: numbers stored in the form in which they are multiplied.
inline void pack_columns_directly(const Right &b, int64_t size, int64_t N, int64_t n0, int64_t k0, int64_t groups, int vecs, char *into) {
    for (int v = 0; v < vecs; v++) {
        const char *rows[16];
        for (int i = 0; i < 16; i++) {
            const int64_t n = n0 + 16 * v + i;
            rows[i] = n < N ? (const char *)b.data + (n * b.ld + k0) * size : nullptr;
        }
        pack_rows16(rows, groups, into + 64 * v, 128);
    }
}

// `by_column`: bf16 numbers widened to fp32, one per group.
inline void pack_columns_widened(const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t groups, int vecs, char *into) {
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

// `by_column`: numbers converted while packing, one line of each column at a time, with the converter returned by
// `column_reader`.
template <class Op, class T, class ColumnReader>
inline void pack_columns_converted(const T *data, const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t depth, int64_t groups, int vecs,
                                   char *into,
                              ColumnReader &&column_reader) {
    typedef typename GroupsOf<Op>::type G;
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
            const auto convert = column_reader(n);
            const T *const from = data + n * b.ld + k0;
            for (int64_t k = 0; k < line; k += 16) G::store(to + k, convert(from + k, first(depth - k)), first(line - k));
        }
        pack_rows16(rows, groups, into + 64 * v, 128);
    }
}

// Not `by_column`: 16 columns from n, with groups that span rows. `by` receives a row.
template <class Op, class T, class Scale>
inline void pack_rows_converted(const T *data, const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, First m, char *to, Scale &&by) {
    typedef typename GroupsOf<Op>::type G;
    constexpr int PER = Op::PER_GROUP;
    for (int64_t g = 0; g < groups; g++, to += 128) {
        I16 numbers[PER];
        for (int j = 0; j < PER; j++) {
            const int64_t k = PER * g + j;
            numbers[j] = k < depth ? by(data + (k0 + k) * b.ld + n, m, k0 + k) : zero_i();
        }
        store_i(to, G::pack_group(numbers));
    }
}

#if defined(DW_INT8_DOT) && defined(__SSE2__)
// Signed 8-bit numbers, four rows per group.
inline void pack_int8_rows(const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, int64_t columns, char *to) {
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
#define DW_PACKS_INT8_ROWS 1
#elif defined(DW_INT8_DOT) && defined(__ARM_NEON)
inline void pack_int8_rows(const Right &b, int64_t n, int64_t k0, int64_t depth, int64_t groups, int64_t columns, char *to) {
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
#define DW_PACKS_INT8_ROWS 1
#endif

// Numbers of block formats are rounded to bf16, and widened again if groups are fp32.
inline I16 bf16_as_float_bits(F16 x) { return bf16_bits(x) << 16; }

// `by_column`: 32 numbers of each of 16 rows of blocks at a time.
template <class Op, class Rows>
inline void pack_block_columns(const Rows &rows, int64_t N, int64_t n0, int64_t k0, int64_t depth, int vecs, char *into) {
    constexpr int PER = Op::PER_GROUP;
    for (int v = 0; v < vecs; v++)
        for (int64_t k = 0; k < depth; k += UNIT) {
            I16 r[2 / PER][16];
            for (int i = 0; i < 16; i++) {
                const int64_t n = n0 + 16 * v + i;
                F16 x[2] = {zero_f(), zero_f()};
                if (n < N) rows.read(n, k0 + k, x);
                if constexpr (PER == 2) r[0][i] = bf16_bits_concat(x[0], x[1]);
                else r[0][i] = bf16_as_float_bits(x[0]), r[1][i] = bf16_as_float_bits(x[1]);
            }
            for (int part = 0; part < 2 / PER; part++) {
                transpose16(r[part]);
                for (int i = 0; i < 16; i++) store_i(into + (k / PER + 16 * part + i) * 128 + 64 * v, r[part][i]);
            }
        }
}

// Not `by_column`: both halves of a panel at a time, which is one unit of each row.
template <class Op, class Rows>
inline void pack_block_rows(const Rows &rows, int64_t n0, int64_t k0, int64_t depth, int64_t groups, char *to) {
    constexpr int PER = Op::PER_GROUP;
    for (int64_t g = 0; g < groups; g++, to += 128) {
        F16 x[PER][2];
        for (int j = 0; j < PER; j++) {
            x[j][0] = x[j][1] = zero_f();
            if (PER * g + j < depth) rows.read(k0 + PER * g + j, n0, x[j]);
        }
        for (int v = 0; v < 2; v++) {
            if constexpr (PER == 2) store_i(to + 64 * v, bf16_bits_interleaved(x[0][v], x[1][v]));
            else store_i(to + 64 * v, bf16_as_float_bits(x[0][v]));
        }
    }
}

// For products of fp32 or bf16. int8 products do not have a right side in blocks.
template <class Op>
inline void pack_blocks(const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t depth, int64_t groups, int vecs, char *into) {
    if constexpr (!std::is_same<typename Op::Left, uint8_t>::value)
        with_format(b.type, [&](auto format) {
            const BlockRows<decltype(format)::value> rows(b.data, b.ld);
            if (b.by_column) pack_block_columns<Op>(rows, N, n0, k0, depth, vecs, into);
            else pack_block_rows<Op>(rows, n0, k0, depth, groups, into);
        });
}

template <class Op>
inline void pack_columns(const Right &b, int64_t N, int64_t n0, int64_t k0, int64_t depth, int64_t groups, int vecs, char *into) {
    typedef typename GroupsOf<Op>::type G;
    constexpr int64_t SIZE = 4 / Op::PER_GROUP;
    if (b.type == F32) {
        if (Op::PER_GROUP == 1 && b.scale == 1.0f) return pack_columns_directly(b, SIZE, N, n0, k0, groups, vecs, into);
        const F16 by = set_f(b.scale);
        pack_columns_converted<Op>((const float *)b.data, b, N, n0, k0, depth, groups, vecs, into,
                              [&](int64_t) { return [by](const float *p, First m) { return scaled<G>(p, m, by); }; });
    } else if (b.type == INT8) {
        if (Op::PER_GROUP == 4) return pack_columns_directly(b, SIZE, N, n0, k0, groups, vecs, into);
        pack_columns_converted<Op>((const int8_t *)b.data, b, N, n0, k0, depth, groups, vecs, into,
                              [&](int64_t) { return [](const int8_t *p, First m) { return G::number(p, m); }; });
    } else if (b.int8_scale) {
        pack_columns_converted<Op>((const bf16 *)b.data, b, N, n0, k0, depth, groups, vecs, into, [&](int64_t n) {
            return [by = inverse(b.int8_scale[n])](const bf16 *p, First m) { return scaled<G>(p, m, by); };
        });
    } else if (Op::PER_GROUP == 1) pack_columns_widened(b, N, n0, k0, groups, vecs, into);
    else pack_columns_directly(b, SIZE, N, n0, k0, groups, vecs, into);
}

// `by`: factors of row k0 and following rows if they are quantized to int8.
template <class Op>
inline void pack_rows(const Right &b, int64_t N, int64_t n, int64_t k0, int64_t depth, int64_t groups, const float *by, char *to) {
    typedef typename GroupsOf<Op>::type G;
    const First m = first(N - n);
    if (b.type == F32) {
        const F16 scale = set_f(b.scale);
        pack_rows_converted<Op>((const float *)b.data, b, n, k0, depth, groups, m, to,
                           [&](const float *p, First some, int64_t) { return scaled<G>(p, some, scale); });
    } else if (b.type == INT8) {
#if defined(DW_PACKS_INT8_ROWS)
        if (Op::PER_GROUP == 4) return pack_int8_rows(b, n, k0, depth, groups, N - n, to);
#endif
        pack_rows_converted<Op>((const int8_t *)b.data, b, n, k0, depth, groups, m, to,
                           [&](const int8_t *p, First some, int64_t) { return G::number(p, some); });
    } else if (b.int8_scale) {
        pack_rows_converted<Op>((const bf16 *)b.data, b, n, k0, depth, groups, m, to,
                           [&](const bf16 *p, First some, int64_t k) { return scaled<G>(p, some, set_f(by[k - k0])); });
    } else
        pack_rows_converted<Op>((const bf16 *)b.data, b, n, k0, depth, groups, m, to,
                           [&](const bf16 *p, First some, int64_t) { return G::number(p, some); });
}

}  // namespace packing

// Pack columns n0 … n0+31 and groups g0 … g0+groups-1 of the right side for `products`.
template <class Op>
inline void pack(const Right &b, int64_t K, int64_t N, int64_t n0, int64_t g0, int64_t groups, char *into) {
    const int64_t k0 = g0 * Op::PER_GROUP, depth = std::min(K - k0, groups * Op::PER_GROUP);
    const int vecs = N - n0 > 16 ? 2 : 1;
    if (stored_in_blocks(b.type)) return packing::pack_blocks<Op>(b, N, n0, k0, depth, groups, vecs, into);
    if (b.by_column) return packing::pack_columns<Op>(b, N, n0, k0, depth, groups, vecs, into);
    Scratch scratch;
    float *by = nullptr;
    if (b.quantizes_rows()) {
        by = scratch.take<float>((depth + 15) / 16 * 16);
        packing::inverses(b.int8_scale + k0, depth, by);
    }
    for (int v = 0; v < vecs; v++) packing::pack_rows<Op>(b, N, n0 + 16 * v, k0, depth, groups, by, into + 64 * v);
}

// Prefetches the memory of the next panel to pack, some lines at a time while the current panel is processed.
struct Prefetcher {
    const char *base = nullptr;
    int64_t rows = 0, bytes = 0, stride = 0, row = 0, at = 0;

    template <class Op>
    void panel(const Right &b, int64_t K, int64_t N, int64_t n0, int64_t g0, int64_t groups) {
        const int64_t k0 = g0 * Op::PER_GROUP, deep = std::min(K - k0, groups * Op::PER_GROUP), wide = std::min<int64_t>(N - n0, PANEL);
        const int64_t row0 = b.by_column ? n0 : k0, from = b.by_column ? k0 : n0, count = b.by_column ? deep : wide;
        rows = b.by_column ? wide : deep;
        stride = b.byte_offset(b.ld);
        const int64_t begin = b.byte_offset(from);
        bytes = stored_in_blocks(b.type) ? b.byte_offset(from + count - 1) + block_bytes(b.type) - begin : count * b.number_size();
        base = b.memory() + row0 * stride + begin;
        row = at = 0;
    }
    int64_t lines() const { return rows * ((bytes + 63) / 64); }
    // Prefetch into the second-level cache. In the first-level cache, lines whose distance is a large power of two
    // would evict each other.
    void fetch(int64_t count) {
        for (; count > 0 && row < rows; count--) {
            __builtin_prefetch(base + row * stride + at, 0, 2);
            at += 64;
            if (at >= bytes) at = 0, row++;
        }
    }
};

}  // namespace deltaw
