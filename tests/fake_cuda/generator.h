// Random number generator of the device. Like a CUDA generator, its state is a seed and an offset.
#pragma once
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Generator.h>

#include <cstring>

#include "allocator.h"

namespace fake_cuda {

struct DeviceGenerator final : c10::GeneratorImpl {
  explicit DeviceGenerator(uint64_t seed = c10::detail::getNonDeterministicRandom())
      : GeneratorImpl(DEVICE, c10::DispatchKeySet(c10::DispatchKey::CUDA)), seed_(seed) {}

  void set_current_seed(uint64_t seed) override { seed_ = seed, offset_ = 0; }
  void set_offset(uint64_t offset) override { offset_ = offset; }
  uint64_t get_offset() const override { return offset_; }
  uint64_t current_seed() const override { return seed_; }

  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }

  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.numel() == sizeof seed_ + sizeof offset_, "RNG state is wrong size");
    std::memcpy(&seed_, state.data(), sizeof seed_);
    std::memcpy(&offset_, (const char*)state.data() + sizeof seed_, sizeof offset_);
  }

  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    at::Tensor state = at::detail::empty_cpu({sizeof seed_ + sizeof offset_}, at::kByte);
    std::memcpy(state.data_ptr(), &seed_, sizeof seed_);
    std::memcpy((char*)state.data_ptr() + sizeof seed_, &offset_, sizeof offset_);
    return state.getIntrusivePtr();
  }

  // Return a CPU generator for one operator. The next call returns different numbers.
  at::Generator next() {
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t mixed = (seed_ + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u ^ (offset_ + 1) * 0x94d049bb133111ebu;
    offset_ += 4;
    return at::make_generator<at::CPUGeneratorImpl>(mixed);
  }

 private:
  uint64_t seed_, offset_ = 0;

  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator(seed_);
    copy->offset_ = offset_;
    return copy;
  }
};

inline const at::Generator& default_generator() {
  static auto* instance = new at::Generator(at::make_generator<DeviceGenerator>());
  return *instance;
}

// Return the CPU generator for an operator that was called with ``generator``, which may be undefined.
inline at::Generator host_generator(const std::optional<at::Generator>& generator) {
  const at::Generator& given = generator && generator->defined() ? *generator : default_generator();
  TORCH_CHECK(given.device().type() == c10::DeviceType::CUDA, "Expected a 'cuda' device type for generator but found '",
              given.device().type(), "'");
  return static_cast<DeviceGenerator*>(given.unsafeGetGeneratorImpl())->next();
}

}  // namespace fake_cuda
