// AMX tile registers: eight tiles of 16 rows of 64 bytes. DW_AMX_EMULATED replaces them by arrays, so that code using
// them can be tested on any processor. The emulation aborts if real tiles would fault.
//
// Tiles 0 … 3 contain sums, 4 and 5 rows of a left side, 6 and 7 lines of a right side.
#pragma once
#include <cstdint>

#if defined(__AMX_TILE__) || defined(DW_AMX_EMULATED)
#define DW_AMX 1

namespace deltaw {
namespace tiles {

const int ROWS = 16, BYTES = 64;  // per tile

// Tile configuration in the memory format of the processor.
struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];

    // Left sides and sums have `count` rows. Right sides always have 16.
    constexpr explicit TileConfig(int count) : palette(1), start_row(0), reserved(), bytes(), rows() {
        for (int t = 0; t < 8; t++) bytes[t] = BYTES, rows[t] = (uint8_t)(t < 6 ? count : ROWS);
    }
};

}  // namespace tiles
}  // namespace deltaw

#ifndef DW_AMX_EMULATED

namespace deltaw {
namespace tiles {

// Assembly, because the compilers' intrinsics require literal tile numbers, and some do not declare that memory is
// read. Tile numbers are template arguments.
inline void configure(const TileConfig &sizes) { __asm__ volatile("ldtilecfg %0" : : "m"(sizes)); }
inline void release() { __asm__ volatile("tilerelease"); }

template <int T>
inline void clear() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows are `stride` bytes apart. 0 reads the same row repeatedly.
template <int T>
inline void load(const void *at, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
// Non-temporal load, for data that is not read again soon. It evicts less from the first-level cache.
template <int T>
inline void load_streamed(const void *at, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void *at, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(at), "r"(stride), "i"(T) : "memory");
}
// Sums += left · right: pairs of bf16 numbers summed in fp32, or groups of four unsigned and signed 8-bit numbers in
// int32.
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
    TileConfig sizes = TileConfig(0);
    bool is_configured = false;
    alignas(64) uint8_t data[8][ROWS * BYTES];
};
inline thread_local State state;

inline void require(bool is_true, const char *message) {
    if (is_true) return;
    fprintf(stderr, "tiles: %s\n", message);
    abort();
}
inline State &ready_state() {
    require(state.is_configured, "used before they are configured or after they are released");
    return state;
}

inline void configure(const TileConfig &sizes) {
    for (int t = 0; t < 8; t++) require(sizes.rows[t] > 0 && sizes.rows[t] <= ROWS && sizes.bytes[t] == BYTES, "sizes that there are not");
    state.sizes = sizes;
    state.is_configured = true;
    memset(state.data, 0, sizeof(state.data));
}
inline void release() { state.is_configured = false; }

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
inline void load_streamed(const void *at, int64_t stride) {
    load<T>(at, stride);
}
template <int T>
inline void store(void *at, int64_t stride) {
    State &s = ready_state();
    for (int i = 0; i < s.sizes.rows[T]; i++) memcpy((char *)at + i * stride, s.data[T] + i * BYTES, BYTES);
}

// Process as many rows as the sums have.
template <int SUMS, int LEFT, int RIGHT>
inline State &for_product() {
    State &s = ready_state();
    require(s.sizes.rows[SUMS] == s.sizes.rows[LEFT] && s.sizes.rows[RIGHT] == ROWS, "a product of tiles that do not fit");
    return s;
}

// Even and odd numbers of a row have separate sums, which are combined at the end. Denormal numbers are flushed to 0.
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

inline constexpr tiles::TileConfig tile_config[] = {
    tiles::TileConfig(16), tiles::TileConfig(1),  tiles::TileConfig(2),  tiles::TileConfig(3),  tiles::TileConfig(4),  tiles::TileConfig(5),
         tiles::TileConfig(6),  tiles::TileConfig(7),
    tiles::TileConfig(8),  tiles::TileConfig(9),  tiles::TileConfig(10), tiles::TileConfig(11), tiles::TileConfig(12), tiles::TileConfig(13),
        tiles::TileConfig(14), tiles::TileConfig(15)};

// Configures this thread's tiles with full size and releases them at the end of the scope, so that the system does not
// save them.
class TileScope {
  public:
    TileScope() { tiles::configure(tile_config[0]); }
    ~TileScope() { tiles::release(); }
    TileScope(const TileScope &) = delete;
    TileScope &operator=(const TileScope &) = delete;
};

// Reduces left sides and sums to a smaller number of rows within a scope inside TileScope. The contents of tiles are
// lost at the start and the end.
class RowCountScope {
  public:
    explicit RowCountScope(int rows) { tiles::configure(tile_config[rows]); }
    ~RowCountScope() { tiles::configure(tile_config[0]); }
    RowCountScope(const RowCountScope &) = delete;
    RowCountScope &operator=(const RowCountScope &) = delete;
};

}  // namespace deltaw

#endif
