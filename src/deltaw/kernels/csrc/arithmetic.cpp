#include "arithmetic.h"

#include <algorithm>
#include <atomic>

#include "kernels.h"
#include "status.h"

#if defined(DW_AMX) && !defined(DW_AMX_EMULATED) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef DW_BF16_DOT
const int64_t BF16_ARITHMETICS = 1 << deltaw::DOT | 1 << deltaw::WIDE;
#else
const int64_t BF16_ARITHMETICS = 1 << deltaw::WIDE;
#endif

#ifdef DW_AMX
// Linux grants tiles to all threads of a process on request, because they greatly enlarge the saved state of a thread.
bool has_tiles() {
#ifdef DW_AMX_EMULATED
    return true;
#elif !defined(__linux__)
    return false;  // other systems are not known to support tiles
#else
    const long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // code of arch_prctl and number of the state component
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
#endif
}
#else
bool has_tiles() { return false; }
#endif

std::atomic<int> selected[3] = {{deltaw::DOT}, {BF16_ARITHMETICS & 1 ? deltaw::DOT : deltaw::WIDE}, {deltaw::DOT}};
// Default for the second-level cache until the caller sets its size.
std::atomic<int64_t> second_level_cache{1 << 20};

}  // namespace

namespace deltaw {

Arithmetic selected_arithmetic(int type) { return (Arithmetic)selected[type].load(std::memory_order_relaxed); }

// Half of the cache minus 64 KiB for panels and sums, which also use the other half.
int64_t left_cache_bytes() { return std::max<int64_t>(64 << 10, second_level_cache.load(std::memory_order_relaxed) / 2 - (64 << 10)); }

}  // namespace deltaw

int64_t dw_arithmetics(int type) {
    if (type != deltaw::F32 && type != deltaw::BF16 && type != deltaw::INT8) return 0;
    const int64_t supported = type == deltaw::BF16 ? BF16_ARITHMETICS : 1 << deltaw::DOT;
    return type != deltaw::F32 && has_tiles() ? supported | 1 << deltaw::TILES : supported;
}

int dw_ready() {
#ifdef DW_AMX
    if (!has_tiles()) return deltaw::FAILED;
    static const bool first_time = [] {
        selected[deltaw::BF16] = selected[deltaw::INT8] = deltaw::TILES;
        return true;
    }();
    (void)first_time;
#endif
    return deltaw::OK;
}

int dw_set_arithmetic(int type, int arithmetic) {
    if (arithmetic < 0 || arithmetic > 2 || !(dw_arithmetics(type) >> arithmetic & 1)) return deltaw::FAILED;
    selected[type] = arithmetic;
    return deltaw::OK;
}

int dw_set_cache(int64_t bytes) {
    if (bytes <= 0) return deltaw::FAILED;
    second_level_cache = bytes;
    return deltaw::OK;
}
