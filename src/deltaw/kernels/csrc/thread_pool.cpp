#include "thread_pool.h"

#ifdef DW_OWN_THREADS
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

// Polls before a thread sleeps: some microseconds, about as long as waking up takes.
const int MAX_POLLS = 256;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Poll a condition for a short time. Returns true if it became true.
template <class Condition>
bool poll_until(Condition &&is_true) {
    for (int poll = 0; poll < MAX_POLLS; poll++) {
        if (is_true()) return true;
        pause_briefly();
    }
    return false;
}

thread_local bool is_pool_thread = false;

class ThreadGroup {
  public:
    ThreadGroup *next = nullptr;  // in the list of idle groups

    // Call part(data, i) for each i below count. The caller runs part 0 and all parts without a thread.
    void run(void (*part)(void *, int), void *data, int count) {
        while (threads < count - 1 && start()) {}
        const int num_helpers = std::min(threads, count - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex);
            call = {part, data, num_helpers};
            unfinished.store(num_helpers, std::memory_order_relaxed);
            round.fetch_add(1, std::memory_order_release);
        }
        if (num_helpers) started.notify_all();
        is_pool_thread = true;
        part(data, 0);
        for (int i = num_helpers + 1; i < count; i++) part(data, i);
        is_pool_thread = false;
        auto is_finished = [&] { return unfinished.load(std::memory_order_acquire) == 0; };
        if (poll_until(is_finished)) return;
        std::unique_lock<std::mutex> lock(mutex);
        done.wait(lock, is_finished);
    }

  private:
    struct Call {
        void (*part)(void *, int);
        void *data;
        int num_helpers;  // threads 1 … num_helpers have a part
    } call{};
    int threads = 0;
    std::atomic<uint64_t> round{0};  // number of calls
    std::atomic<int> unfinished{0};  // threads that have not finished their part of this call
    std::mutex mutex;
    std::condition_variable started, done;

    bool start() {
        try {
            std::thread(&ThreadGroup::work, this, threads + 1, round.load()).detach();
        } catch (const std::system_error &) {
            return false;
        }
        threads++;
        return true;
    }

    void work(int index, uint64_t last_round) {
        is_pool_thread = true;
        for (;;) {
            auto has_new_call = [&] { return round.load(std::memory_order_acquire) != last_round; };
            poll_until(has_new_call);
            Call current;
            {
                std::unique_lock<std::mutex> lock(mutex);
                started.wait(lock, has_new_call);
                last_round = round.load(std::memory_order_relaxed), current = call;
            }
            if (index > current.num_helpers) continue;
            current.part(current.data, index);
            if (unfinished.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
            { const std::lock_guard<std::mutex> lock(mutex); }  // ensures that the caller does not miss the notification
            done.notify_one();
        }
    }
};

// Idle thread groups, the most recently used first. Never destroyed, since threads live as long as the process.
class ThreadGroupPool {
  public:
    ThreadGroup *take() {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!idle) return new ThreadGroup;
        return std::exchange(idle, idle->next);
    }
    void give_back(ThreadGroup *group) {
        const std::lock_guard<std::mutex> lock(mutex);
        group->next = std::exchange(idle, group);
    }

  private:
    std::mutex mutex;
    ThreadGroup *idle = nullptr;
};

std::atomic<ThreadGroupPool *> pool_instance{nullptr};

// Called on first use, and in a child process after a fork, where the parent's threads do not exist and its locks have
// an arbitrary state.
void create_pool() {
    pool_instance = new ThreadGroupPool;
    is_pool_thread = false;
}

ThreadGroupPool &pool() {
    static const bool is_created = [] {
        create_pool();
#ifndef _WIN32
        pthread_atfork(nullptr, nullptr, create_pool);
#endif
        return true;
    }();
    (void)is_created;
    return *pool_instance;
}

}  // namespace

void deltaw::run_on_pool(void (*part)(void *, int), void *data, int count) {
    if (is_pool_thread || count <= 1) {
        for (int i = 0; i < count; i++) part(data, i);
        return;
    }
    ThreadGroup *const group = pool().take();
    group->run(part, data, count);
    pool().give_back(group);
}
#endif
