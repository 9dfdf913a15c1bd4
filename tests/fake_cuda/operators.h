// Operators of the device. A few have kernels here. All others run the CPU kernel on aliases of the device memory.
#pragma once
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <set>
#include <vector>

#include "allocator.h"
#include "counters.h"
#include "generator.h"

namespace fake_cuda {

using at::Tensor;
using std::optional;

const c10::DispatchKeySet CUDA_KEY(c10::DispatchKey::CUDA);

// Operators whose output size depends on values, or whose CUDA kernel reads a value.
const std::set<std::string> SYNCHRONIZING = {
    "aten::nonzero", "aten::masked_select",     "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::equal",   "aten::unique_consecutive", "aten::bincount", "aten::histc",   "aten::multinomial"};
// Operators that accept indices on the host. The first has copied them to the device before its kernel runs.
const std::set<std::string> HOST_INDICES = {"aten::index", "aten::_index_put_impl_"};
// Operators that accept 0-dim host tensors, in addition to those with the tag "pointwise".
const std::set<std::string> HOST_SCALARS = {"aten::fill_", "aten::masked_fill_", "aten::_index_put_impl_",
                                            "aten::floor_divide", "aten::floor_divide_"};

inline bool on_device(const Tensor& t) { return t.defined() && t.device().type() == c10::DeviceType::CUDA; }

inline Tensor new_device_tensor(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(size, stride, &device_allocator(), CUDA_KEY, dtype);
}

// Return a host tensor that aliases a tensor of the device.
inline Tensor host_alias(const Tensor& t) {
  if (!on_device(t)) return t;
  if (t.numel() == 0) return at::detail::empty_strided_cpu(t.sizes(), t.strides(), t.scalar_type());
  Tensor alias = at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [t](void*) {}, t.options().device(at::kCPU));
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) alias.unsafeGetTensorImpl()->set_wrapped_number(true);
  return alias;
}

// Return the alias of an argument that must be on the device.
inline Tensor device_argument(const Tensor& t, const char* name) {
  TORCH_CHECK(on_device(t), "Expected all tensors to be on the same device, but ", name, " is on ", t.device());
  return host_alias(t);
}

inline Tensor to_device(const Tensor& t) {
  if (!t.defined()) return t;
  Tensor result = new_device_tensor(t.sizes(), t.strides(), t.scalar_type());
  if (t.numel()) host_alias(result).copy_(t);
  return result;
}

// ---- Memory

inline Tensor empty(at::IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device>,
                    optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_allocator(), CUDA_KEY, c10::dtype_or_default(dtype), format);
}

inline Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, optional<at::ScalarType> dtype,
                            optional<at::Layout>, optional<at::Device>, optional<bool>) {
  return new_device_tensor(size, stride, c10::dtype_or_default(dtype));
}

inline bool is_pinned(const Tensor& t) { return pinned_allocator().contains(t.storage().data()); }

inline Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.numel()) return self;
  if (on_device(self) && on_device(source)) {
    counters().launch("aten::copy_");
  } else {
    const bool pinned = is_pinned(on_device(self) ? source : self);
    const char* direction = on_device(self) ? "host_to_device" : "device_to_host";
    counters().copy(direction);
    if (!pinned) counters().copy("pageable");
    if (!pinned || !non_blocking) counters().synchronize(direction);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  host_alias(self).copy_(host_alias(source));
  return self;
}

inline at::Scalar local_scalar_dense(const Tensor& self) {
  counters().copy("device_to_host");
  counters().synchronize("item");
  return host_alias(self).item();
}

inline const Tensor& resize_(const Tensor& self, at::IntArrayRef size, optional<at::MemoryFormat> format) {
  return at::native::resize_(self, size, format);
}

inline Tensor& set_(Tensor& self) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, &device_allocator(), true);
  return at::native::set_storage_cpu_(self, storage, 0, {0}, {});
}

inline Tensor& set_source_storage(Tensor& self, at::Storage source) {
  const int64_t size = source.nbytes() / self.itemsize();
  return at::native::set_storage_cpu_(self, source, 0, {size}, {});
}

inline void record_stream(Tensor&, c10::Stream) {}

// ---- Kernels whose CPU version lacks a feature of the CUDA version

inline std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, optional<bool> train) {
  counters().launch("aten::native_dropout");
  Tensor x = host_alias(input);
  if (train && !*train) return {to_device(x), to_device(at::ones_like(x, x.options().dtype(at::kBool)))};
  Tensor mask = at::empty(x.sizes(), x.options().dtype(at::kBool)).bernoulli_(1 - p, host_generator({}));
  return {to_device(x * mask * (p < 1 ? 1 / (1 - p) : 0)), to_device(mask)};
}

// half_to_float: compute fp16 input in fp32 and return fp32.
inline Tensor softmax(const Tensor& input, int64_t dim, bool half_to_float) {
  counters().launch("aten::_softmax");
  Tensor x = host_alias(input);
  return to_device(at::_softmax(half_to_float ? x.to(at::kFloat) : x, dim, false));
}

inline Tensor log_softmax(const Tensor& input, int64_t dim, bool half_to_float) {
  counters().launch("aten::_log_softmax");
  Tensor x = host_alias(input);
  return to_device(at::_log_softmax(half_to_float ? x.to(at::kFloat) : x, dim, false));
}

inline Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim, at::ScalarType input_dtype) {
  counters().launch("aten::_softmax_backward_data");
  Tensor y = host_alias(output);
  return to_device(at::_softmax_backward_data(device_argument(grad, "grad"), y, dim, y.scalar_type()).to(input_dtype));
}

inline Tensor log_softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim, at::ScalarType input_dtype) {
  counters().launch("aten::_log_softmax_backward_data");
  Tensor y = host_alias(output);
  return to_device(at::_log_softmax_backward_data(device_argument(grad, "grad"), y, dim, y.scalar_type()).to(input_dtype));
}

inline Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {
  counters().launch("aten::histc");
  counters().synchronize("aten::histc");
  Tensor x = host_alias(self);
  return to_device(at::histc(x.is_floating_point() ? x : x.to(at::kDouble), bins, min, max).to(x.scalar_type()));
}

// ---- Attention. As on a GPU, a kernel that stores no scores is used unless the arguments require the composite one.

inline int64_t sdp_choice(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& mask,
                          double dropout, bool, optional<double>, bool) {
  const bool composite = query.dim() != 4 || query.size(1) != key.size(1) || query.size(3) != value.size(3) ||
                         dropout > 0 || !query.numel() || !key.numel() || (mask && mask->requires_grad());
  return (int64_t)(composite ? at::SDPBackend::math : at::SDPBackend::efficient_attention);
}

inline optional<Tensor> mask_alias(const optional<Tensor>& mask) {
  return mask && mask->defined() ? optional<Tensor>(device_argument(*mask, "attn_mask")) : std::nullopt;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& mask, bool, double dropout,
    bool causal, optional<double> scale) {
  counters().launch("aten::_scaled_dot_product_efficient_attention");
  auto [out, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      device_argument(query, "query"), device_argument(key, "key"), device_argument(value, "value"), dropout, causal,
      mask_alias(mask), scale);
  Tensor seed = at::zeros({}, at::kLong);
  return {to_device(out), to_device(logsumexp), to_device(seed), to_device(seed)};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask,
    const Tensor& out, const Tensor& logsumexp, const Tensor&, const Tensor&, double dropout, std::array<bool, 4>,
    bool causal, optional<double> scale) {
  counters().launch("aten::_scaled_dot_product_efficient_attention_backward");
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      device_argument(grad, "grad"), host_alias(query), host_alias(key), host_alias(value), host_alias(out),
      host_alias(logsumexp), dropout, causal, mask_alias(mask), scale);
  return {to_device(dq), to_device(dk), to_device(dv), Tensor()};
}

// ---- All other operators

inline bool is_pointwise(const c10::OperatorHandle& op) {
  static const auto* names = [] {  // of operators with a pointwise overload
    auto* result = new std::set<std::string>(HOST_SCALARS);
    auto& dispatcher = c10::Dispatcher::singleton();
    for (const auto& name : dispatcher.getAllOpNames()) {
      auto found = dispatcher.findOp(name);
      if (found && found->hasTag(at::Tag::pointwise)) result->insert(name.name);
    }
    return result;
  }();
  return names->count(op.schema().name()) > 0;
}

// Replaces device tensors among the arguments of one call by host aliases, and host tensors among the results by device
// tensors.
class HostCall {
 public:
  explicit HostCall(const c10::OperatorHandle& op) : name_(op.schema().name()), pointwise_(is_pointwise(op)) {}

  c10::IValue argument(const c10::Argument& argument, const c10::IValue& value) {
    if (value.isTensor()) return alias(argument, value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> tensors;
      for (const Tensor& t : value.toTensorVector()) tensors.push_back(alias(argument, t));
      return tensors;
    }
    if (value.isOptionalTensorList()) {
      c10::List<optional<Tensor>> tensors;
      for (const auto& t : value.toOptionalTensorVector())
        tensors.push_back(t ? optional<Tensor>(alias(argument, *t)) : t);
      return tensors;
    }
    if (value.isDevice() && value.toDevice().type() == c10::DeviceType::CUDA) return at::Device(at::kCPU);
    const auto* type = argument.type()->castRaw<c10::OptionalType>();
    if (value.isGenerator()) return host_generator(value.toGenerator());
    if (type && type->getElementType()->kind() == c10::TypeKind::GeneratorType) return host_generator({});
    return value;
  }

  // Raise if arguments are on several devices, with the exceptions that CUDA kernels make.
  void check_devices() const {
    TORCH_CHECK(aliases_.empty() || host_argument_.empty(),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (when ",
                "checking argument ", host_argument_, " of ", name_, ")");
  }

  void count(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments) const {
    counters().launch(name_);
    if (SYNCHRONIZING.count(name_)) counters().synchronize(name_);
    if (name_ == "aten::repeat_interleave" && arguments.back().isNone()) counters().synchronize(name_);
    for (int64_t n = 0; n < host_indices_ && name_ != "aten::index"; ++n) {
      counters().copy("host_to_device"), counters().copy("pageable");
      counters().synchronize("host_to_device");
    }
  }

  // Copy outputs that the kernel resized.
  void finish_outputs() const {
    for (const auto& [host, device] : aliases_)
      if (host.numel() && !device.numel()) {
        device.resize_(host.sizes());
        host_alias(device).copy_(host);
      }
  }

  c10::IValue result(const c10::IValue& value) const {
    if (value.isTensor()) return original(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<Tensor> tensors;
    for (const Tensor& t : value.toTensorVector()) tensors.push_back(original(t));
    return tensors;
  }

 private:
  std::string name_, host_argument_;
  bool pointwise_;
  int64_t host_indices_ = 0;
  std::vector<std::pair<Tensor, Tensor>> aliases_;  // (host, device)

  Tensor alias(const c10::Argument& argument, const Tensor& t) {
    if (!t.defined()) return t;
    if (on_device(t)) return aliases_.emplace_back(host_alias(t), t).first;
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (argument.name() == "indices" && HOST_INDICES.count(name_)) ++host_indices_;
    else if (t.dim() || written || !pointwise_) host_argument_ = argument.name();
    return t;
  }

  Tensor original(const Tensor& t) const {
    for (const auto& [host, device] : aliases_)
      if (host.is_same(t)) return device;
    return to_device(t);
  }
};

inline void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t first = stack->size() - schema.arguments().size();
  HostCall call(op);
  for (size_t n = first; n < stack->size(); ++n)
    (*stack)[n] = call.argument(schema.arguments()[n - first], (*stack)[n]);
  call.check_devices();
  call.count(schema, {stack->begin() + first, stack->end()});
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.finish_outputs();
  for (size_t n = first; n < stack->size(); ++n) {
    const auto* alias = schema.returns()[n - first].alias_info();
    TORCH_CHECK(!alias || alias->isWrite(), "The fake device has no kernel for the view ", schema.name());
    (*stack)[n] = call.result((*stack)[n]);
  }
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
  m.impl("record_stream", TORCH_FN(record_stream));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_", TORCH_FN(set_));
  m.impl("set_.source_Storage", TORCH_FN(set_source_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("native_dropout", TORCH_FN(native_dropout));
  m.impl("histc", TORCH_FN(histc));
  // Without a kernel, it would be composed of other operators, which allocate more memory.
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  m.impl("_softmax", TORCH_FN(softmax));
  m.impl("_log_softmax", TORCH_FN(log_softmax));
  m.impl("_softmax_backward_data", TORCH_FN(softmax_backward));
  m.impl("_log_softmax_backward_data", TORCH_FN(log_softmax_backward));
  m.impl("_scaled_dot_product_efficient_attention", TORCH_FN(efficient_attention));
  m.impl("_scaled_dot_product_efficient_attention_backward", TORCH_FN(efficient_attention_backward));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

}  // namespace fake_cuda

namespace at::native {
static RegisterCUDADispatch<struct _fused_sdp_choice_stub_DECLARE_DISPATCH_type> sdp_choice_of_fake_device(
    _fused_sdp_choice_stub, &fake_cuda::sdp_choice);
}  // namespace at::native
