// The tile registers of AMX: eight of 16 rows of 64 bytes. With DW_AMX_EMULATED arrays stand for them, so that what is
// built over them can be tested on any processor: they stop the program where the processor would.
//
// Tiles 0 … 3 hold sums, 4 and 5 rows of a left side, 6 and 7 lines of a right side.
#pragma once
#include <cstdint>

#if defined(__AMX_TILE__) || defined(DW_AMX_EMULATED)
#define DW_AMX 1

namespace deltaw {
namespace tiles {

const int ROWS = 16, BYTES = 64;  // of a tile

// What the processor is told of the tiles' sizes, laid out as it reads it.
struct Sizes {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];

    // Left sides and sums of `count` rows; right sides are always full.
    constexpr explicit Sizes(int count) : palette(1), start_row(0), reserved(), bytes(), rows() {
        for (int t = 0; t < 8; t++) bytes[t] = BYTES, rows[t] = (uint8_t)(t < 6 ? count : ROWS);
    }
};

}  // namespace tiles
}  // namespace deltaw

#ifndef DW_AMX_EMULATED

namespace deltaw {
namespace tiles {

// Assembly, since the compilers' own forms want the number of a tile spelled out, and some of them do not say that
// memory is read. A tile's number is a template argument.
inline void configure(const Sizes &sizes) { __asm__ volatile("ldtilecfg %0" : : "m"(sizes)); }
inline void release() { __asm__ volatile("tilerelease"); }

template <int T>
inline void clear() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows are `stride` bytes apart; 0 reads one row many times.
template <int T>
inline void load(const void *at, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
// The same of what is not read again soon, which then pushes less out of the first-level cache.
template <int T>
inline void load_passing(const void *at, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void *at, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
// Sums += left · right: of pairs of bf16 numbers in fp32, or of fours of unsigned and signed 8-bit numbers in int32.
template <int SUMS, int LEFT, int RIGHT>
inline void add_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
}
template <int SUMS, int LEFT, int RIGHT>
inline void add_int8() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

}  // namespace tiles
}  // namespace deltaw

#else

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace deltaw {
namespace tiles {

struct State {
    Sizes sizes = Sizes(0);
    bool ready = false;
    alignas(64) uint8_t data[8][ROWS * BYTES];
};
inline thread_local State state;

inline void require(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "tiles: %s\n", what);
    abort();
}
inline State &ready_state() {
    require(state.ready, "used before they are configured or after they are released");
    return state;
}

inline void configure(const Sizes &sizes) {
    for (int t = 0; t < 8; t++) require(sizes.rows[t] > 0 && sizes.rows[t] <= ROWS && sizes.bytes[t] == BYTES, "sizes that there are not");
    state.sizes = sizes;
    state.ready = true;
    memset(state.data, 0, sizeof(state.data));
}
inline void release() { state.ready = false; }

template <int T>
inline void clear() {
    memset(ready_state().data[T], 0, ROWS * BYTES);
}
template <int T>
inline void load(const void *at, int64_t stride) {
    State &s = ready_state();
    memset(s.data[T], 0, ROWS * BYTES);
    for (int i = 0; i < s.sizes.rows[T]; i++) memcpy(s.data[T] + i * BYTES, (const char *)at + i * stride, BYTES);
}
template <int T>
inline void load_passing(const void *at, int64_t stride) {
    load<T>(at, stride);
}
template <int T>
inline void store(void *at, int64_t stride) {
    State &s = ready_state();
    for (int i = 0; i < s.sizes.rows[T]; i++) memcpy((char *)at + i * stride, s.data[T] + i * BYTES, BYTES);
}

// A product takes as many rows as its sums have.
template <int SUMS, int LEFT, int RIGHT>
inline State &for_product() {
    State &s = ready_state();
    require(s.sizes.rows[SUMS] == s.sizes.rows[LEFT] && s.sizes.rows[RIGHT] == ROWS, "a product of tiles that do not fit");
    return s;
}

// Even and odd numbers of a row have sums of their own, which are added to what was there at the end; what is too small
// for a normal number counts as 0.
inline float normal(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

template <int SUMS, int LEFT, int RIGHT>
inline void add_bf16() {
    State &s = for_product<SUMS, LEFT, RIGHT>();
    auto number = [](const uint8_t *at) {
        uint16_t half;
        memcpy(&half, at, 2);
        const uint32_t bits = (uint32_t)half << 16;
        float x;
        memcpy(&x, &bits, 4);
        return normal(x);
    };
    float right[2][ROWS][ROWS];
    for (int k = 0; k < ROWS; k++)
        for (int n = 0; n < ROWS; n++)
            for (int odd = 0; odd < 2; odd++) right[odd][k][n] = number(s.data[RIGHT] + k * BYTES + 4 * n + 2 * odd);
    for (int i = 0; i < s.sizes.rows[SUMS]; i++) {
        float sums[2][ROWS] = {};
        for (int odd = 0; odd < 2; odd++)
            for (int k = 0; k < ROWS; k++) {
                const float a = number(s.data[LEFT] + i * BYTES + 4 * k + 2 * odd);
                for (int n = 0; n < ROWS; n++) sums[odd][n] = normal(std::fma(a, right[odd][k][n], sums[odd][n]));
            }
        float line[ROWS];
        memcpy(line, s.data[SUMS] + i * BYTES, BYTES);
        for (int n = 0; n < ROWS; n++) line[n] = normal(normal(line[n]) + normal(sums[0][n] + sums[1][n]));
        memcpy(s.data[SUMS] + i * BYTES, line, BYTES);
    }
}

template <int SUMS, int LEFT, int RIGHT>
inline void add_int8() {
    State &s = for_product<SUMS, LEFT, RIGHT>();
    for (int i = 0; i < s.sizes.rows[SUMS]; i++) {
        int32_t line[ROWS];
        memcpy(line, s.data[SUMS] + i * BYTES, BYTES);
        for (int k = 0; k < BYTES; k++) {
            const int32_t a = s.data[LEFT][i * BYTES + k];
            const int8_t *const right = (const int8_t *)s.data[RIGHT] + k / 4 * BYTES + k % 4;
            for (int n = 0; n < ROWS; n++) line[n] += a * right[4 * n];
        }
        memcpy(s.data[SUMS] + i * BYTES, line, BYTES);
    }
}

}  // namespace tiles
}  // namespace deltaw

#endif

namespace deltaw {

inline constexpr tiles::Sizes sizes_of_tiles[] = {
    tiles::Sizes(16), tiles::Sizes(1),  tiles::Sizes(2),  tiles::Sizes(3),  tiles::Sizes(4),  tiles::Sizes(5),  tiles::Sizes(6),  tiles::Sizes(7),
    tiles::Sizes(8),  tiles::Sizes(9),  tiles::Sizes(10), tiles::Sizes(11), tiles::Sizes(12), tiles::Sizes(13), tiles::Sizes(14), tiles::Sizes(15)};

// While one lives, this thread's tiles are full ones; after that the processor need not save them for it.
class UseOfTiles {
  public:
    UseOfTiles() { tiles::configure(sizes_of_tiles[0]); }
    ~UseOfTiles() { tiles::release(); }
    UseOfTiles(const UseOfTiles &) = delete;
    UseOfTiles &operator=(const UseOfTiles &) = delete;
};

// While one lives inside of that, left sides and sums have fewer rows. What the tiles held is gone before and after.
class FewRows {
  public:
    explicit FewRows(int rows) { tiles::configure(sizes_of_tiles[rows]); }
    ~FewRows() { tiles::configure(sizes_of_tiles[0]); }
    FewRows(const FewRows &) = delete;
    FewRows &operator=(const FewRows &) = delete;
};

}  // namespace deltaw

#endif
