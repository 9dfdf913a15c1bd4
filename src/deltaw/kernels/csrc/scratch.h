// Memory that a kernel needs while it runs. Each thread has one arena that its kernels take from and give back to in
// the order of a stack; between calls the arena is kept, since fresh pages cost more than small kernels do.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

namespace deltaw {

// What one kernel, on one thread, takes from the thread's arena; given back at the end of the scope.
class Scratch {
  public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    // Room for `count` values, aligned to 64 bytes, not initialized; bad_alloc where there is none.
    template <class T = char>
    T *take(int64_t count) {
        if (count < 0 || (uint64_t)count > SIZE_MAX / 2 / sizeof(T)) throw std::bad_alloc();
        return static_cast<T *>(take_bytes((size_t)count * sizeof(T)));
    }

  private:
    void *take_bytes(size_t bytes);

    const size_t piece, used, total;  // where the arena stood
};

}  // namespace deltaw
