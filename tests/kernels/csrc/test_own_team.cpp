// Tests of the library's thread pool: calls from several threads, nested calls, changing thread counts, and forking.
#include "thread_pool.h"

#include "check.h"
#include "tests.h"

#ifdef DW_OWN_THREADS
#include <atomic>
#include <thread>
#ifndef _WIN32
#include <sys/wait.h>
#endif

namespace {

// Call body(i) for each i below count on the pool.
template <class Body>
void on_a_team(int count, Body &&body) {
    deltaw::run_on_pool([](void *at, int i) { (*static_cast<std::remove_reference_t<Body> *>(at))(i); }, &body, count);
}

bool each_once(int count) {
    std::vector<std::atomic<int>> times(count);
    for (auto &time : times) time = 0;
    on_a_team(count, [&](int i) { times[i]++; });
    bool right = true;
    for (auto &time : times) right = right && time == 1;
    return right;
}

std::vector<std::thread::id> who(int count) {
    std::vector<std::thread::id> ids(count);
    on_a_team(count, [&](int i) { ids[i] = std::this_thread::get_id(); });
    return ids;
}

void test_who_does_what() {
    const std::vector<std::thread::id> five = who(5), three = who(3), again = who(5);
    expect(five[0] == std::this_thread::get_id(), "the caller does the first part");
    bool apart = true;
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < i; j++) apart = apart && five[i] != five[j];
    expect(apart, "each part has a thread of its own");
    expect(five == again && std::equal(three.begin(), three.end(), five.begin()), "a part has the same thread in the next call");
    std::vector<std::thread::id> inside(3);
    on_a_team(2, [&](int i) {
        if (i == 1) inside = who(3);
    });
    expect(inside[0] == five[1] && inside[1] == five[1] && inside[2] == five[1], "a part of a call does the parts of its own calls");
}

void test_many_callers() {
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; caller++)
        callers.emplace_back([&, caller] {
            for (int time = 0; time < 200; time++) wrong += !each_once(1 + (caller + time) % 4);
        });
    for (std::thread &caller : callers) caller.join();
    expect(wrong == 0, "calls from several threads at the same time");
}

void test_fork() {
#ifndef _WIN32
    const pid_t child = fork();
    if (child == 0) _exit(each_once(3) && who(3)[1] != std::this_thread::get_id() ? 0 : 1);
    int status = -1;
    expect(child > 0 && waitpid(child, &status, 0) == child && status == 0, "a child process has a team too");
    expect(each_once(3), "and its parent still has one");
#endif
}

}  // namespace

void test_own_team() {
    for (int count : {1, 2, 3, 7, 2, 1}) expect(each_once(count), "each of " + std::to_string(count) + " parts once");
    test_who_does_what();
    test_many_callers();
    test_fork();
}
#else
void test_own_team() {}
#endif
