// An arena is a list of chunks, usually one. If it is too small, chunks are added while the kernel runs, and the next
// call starts with one chunk of the total size.
#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace {

const size_t ALIGNMENT = 64, PAGE = 4096;
const size_t MAX_CACHED_BYTES = 32 << 20;  // bytes that an arena keeps between calls; filling a larger one takes far longer than allocating it
const size_t MIN_CHUNK_BYTES = 256 << 10;  // minimum size of chunks after the first
const size_t MIN_SHRINK_BYTES = 1 << 20;
const int SHRINK_INTERVAL = 256;  // the arena shrinks after this number of calls that used at most a quarter of it

std::atomic<int64_t> allocated{0}, max_allocated{0};  // bytes of all arenas

void count_allocated(int64_t change) {
    const int64_t now = allocated.fetch_add(change) + change;
    int64_t peak = max_allocated.load();
    while (now > peak && !max_allocated.compare_exchange_weak(peak, now)) {}
}

#ifdef _WIN32
char *aligned_memory(size_t bytes) { return (char *)_aligned_malloc(bytes, ALIGNMENT); }
void free_aligned(void *at) { _aligned_free(at); }
#else
char *aligned_memory(size_t bytes) { return (char *)aligned_alloc(ALIGNMENT, bytes); }
void free_aligned(void *at) { free(at); }
#endif

struct Chunk {
    char *at;
    size_t size;
};

class Arena {
  public:
    size_t chunk = 0, used = 0;  // current chunk and bytes used in it
    size_t total = 0;  // bytes used in all chunks

    ~Arena() { release(); }

    void enter() { depth++; }

    void *take(size_t bytes) {
        const size_t size = std::max(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
        if (chunks.empty()) add(std::max(size, next_size));
        else if (chunks[chunk].size - used < size) {
            if (chunk + 1 < chunks.size() && chunks[chunk + 1].size < size) drop_from(chunk + 1);
            if (chunk + 1 == chunks.size()) add(std::max(size, MIN_CHUNK_BYTES));
            chunk++, used = 0;
        }
        char *const at = chunks[chunk].at + used;
        used += size, total += size;
        max_total = std::max(max_total, total);
        return at;
    }

    void leave(size_t saved_chunk, size_t saved_used, size_t saved_total) noexcept {
        chunk = saved_chunk, used = saved_used, total = saved_total;
        if (--depth == 0) trim();
    }

    void release() noexcept {
        drop_from(0);
        chunk = used = total = 0;
    }
    // Free all memory and reset the size statistics. Has no effect during a call.
    void reset() noexcept {
        if (depth > 0) return;
        release();
        max_total = next_size = 0, calls = 0;
    }

  private:
    std::vector<Chunk> chunks;
    int depth = 0, calls = 0;
    size_t max_total = 0;  // maximum total since `calls` was 0
    size_t next_size = 0;

    void add(size_t size) {
        if (size > SIZE_MAX / 2) throw std::bad_alloc();
        const size_t rounded = (size + PAGE - 1) / PAGE * PAGE;
        chunks.reserve(chunks.size() + 1);
        char *const at = aligned_memory(rounded);
        if (!at) throw std::bad_alloc();
        chunks.push_back({at, rounded});
        count_allocated((int64_t)rounded);
    }

    void drop_from(size_t first) noexcept {
        for (; chunks.size() > first; chunks.pop_back()) {
            free_aligned(chunks.back().at);
            count_allocated(-(int64_t)chunks.back().size);
        }
    }

    // After a call, keep one chunk of the required size, or none.
    void trim() noexcept {
        size_t size = 0;
        for (const Chunk &p : chunks) size += p.size;
        bool reallocate = chunks.size() > 1 || size > MAX_CACHED_BYTES;
        if (++calls == SHRINK_INTERVAL) {
            reallocate = reallocate || (size > MIN_SHRINK_BYTES && max_total < size / 4);
            calls = 0;
        }
        if (reallocate) {
            next_size = max_total > MAX_CACHED_BYTES ? 0 : max_total;
            release();
        }
        if (calls == 0) max_total = 0;
    }
};

Arena &arena() {
    static thread_local Arena thread_arena;
    return thread_arena;
}

}  // namespace

namespace deltaw {

Scratch::Scratch() : chunk(arena().chunk), used(arena().used), total(arena().total) { arena().enter(); }
Scratch::~Scratch() { arena().leave(chunk, used, total); }
void *Scratch::take_bytes(size_t bytes) { return arena().take(bytes); }

}  // namespace deltaw

int dw_release() {
    return deltaw::guarded([] {
        deltaw::in_parallel([](int, int) { arena().reset(); });
    });
}

int64_t dw_scratch_bytes(int peak) {
    if (!peak) return allocated.load();
    return max_allocated.exchange(allocated.load());
}
