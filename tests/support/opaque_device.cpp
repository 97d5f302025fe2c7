// SPDX-License-Identifier: Apache-2.0
#include "tests/support/opaque_device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <mutex>

#include "collegium/base/error.h"

namespace collegium::test {

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;

void set_access(void* address, std::size_t bytes, int rights) {
  COLLEGIUM_CHECK(bytes == 0 || ::mprotect(address, bytes, rights) == 0, "mprotect of {} bytes", bytes);
}

/// Pages without access rights; the length stands in the deleter's context.
struct Pages {
  void* address;
  std::size_t bytes;
};

class OpaqueAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device(kType, 0);
    if (bytes == 0) return {nullptr, device};
    void* address = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    COLLEGIUM_CHECK(address != MAP_FAILED, "mmap of {} bytes", bytes);
    auto* pages = new Pages{address, bytes};
    return {address, pages, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* /*to*/, const void* /*from*/, std::size_t /*bytes*/) const override {
    COLLEGIUM_CHECK(false, "the allocator of an opaque device copies nothing");
  }

 private:
  static void release(void* context) {
    const auto* pages = static_cast<Pages*>(context);
    ::munmap(pages->address, pages->bytes);
    delete pages;
  }
};

/// Opens a tensor's storage for as long as it lives, and shows it as a tensor of the CPU.
class Opened {
 public:
  explicit Opened(const at::Tensor& tensor)
      : storage_(tensor.storage()), opaque_(!tensor.is_cpu()), shown_(tensor) {
    if (!opaque_) return;
    set_access(storage_.mutable_data(), storage_.nbytes(), PROT_READ | PROT_WRITE);
    auto* first = static_cast<char*>(storage_.mutable_data());
    if (first != nullptr) first += tensor.storage_offset() * static_cast<std::int64_t>(tensor.element_size());
    shown_ = at::from_blob(first, tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
  }
  ~Opened() {
    if (opaque_) set_access(storage_.mutable_data(), storage_.nbytes(), PROT_NONE);
  }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;
  const at::Tensor& tensor() const { return shown_; }

 private:
  c10::Storage storage_;
  bool opaque_;
  at::Tensor shown_;
};

c10::Allocator& allocator() {
  static OpaqueAllocator instance;
  return instance;
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout> /*layout*/, std::optional<at::Device> /*device*/,
                 std::optional<bool> /*pinned*/, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef strides,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
                         std::optional<at::Device> /*device*/, std::optional<bool> /*pinned*/) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(strides),
                                           &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           dtype.value_or(at::kFloat));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool /*non_blocking*/) {
  const Opened source(from);
  const Opened target(to);
  target.tensor().copy_(source.tensor());
  return to;
}

// Results that an operation has given another shape, as arange does.
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) {
    c10::TensorImpl& resized = *to.unsafeGetTensorImpl();
    resized.set_storage_keep_dtype(at::empty(from.sizes(), to.options()).storage());
    resized.set_sizes_contiguous(from.sizes());
  }
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) { return Opened(self).tensor().item(); }

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<std::int64_t>(offset->expect_int()) : std::nullopt);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// A scalar tensor of the CPU may join in, any other may not. (Copies have their own entry
// above.)
void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto check = [&op](const at::Tensor& tensor) {
    COLLEGIUM_CHECK(!tensor.defined() || tensor.device().type() == kType || tensor.dim() == 0,
                    "{}: a tensor of the CPU among those of another device", op.schema().name());
  };
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector()) check(tensor);
  }
  at::native::cpu_fallback(op, stack);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex /*device*/) const override { return true; }
};

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::Device exchangeDevice(c10::Device /*device*/) const override { return {kType, 0}; }
  c10::Device getDevice() const override { return {kType, 0}; }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
};

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace

c10::Device opaque_device() {
  static std::once_flag registered;
  std::call_once(registered, [] {
    static Hooks hooks;
    c10::register_privateuse1_backend("opaque");
    at::RegisterPrivateUse1HooksInterface(&hooks);
    c10::SetAllocator(kType, &allocator());
  });
  return {kType, 0};
}

}  // namespace collegium::test
