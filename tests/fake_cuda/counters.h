// Counters of device activity: launches, synchronizations and copies.
#pragma once
#include <c10/util/Exception.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace fake_cuda {

struct Counters {
  std::mutex mutex;
  std::map<std::string, int64_t> launches;          // by operator
  std::map<std::string, int64_t> synchronizations;  // by cause
  std::map<std::string, int64_t> copies;            // host_to_device, device_to_host and pageable (either direction)
  int64_t sync_debug_mode = 0;                      // of torch.cuda.set_sync_debug_mode

  void launch(const std::string& op) {
    std::lock_guard<std::mutex> lock(mutex);
    ++launches[op];
  }

  void copy(const std::string& direction) {
    std::lock_guard<std::mutex> lock(mutex);
    ++copies[direction];
  }

  // Count a point at which the host waits for the device. Raises in sync debug mode "error".
  void synchronize(const std::string& cause) {
    int64_t mode;
    {
      std::lock_guard<std::mutex> lock(mutex);
      ++synchronizations[cause];
      mode = sync_debug_mode;
    }
    if (mode == 1) TORCH_WARN("called a synchronizing CUDA operation: ", cause);
    TORCH_CHECK(mode != 2, "called a synchronizing CUDA operation: ", cause);
  }

  void reset() {
    std::lock_guard<std::mutex> lock(mutex);
    launches.clear(), synchronizations.clear(), copies.clear();
  }
};

inline Counters& counters() {
  static auto* instance = new Counters;  // never destroyed: tensors may be released at exit
  return *instance;
}

}  // namespace fake_cuda
