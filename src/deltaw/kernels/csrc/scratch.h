// Scratch memory of kernels. Each thread has an arena that is used as a stack. It is kept between calls, because
// allocating fresh pages takes longer than small kernels.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

namespace deltaw {

// Allocates from the thread's arena within a scope. Everything is freed at the end of the scope.
class Scratch {
  public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    // Allocate `count` uninitialized values, aligned to 64 bytes. Throws bad_alloc if there is not enough memory.
    template <class T = char>
    T *take(int64_t count) {
        if (count < 0 || (uint64_t)count > SIZE_MAX / 2 / sizeof(T)) throw std::bad_alloc();
        return static_cast<T *>(take_bytes((size_t)count * sizeof(T)));
    }

  private:
    void *take_bytes(size_t bytes);

    const size_t chunk, used, total;  // state of the arena at construction
};

}  // namespace deltaw
