// A CUDA device that is memory of the host and computes with the CPU's kernels, for a torch that was built without CUDA.
//
// To torch it is CUDA: tensors have that device, memory of its own that can run out, and no operator takes tensors of both sides. Every operator
// without a kernel here is computed by the CPU's on the same memory. It shows mixed devices, waits of the host for the GPU, memory at its peak, and what is read
// before another stream has written it. It shows nothing of speed, of CUDA's own kernels, or of what libraries take of a GPU.
// tests/pretended_gpu.py builds it and stands in for the rest of torch.cuda.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

const c10::Device GPU(c10::DeviceType::CUDA, 0);
constexpr int64_t ALIGNED = 512;  // as CUDA's allocator rounds

// ---- memory

std::atomic<int64_t> held{0}, peak{0}, room{std::numeric_limits<int64_t>::max()};

struct Block {
  void* memory;
  int64_t bytes;
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &nothing, GPU};
    const int64_t size = (static_cast<int64_t>(bytes) + ALIGNED - 1) / ALIGNED * ALIGNED;
    TORCH_CHECK_WITH(OutOfMemoryError, held + size <= room, "CUDA out of memory. Tried to allocate ", size, " bytes; ", held.load(), " of ", room.load(), " are in use");
    const int64_t now = held += size;
    for (int64_t before = peak; now > before && !peak.compare_exchange_weak(before, now);) {}
    auto* block = new Block{std::aligned_alloc(ALIGNED, size), size};
    TORCH_CHECK(block->memory, "the host's memory ran out");
    std::memset(block->memory, 0xFF, size);  // no number in any format: what was never written shows
    return {block->memory, block, &release, GPU};
  }
  static void nothing(void*) {}
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    held -= block->bytes;
    std::free(block->memory);
    delete block;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::Device(c10::kCPU)};
    void* found = std::malloc(bytes);
    const std::lock_guard<std::mutex> guard(pinned_lock);
    pinned[static_cast<const char*>(found)] = bytes;
    return {found, found, &release, c10::Device(c10::kCPU)};
  }
  static void release(void* found) {
    const std::lock_guard<std::mutex> guard(pinned_lock);
    pinned.erase(static_cast<const char*>(found));
    std::free(found);
  }
  static bool has(const void* place) {
    const std::lock_guard<std::mutex> guard(pinned_lock);
    auto next = pinned.upper_bound(static_cast<const char*>(place));
    return next != pinned.begin() && (--next, static_cast<const char*>(place) < next->first + next->second);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

// ---- what torch asks of a device

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream getNewStream(c10::Device, int = 0) const override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, GPU); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* place) const override { return PinnedMemory::has(place); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
};
using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

// ---- new tensors, and views of them

const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);
using Type = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Place = std::optional<at::Device>;

at::Tensor empty(at::IntArrayRef size, Type type, Layout, Place, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(type), format);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Type type, Layout, Place, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(type));
}

void* start(const at::Tensor& t) {  // `data_ptr` of a tensor that requires no kernel
  return static_cast<char*>(t.unsafeGetTensorImpl()->unsafe_storage().mutable_data()) + t.storage_offset() * t.element_size();
}
void grow(const at::Tensor& t) {  // its storage, so that it holds what the sizes say
  int64_t elements = t.numel() ? t.storage_offset() + 1 : 0;
  for (int64_t i = 0; elements && i < t.dim(); ++i) elements += (t.size(i) - 1) * t.stride(i);
  auto* storage = t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  const size_t needed = elements * t.element_size();
  if (needed <= storage->nbytes()) return;
  auto larger = memory.allocate(needed);
  if (storage->nbytes()) std::memcpy(larger.get(), storage->data(), storage->nbytes());
  storage->set_data_ptr_noswap(std::move(larger));
  storage->set_nbytes(needed);
}
const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  grow(self);
  return self;
}
at::Tensor& set_(at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  stride.size() == size.size() ? impl->set_sizes_and_strides(size, stride) : impl->set_sizes_contiguous(size);
  grow(self);
  return self;
}
at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const int64_t count = source.nbytes() / self.element_size();
  return set_(self, std::move(source), 0, {count}, {});
}
at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) { return set_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides()); }
at::Tensor& set_nothing(at::Tensor& self) { return set_(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &memory, true), 0, {0}, {}); }

// ---- waits of the host, and copies of other streams

std::atomic<bool> waiting_fails{false};
thread_local bool beside = false;
std::deque<std::pair<at::Tensor, at::Tensor>> later;  // what another stream copies, which comes as late as it may

void waits(const std::string& what) { TORCH_CHECK(!waiting_fails, "called a synchronizing CUDA operation: ", what); }

at::Tensor on_cpu(const at::Tensor& t) {  // the same memory, as a tensor of the CPU
  if (!t.defined() || t.is_cpu()) return t;
  TORCH_CHECK(t.is_cuda(), "a tensor on ", t.device());
  const auto options = t.options().device(c10::kCPU).requires_grad(false);
  if (!t.numel()) return at::empty_strided(t.sizes(), t.strides(), options);
  at::Tensor twin = at::for_blob(start(t), t.sizes()).strides(t.strides()).options(options).make_tensor();
  twin._set_conj(t.is_conj());
  return twin;
}
at::Tensor on_gpu(const at::Tensor& t) {  // a copy
  if (!t.defined()) return t;
  at::Tensor copy = at::detail::empty_strided_generic(t.sizes(), t.strides(), &memory, KEYS, t.scalar_type());
  if (t.numel()) std::memcpy(start(copy), t.const_data_ptr(), copy.storage().nbytes());
  return copy;
}
int64_t settled = 0;
void settle(int64_t until) {  // the copies before the one of that number, counted from the first there was
  while (settled < until && !later.empty()) {
    const auto [to, from] = later.front();
    later.pop_front();
    ++settled;
    on_cpu(to).copy_(on_cpu(from));
  }
}
at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.device() != source.device() && (!non_blocking || (self.is_cpu() && !PinnedMemory::has(self.const_data_ptr())))) waits("copy_");
  if (beside && non_blocking)
    later.emplace_back(self, source);
  else
    on_cpu(self).copy_(on_cpu(source));
  return self;
}
at::Scalar item(const at::Tensor& self) {
  waits("item");
  return on_cpu(self).item();
}

// ---- operators

const std::set<std::string> INDICES{"aten::index.Tensor", "aten::index.Tensor_out", "aten::index_put_", "aten::_index_put_impl_"};  // CUDA takes those of the host, and waits
const std::set<std::string> WAITING{"aten::nonzero", "aten::repeat_interleave.Tensor", "aten::equal", "aten::masked_select", "aten::_unique2", "aten::unique_dim"};
const std::set<std::string> PRODUCTS{"aten::mm.out", "aten::bmm.out", "aten::addmm.out", "aten::baddbmm.out", "aten::_slow_conv2d_forward"};
constexpr int64_t SIDE = 4096;  // of lorabooth/speed.py's product, which is not computed: nobody reads it, and it takes seconds

at::Tensor fp8_product(const std::vector<c10::IValue>& args) {  // the CPU's own takes minutes
  const auto wide = [&](int i) { return args[i].toTensor().to(at::kFloat); };
  at::Tensor out = at::mm(wide(0), wide(1)) * wide(2) * wide(3);
  if (args[4].isTensor() && args[4].toTensor().defined()) out = out + wide(4);
  return out.to(args[6].toScalarType());
}

void by_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& overload = schema.operator_name().overload_name;
  const std::string name = schema.operator_name().name + (overload.empty() ? "" : "." + overload);
  if (WAITING.count(name)) waits(name);

  std::vector<std::pair<at::Tensor, at::Tensor>> twins;
  const auto lent = [&](const at::Tensor& t) {
    if (t.defined() && t.is_cpu() && t.dim()) {
      TORCH_CHECK(INDICES.count(name), name, ": Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!");
      waits(name);
    }
    at::Tensor twin = on_cpu(t);
    if (t.defined() && t.is_cuda()) twins.emplace_back(t, twin);
    return twin;
  };
  const size_t given = schema.arguments().size();
  std::vector<c10::IValue> args;
  for (const auto& value : torch::jit::last(*stack, given)) {
    if (value.isTensor()) {
      args.emplace_back(lent(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> several;
      for (const auto& t : value.toTensorVector()) several.push_back(lent(t));
      args.emplace_back(several);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> several;
      for (const auto& t : value.toOptionalTensorVector()) several.push_back(t ? std::optional<at::Tensor>(lent(*t)) : std::nullopt);
      args.emplace_back(several);
    } else {
      args.push_back(value.isDevice() ? c10::IValue(c10::Device(c10::kCPU)) : value);
    }
  }
  torch::jit::drop(*stack, given);

  // Where a CPU lacks bf16, its products are ten times faster in fp32, which is also how tensor cores add up.
  at::Tensor out;
  const bool widened = PRODUCTS.count(name) && args[0].toTensor().scalar_type() == at::kBFloat16;
  if (widened) {
    for (auto& value : args)
      if (value.isTensor() && value.toTensor().defined()) value = (out = value.toTensor()).to(at::kFloat);
  }
  if (name == "aten::_scaled_mm") {
    stack->emplace_back(fp8_product(args));
  } else if (widened && args[0].toTensor().numel() == SIDE * SIDE && out.numel() == SIDE * SIDE) {
    stack->emplace_back(args.back());
  } else {
    for (auto& value : args) stack->push_back(value);
    op.callBoxed(stack);
  }

  const auto back = [&](const at::Tensor& t) -> at::Tensor {
    for (const auto& [gpu, twin] : twins) {
      if (!t.defined()) continue;
      if (t.is_same(twin)) {
        if (t.sizes() != gpu.sizes()) gpu.set_(on_gpu(t));  // an `out` that was empty
        return gpu;
      }
      if (t.storage().unsafeGetStorageImpl() == twin.storage().unsafeGetStorageImpl() && t.scalar_type() == gpu.scalar_type())
        return at::native::as_strided_tensorimpl(gpu, t.sizes(), t.strides(), gpu.storage_offset() + t.storage_offset());
    }
    return on_gpu(t);
  };
  const size_t made = schema.returns().size();
  std::vector<c10::IValue> results;
  for (const auto& value : torch::jit::last(*stack, made)) {
    if (value.isTensor() && widened) {
      const bool into = name.size() > 4 && name.compare(name.size() - 4, 4, ".out") == 0;
      results.emplace_back(into ? back(out.copy_(value.toTensor())) : on_gpu(value.toTensor().to(at::kBFloat16)));
    } else if (value.isTensor()) {
      results.emplace_back(back(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> several;
      for (const auto& t : value.toTensorVector()) several.push_back(back(t));
      results.emplace_back(several);
    } else {
      results.push_back(value);
    }
  }
  torch::jit::drop(*stack, made);
  for (auto& value : results) stack->push_back(value);
}

// ---- attention: one fast kernel, which keeps what CUDA's memory-efficient one keeps, and the plain product

using Bias = std::optional<at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

at::Tensor wide(const at::Tensor& t) { return t.defined() ? on_cpu(t).to(at::kFloat) : t; }
Bias wide(const Bias& t) { return t && t->defined() ? Bias(on_cpu(*t).to(at::kFloat)) : Bias(); }

Four fast_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Bias& bias, bool, double dropout, bool causal, std::optional<double> scale) {
  TORCH_CHECK(q.is_cuda() && k.is_cuda() && v.is_cuda() && (!bias || bias->is_cuda()), "attention: Expected all tensors to be on the same device");
  const auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(wide(q), wide(k), wide(v), dropout, causal, wide(bias), scale);
  return {on_gpu(out.to(q.scalar_type())), on_gpu(sums), on_gpu(at::zeros({}, at::kLong)), on_gpu(at::zeros({}, at::kLong))};
}
Four fast_attention_backward(const at::Tensor& gradient, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias, const at::Tensor& out,
                             const at::Tensor& sums, const at::Tensor&, const at::Tensor&, double dropout, std::array<bool, 4>, bool causal, std::optional<double> scale) {
  const auto [a, b, c] = at::_scaled_dot_product_flash_attention_for_cpu_backward(wide(gradient), wide(q), wide(k), wide(v), wide(out), wide(sums), dropout, causal, wide(Bias(bias)), scale);
  return {on_gpu(a.to(q.scalar_type())), on_gpu(b.to(q.scalar_type())), on_gpu(c.to(q.scalar_type())), at::Tensor()};
}
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Bias& mask, double dropout, bool causal, std::optional<double> scale, bool grouped) {
  if (!at::globalContext().userEnabledMemEfficientSDP() || grouped) {
    TORCH_CHECK(at::globalContext().userEnabledMathSDP(), "No available kernel. Aborting execution.");
    return std::get<0>(at::_scaled_dot_product_attention_math(q, k, v, mask, dropout, causal, std::nullopt, scale, grouped));
  }
  Bias bias = mask;
  if (mask && mask->scalar_type() == at::kBool) bias = at::zeros(mask->sizes(), q.options()).masked_fill_(mask->logical_not(), -std::numeric_limits<double>::infinity());
  if (bias) bias = bias->to(q.scalar_type()).expand({q.size(0), q.size(1), q.size(2), k.size(2)});
  return std::get<0>(at::_scaled_dot_product_efficient_attention(q, k, v, bias, /*compute_log_sumexp=*/true, dropout, causal, scale));
}

void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("resize_", resize_);
  library.impl("set_", set_nothing);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_);
  library.impl("copy_", copy_);
  library.impl("_local_scalar_dense", item);
  library.impl("record_stream", record_stream);
  library.impl("_scaled_dot_product_efficient_attention", fast_attention);
  library.impl("_scaled_dot_product_efficient_attention_backward", fast_attention_backward);
}
TORCH_LIBRARY_IMPL(aten, AutogradCUDA, library) { library.impl("scaled_dot_product_attention", attention); }
TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }

const bool registered = (c10::SetAllocator(c10::DeviceType::CUDA, &memory, /*priority=*/10), true);

}  // namespace

// ---- for tests/pretended_gpu.py

extern "C" {
int64_t pretended_held() { return held; }
int64_t pretended_peak() { return peak; }
void pretended_reset_peak() { peak = held.load(); }
int64_t pretended_room() { return room; }
void pretended_set_room(int64_t bytes) { room = bytes; }
void pretended_let_waiting_fail(bool on) { waiting_fails = on; }
void pretended_beside(bool on) { beside = on; }
int64_t pretended_copies() { return settled + static_cast<int64_t>(later.size()); }
void pretended_settle(int64_t until) { settle(until); }
bool pretended_is_there() { return at::detail::getCUDAHooks().hasCUDA(); }
}
