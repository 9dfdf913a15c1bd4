// An arena is a list of pieces. One piece serves nearly always: where it turns out too small, further pieces are
// added while the kernel runs, and the next call begins with one piece of the whole size.
#include "scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace {

const size_t LINE = 64, PAGE = 4096;
const size_t KEPT_AT_MOST = 32 << 20;  // bytes that an arena keeps between calls; what is larger takes far longer to fill
const size_t FURTHER_AT_LEAST = 256 << 10;  // of a piece beyond the first
const size_t WORTH_SHRINKING = 1 << 20;
const int CALLS_IN_A_ROW = 256;        // without need for a quarter of the arena, before it shrinks

std::atomic<int64_t> held{0}, most_held{0};  // bytes of all arenas

void note_held(int64_t change) {
    const int64_t now = held.fetch_add(change) + change;
    int64_t most = most_held.load();
    while (now > most && !most_held.compare_exchange_weak(most, now)) {}
}

#ifdef _WIN32
char *aligned_memory(size_t bytes) { return (char *)_aligned_malloc(bytes, LINE); }
void free_aligned(void *at) { _aligned_free(at); }
#else
char *aligned_memory(size_t bytes) { return (char *)aligned_alloc(LINE, bytes); }
void free_aligned(void *at) { free(at); }
#endif

struct Piece {
    char *at;
    size_t size;
};

class Arena {
  public:
    size_t piece = 0, used = 0;  // of the piece that is taken from
    size_t total = 0;            // of all pieces

    ~Arena() { release(); }

    void enter() { depth++; }

    void *take(size_t bytes) {
        const size_t size = std::max(LINE, (bytes + LINE - 1) / LINE * LINE);
        if (pieces.empty()) add(std::max(size, next_size));
        else if (pieces[piece].size - used < size) {
            if (piece + 1 < pieces.size() && pieces[piece + 1].size < size) drop_from(piece + 1);
            if (piece + 1 == pieces.size()) add(std::max(size, FURTHER_AT_LEAST));
            piece++, used = 0;
        }
        char *const at = pieces[piece].at + used;
        used += size, total += size;
        needed = std::max(needed, total);
        return at;
    }

    void leave(size_t to_piece, size_t to_used, size_t to_total) noexcept {
        piece = to_piece, used = to_used, total = to_total;
        if (--depth == 0) settle();
    }

    void release() noexcept {
        drop_from(0);
        piece = used = total = 0;
    }
    // Releases all and forgets what was needed, between calls; inside of one, nothing happens.
    void forget() noexcept {
        if (depth > 0) return;
        release();
        needed = next_size = 0, calls = 0;
    }

  private:
    std::vector<Piece> pieces;
    int depth = 0, calls = 0;
    size_t needed = 0;      // at most, since `calls` was 0
    size_t next_size = 0;

    void add(size_t size) {
        if (size > SIZE_MAX / 2) throw std::bad_alloc();
        const size_t rounded = (size + PAGE - 1) / PAGE * PAGE;
        pieces.reserve(pieces.size() + 1);
        char *const at = aligned_memory(rounded);
        if (!at) throw std::bad_alloc();
        pieces.push_back({at, rounded});
        note_held((int64_t)rounded);
    }

    void drop_from(size_t first) noexcept {
        for (; pieces.size() > first; pieces.pop_back()) {
            free_aligned(pieces.back().at);
            note_held(-(int64_t)pieces.back().size);
        }
    }

    // After a call: one piece of the size that is needed, or none.
    void settle() noexcept {
        size_t size = 0;
        for (const Piece &p : pieces) size += p.size;
        bool again = pieces.size() > 1 || size > KEPT_AT_MOST;
        if (++calls == CALLS_IN_A_ROW) {
            again = again || (size > WORTH_SHRINKING && needed < size / 4);
            calls = 0;
        }
        if (again) {
            next_size = needed > KEPT_AT_MOST ? 0 : needed;
            release();
        }
        if (calls == 0) needed = 0;
    }
};

Arena &arena() {
    static thread_local Arena of_this_thread;
    return of_this_thread;
}

}  // namespace

namespace deltaw {

Scratch::Scratch() : piece(arena().piece), used(arena().used), total(arena().total) { arena().enter(); }
Scratch::~Scratch() { arena().leave(piece, used, total); }
void *Scratch::take_bytes(size_t bytes) { return arena().take(bytes); }

}  // namespace deltaw

int dw_release() {
    return deltaw::guarded([] {
        deltaw::in_parallel([](int, int) { arena().forget(); });
    });
}

int64_t dw_scratch_held(int most) {
    if (!most) return held.load();
    return most_held.exchange(held.load());
}
