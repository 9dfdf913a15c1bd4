// Device memory in host memory, with the block and segment sizes of torch's CUDA caching allocator, and pinned memory.
#pragma once
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

namespace fake_cuda {

const c10::Device DEVICE(c10::DeviceType::CUDA, 0);
constexpr size_t KIB = 1024, MIB = 1024 * KIB;
constexpr size_t BLOCK = 512;                 // sizes of blocks are multiples
constexpr size_t SMALL = MIB;                 // blocks up to this size are in the small pool
constexpr size_t SMALL_SEGMENT = 2 * MIB;
constexpr size_t LARGE_SEGMENT = 20 * MIB;    // segment for blocks of less than OWN_SEGMENT
constexpr size_t OWN_SEGMENT = 10 * MIB;      // blocks from this size get a segment of their size
constexpr size_t SEGMENT_MULTIPLE = 2 * MIB;  // of segments for one block

inline size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

inline void* aligned(size_t bytes) {
  void* memory = nullptr;
  TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&memory, BLOCK, bytes) == 0, "The host has no ", bytes, " bytes");
  return memory;
}

struct Block {
  char* data;
  size_t size;
  bool small;
  bool used = false;
  Block *before = nullptr, *after = nullptr;  // neighbors in the segment
};

struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    return a->size != b->size ? a->size < b->size : a->data < b->data;
  }
};

struct DeviceAllocator final : c10::Allocator {
  struct Amount {
    int64_t current = 0, peak = 0;
    void add(int64_t bytes) { peak = std::max(peak, current += bytes); }
  };

  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &release, DEVICE};
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t size = round_up(bytes, BLOCK);
    Block* block = take_free(size);
    if (!block) block = new_segment(size, bytes);
    split(block, size);
    block->used = true;
    allocated.add(block->size);
    return {block->data, block, &release, DEVICE};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  // Return segments without used blocks to the device, as torch.cuda.empty_cache.
  void empty_cache() {
    std::lock_guard<std::mutex> lock(mutex_);
    release_free_segments();
  }

  void reset_peaks() {
    std::lock_guard<std::mutex> lock(mutex_);
    allocated.peak = allocated.current, reserved.peak = reserved.current;
  }

  Amount allocated, reserved;
  int64_t total = 24LL * 1024 * MIB;
  int64_t out_of_memory_errors = 0;

 private:
  using Pool = std::set<Block*, BySize>;
  std::mutex mutex_;
  Pool small_, large_;  // free blocks

  Pool& pool(const Block* block) { return block->small ? small_ : large_; }

  // Remove and return the smallest sufficient free block, or nullptr.
  Block* take_free(size_t size) {
    Block key{nullptr, size, size <= SMALL};
    auto position = pool(&key).lower_bound(&key);
    if (position == pool(&key).end()) return nullptr;
    Block* block = *position;
    pool(&key).erase(position);
    return block;
  }

  Block* new_segment(size_t size, size_t requested) {
    const size_t segment = size <= SMALL         ? SMALL_SEGMENT
                           : size < OWN_SEGMENT ? LARGE_SEGMENT
                                                : round_up(size, SEGMENT_MULTIPLE);
    if (reserved.current + (int64_t)segment > total) release_free_segments();
    if (reserved.current + (int64_t)segment > total) {
      ++out_of_memory_errors;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", requested,
                       " bytes. GPU 0 has a total capacity of ", total, " bytes of which ", total - reserved.current,
                       " bytes are free. ", allocated.current, " bytes are allocated by PyTorch, and ",
                       reserved.current - allocated.current, " bytes are reserved but unallocated.");
    }
    auto* block = new Block{(char*)aligned(segment), segment, size <= SMALL};
    reserved.add(segment);
    return block;
  }

  void split(Block* block, size_t size) {
    const size_t rest = block->size - size;
    if (block->small ? rest < BLOCK : rest <= SMALL) return;
    auto* tail = new Block{block->data + size, rest, block->small, false, block, block->after};
    if (tail->after) tail->after->before = tail;
    block->after = tail, block->size = size;
    pool(tail).insert(tail);
  }

  void free_block(Block* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    allocated.add(-(int64_t)block->size);
    block->used = false;
    if (block->after && !block->after->used) {
      pool(block).erase(block->after);
      absorb(block);
    }
    if (block->before && !block->before->used) {
      block = block->before;
      pool(block).erase(block);
      absorb(block);
    }
    pool(block).insert(block);
  }

  void absorb(Block* block) {
    Block* next = block->after;
    block->size += next->size, block->after = next->after;
    if (block->after) block->after->before = block;
    delete next;
  }

  void release_free_segments() {
    for (Pool* blocks : {&small_, &large_})
      for (auto position = blocks->begin(); position != blocks->end();) {
        Block* block = *position;
        if (block->before || block->after) {
          ++position;
          continue;
        }
        position = blocks->erase(position);
        reserved.add(-(int64_t)block->size);
        std::free(block->data);
        delete block;
      }
  }

  static void release(void* block);
};

inline DeviceAllocator& device_allocator() {
  static auto* instance = new DeviceAllocator;
  return *instance;
}

inline void DeviceAllocator::release(void* block) {
  if (block) device_allocator().free_block((Block*)block);
}

// Page-locked host memory, which the device can copy asynchronously.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &release, c10::Device(c10::DeviceType::CPU)};
    void* memory = aligned(bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    sizes_[(char*)memory] = bytes;
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  bool contains(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto next = sizes_.upper_bound((char*)pointer);
    return next != sizes_.begin() && (--next, (char*)pointer < next->first + next->second);
  }

 private:
  std::mutex mutex_;
  std::map<char*, size_t> sizes_;

  static void release(void* memory);
};

inline PinnedAllocator& pinned_allocator() {
  static auto* instance = new PinnedAllocator;
  return *instance;
}

inline void PinnedAllocator::release(void* memory) {
  if (!memory) return;
  {
    std::lock_guard<std::mutex> lock(pinned_allocator().mutex_);
    pinned_allocator().sizes_.erase((char*)memory);
  }
  std::free(memory);
}

}  // namespace fake_cuda
