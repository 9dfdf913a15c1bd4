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
const int64_t OF_BF16 = 1 << deltaw::DOT | 1 << deltaw::WIDE;
#else
const int64_t OF_BF16 = 1 << deltaw::WIDE;
#endif

#ifdef DW_AMX
// Linux lets a process use tiles, in all of its threads, once it asked: they make what is saved of a thread far larger.
bool has_tiles() {
#ifdef DW_AMX_EMULATED
    return true;
#elif !defined(__linux__)
    return false;  // no other system is known to grant them
#else
    const long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl's code and the number of the processor's state
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
#endif
}
#else
bool has_tiles() { return false; }
#endif

std::atomic<int> of_type[3] = {{deltaw::DOT}, {OF_BF16 & 1 ? deltaw::DOT : deltaw::WIDE}, {deltaw::DOT}};
// As much as most processors' cores have, until the caller says how much this one has.
std::atomic<int64_t> second_level_cache{1 << 20};

}  // namespace

namespace deltaw {

Arithmetic arithmetic_of(int type) { return (Arithmetic)of_type[type].load(std::memory_order_relaxed); }

// Half of the cache; panels and sums take 64 KiB of it and more of the other half.
int64_t left_at_once() { return std::max<int64_t>(64 << 10, second_level_cache.load(std::memory_order_relaxed) / 2 - (64 << 10)); }

}  // namespace deltaw

int64_t dw_arithmetics(int type) {
    if (type != deltaw::F32 && type != deltaw::BF16 && type != deltaw::INT8) return 0;
    const int64_t found = type == deltaw::BF16 ? OF_BF16 : 1 << deltaw::DOT;
    return type != deltaw::F32 && has_tiles() ? found | 1 << deltaw::TILES : found;
}

int dw_ready() {
#ifdef DW_AMX
    if (!has_tiles()) return deltaw::FAILED;
    static const bool first_time = [] {
        of_type[deltaw::BF16] = of_type[deltaw::INT8] = deltaw::TILES;
        return true;
    }();
    (void)first_time;
#endif
    return deltaw::OK;
}

int dw_set_arithmetic(int type, int which) {
    if (which < 0 || which > 2 || !(dw_arithmetics(type) >> which & 1)) return deltaw::FAILED;
    of_type[type] = which;
    return deltaw::OK;
}

int dw_set_cache(int64_t bytes) {
    if (bytes <= 0) return deltaw::FAILED;
    second_level_cache = bytes;
    return deltaw::OK;
}
