// A CUDA device for torch's CPU build. Tensors are in host memory, kernels run on the CPU, and the rules of a GPU apply.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "allocator.h"
#include "counters.h"
#include "generator.h"
#include "operators.h"

namespace fake_cuda {

const c10::Stream STREAM(c10::Stream::DEFAULT, DEVICE);

// One device with one stream. All work is finished when it was submitted, so events have nothing to record.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return STREAM; }
  c10::Stream getDefaultStream(c10::Device) const override { return STREAM; }
  c10::Stream getNewStream(c10::Device, int) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return STREAM; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
  void synchronizeStream(const c10::Stream&) const override { counters().synchronize("stream"); }
  void synchronizeEvent(void*) const override { counters().synchronize("event"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { counters().synchronize("device"); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

static const bool allocator_is_set = (c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator(), 100), true);

static c10::Dict<std::string, int64_t> as_dict(const std::map<std::string, int64_t>& values) {
  c10::Dict<std::string, int64_t> result;
  for (const auto& [key, value] : values) result.insert(key, value);
  return result;
}

static c10::Dict<std::string, int64_t> memory() {
  auto& a = device_allocator();
  return as_dict({{"allocated", a.allocated.current}, {"allocated_peak", a.allocated.peak},
                  {"reserved", a.reserved.current}, {"reserved_peak", a.reserved.peak},
                  {"total", a.total}, {"ooms", a.out_of_memory_errors}});
}

TORCH_LIBRARY(fake_cuda, m) {
  m.def("launches() -> Dict(str, int)", [] { return as_dict(counters().launches); });
  m.def("synchronizations() -> Dict(str, int)", [] { return as_dict(counters().synchronizations); });
  m.def("copies() -> Dict(str, int)", [] { return as_dict(counters().copies); });
  m.def("reset_counters() -> ()", [] { counters().reset(); });
  m.def("synchronize() -> ()", [] { counters().synchronize("device"); });
  m.def("sync_debug_mode() -> int", [] { return counters().sync_debug_mode; });
  m.def("set_sync_debug_mode(int mode) -> ()", [](int64_t mode) { counters().sync_debug_mode = mode; });
  m.def("memory() -> Dict(str, int)", memory);
  m.def("set_total_memory(int bytes) -> ()", [](int64_t bytes) { device_allocator().total = bytes; });
  m.def("reset_peaks() -> ()", [] { device_allocator().reset_peaks(); });
  m.def("empty_cache() -> ()", [] { device_allocator().empty_cache(); });
  m.def("default_generator() -> Generator?", [] { return std::optional(default_generator()); });
}

}  // namespace fake_cuda

namespace at::cuda {

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(DeviceIndex) const override { fake_cuda::counters().synchronize("device"); }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return fake_cuda::default_generator(); }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<fake_cuda::DeviceGenerator>(0); }
  Device getDeviceFromPtr(void*) const override { return fake_cuda::DEVICE; }
  bool isPinnedPtr(const void* pointer) const override { return fake_cuda::pinned_allocator().contains(pointer); }
  Allocator* getPinnedMemoryAllocator() const override { return &fake_cuda::pinned_allocator(); }
  Allocator* getCUDADeviceAllocator() const override { return &fake_cuda::device_allocator(); }
};

}  // namespace at::cuda

namespace at {
using at::cuda::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at
