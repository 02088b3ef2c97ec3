// The parts of op.h that do not depend on the operation: checks, the call of a kernel, and the loading of kernels.
#include "op.h"

#include "convolves.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <torch/csrc/stable/c/shim.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <sstream>

namespace convblocks {

std::string size_of(const Tensor& t) {
  std::ostringstream s;
  s << t.sym_sizes();
  return s.str();
}

std::string name_of(at::ScalarType dtype) { return std::string(c10::getDtypeNames(dtype).first); }

void check_feature_map(const char* op, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": expected a 4-D input (N, C, H, W), got a ", x.dim(), "-D tensor of size ",
                    size_of(x));
  const auto t = x.scalar_type();
  TORCH_CHECK_TYPE(t == at::kFloat || t == at::kDouble || t == at::kHalf || t == at::kBFloat16, op,
                   ": expected an input of dtype float32, float64, float16 or bfloat16, got ", name_of(t));
}

void check_parameter(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x) {
  if (!t.has_value()) return;
  TORCH_CHECK(t->device() == x.device(), op, ": expected ", name, " on ", x.device(), " like the input, got ",
              t->device());
  if (t->scalar_type() == x.scalar_type()) return;
  const bool half = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  TORCH_CHECK_TYPE(half && t->scalar_type() == at::kFloat, op, ": expected ", name, " of dtype ",
                   name_of(x.scalar_type()), half ? " or float32" : "", ", got ", name_of(t->scalar_type()));
}

void check_parameter(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x,
                     c10::SymIntArrayRef size) {
  check_parameter(op, name, t, x);
  TORCH_CHECK_VALUE(!t.has_value() || t->sym_sizes() == size, op, ": expected ", name, " of size ", size, ", got ",
                    size_of(*t));
}

void check_same_dtype(const char* op, const char* name, const std::optional<Tensor>& t, const char* first_name,
                      const Tensor& first) {
  if (!t.has_value()) return;
  TORCH_CHECK_TYPE(t->scalar_type() == first.scalar_type(), op, ": expected ", name, " of dtype ",
                   name_of(first.scalar_type()), " like ", first_name, ", got ", name_of(t->scalar_type()));
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x, c10::SymIntArrayRef size) {
  TORCH_CHECK_VALUE(t.sym_sizes() == size, op, ": expected ", name, " of size ", size, ", got ", size_of(t));
  TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), op, ": expected ", name, " of dtype ", name_of(x.scalar_type()),
                   ", got ", name_of(t.scalar_type()));
  TORCH_CHECK(t.device() == x.device(), op, ": expected ", name, " on ", x.device(), " like the input, got ",
              t.device());
}

Tensor in_autocast_dtype(const Tensor& t, at::DeviceType device) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
}
std::optional<Tensor> in_autocast_dtype(const std::optional<Tensor>& t, at::DeviceType device) {
  return t ? std::optional(in_autocast_dtype(*t, device)) : t;
}

int64_t check_one_of(const char* op, const char* argument, std::string_view value,
                     at::ArrayRef<std::string_view> names) {
  for (size_t i = 0; i < names.size(); i++) {
    if (names[i] == value) return static_cast<int64_t>(i);
  }
  std::string list;
  for (const auto& name : names) list += (list.empty() ? "" : ", ") + std::string(name);
  TORCH_CHECK_VALUE(false, op, ": expected ", argument, " to be one of ", list, ", got ", value);
}

static std::vector<KernelSlot*>& slots() {
  static std::vector<KernelSlot*> all;
  return all;
}

KernelSlot::KernelSlot(std::string s, bool e) : symbol(std::move(s)), everywhere(e) { slots().push_back(this); }

static bool cpu_convolves = false;  // the kernels of the CPU are its own, and not those of CUDA compiled for it

// Makes the kernels in a shared object those of a device. The object stays loaded: a call may be running in it.
static void load_kernels(std::string_view path, std::string_view device) {
  TORCH_CHECK_VALUE(device == "cpu" || device == "cuda", "convblocks: expected device cpu or cuda, got ", device);
  void* library = dlopen(std::string(path).c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library, dlerror());
  for (const KernelSlot* slot : slots()) {
    TORCH_CHECK(!slot->everywhere || dlsym(library, slot->symbol.c_str()), path, " has no ", slot->symbol,
                ": it was built from other sources");
  }
  for (KernelSlot* slot : slots()) (device == "cpu" ? slot->cpu : slot->cuda) = dlsym(library, slot->symbol.c_str());
  if (device == "cpu") cpu_convolves = dlsym(library, "convblocks_convolves") != nullptr;
}

bool kernels_convolve(const Tensor& x) {
  return x.is_cpu() && cpu_convolves && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
}

std::tuple<Tensor, Tensor> convolution_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                 c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                 c10::SymIntArrayRef dilation, const c10::SymInt& groups, bool real) {
  if (real && x.is_cpu() && grad.numel() == grad.size(1)) {
    const auto two = [](const Tensor& t) { return at::cat({t, at::zeros_like(t)}); };
    const auto [grad_x, grad_weight] =
        convolution_gradients(two(grad), two(x), weight, stride, padding, dilation, groups, real);
    return {grad_x.narrow(0, 0, 1).clone(), grad_weight};  // not a part of more memory
  }
  const auto in = [&](at::ScalarType dtype) {
    auto [grad_x, grad_weight, none] =
        at::convolution_backward_symint(grad.to(dtype), x.to(dtype), weight.to(dtype), {}, stride, padding, dilation,
                                        false, {0, 0}, groups, {true, true, false});
    return std::tuple(grad_x.to(x.scalar_type()), grad_weight.to(weight.scalar_type()));
  };
  const bool half = x.is_cpu() && x.element_size() == 2;
  if (half && (x.scalar_type() == at::kHalf || x.sym_size(3) < stride[1])) return in(at::kFloat);
  auto gradients = in(x.scalar_type());
  // A sum takes a thirtieth of the time of isfinite().all(). Where it overflows, float32 takes longer, and is right, too.
  if (half && real && !std::isfinite(std::get<1>(gradients).sum().item<float>())) return in(at::kFloat);
  return gradients;
}

// What the CPU kernels of a thread work on, where it is small: kept for the next call, which finds it in the cache.
struct Arena {
  static constexpr size_t kBytes = 512 << 10, kAlignment = 64;
  std::unique_ptr<void, decltype(&std::free)> data{nullptr, std::free};
  size_t used = 0;

  void* take(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    return nullptr;  // each has its own, so that what is past its end is seen
#endif
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > kBytes - used) return nullptr;
    if (!data) data.reset(std::aligned_alloc(kAlignment, kBytes));
    if (!data) return nullptr;
    used += bytes;
    return static_cast<std::byte*>(data.get()) + used - bytes;
  }
};
static thread_local Arena arena;

Call::Call(const char* op, const KernelSlot& slot, const Tensor& x)
    : op_(op), function_(slot.on(x)), x_(x), used_before_(arena.used) {
  stream = nullptr;
  if (x.is_cuda()) {
    stream = c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
  }
  threads = at::get_num_threads();
  workspace = [](const Context& context, size_t bytes) -> void* {
    const auto& call = static_cast<const Call&>(context);
    void* const small = call.x_.is_cpu() && cpu_convolves ? arena.take(bytes) : nullptr;
    if (small) return small;
    call.kept_.push_back(at::empty({static_cast<int64_t>(bytes)}, call.x_.options().dtype(at::kByte)));
    return call.kept_.back().data_ptr();
  };
  parallel_for = [](int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* data) {
    struct Task {
      void (*body)(void*, int64_t, int64_t);
      void* data;
    } task{body, data};
    // torch's own pool through its C interface: compiled in here, OpenMP would have to match torch's.
    const auto error = torch_parallel_for(
        0, end, grain,
        [](int64_t begin, int64_t stop, void* t) {
          const auto& task = *static_cast<Task*>(t);
          task.body(task.data, begin, stop);
        },
        &task);
    if (error) throw std::bad_alloc();  // the only thing that fails in a kernel
  };
}

Call::~Call() { arena.used = used_before_; }

void Call::fail(const char* error) const {
  TORCH_CHECK(false, op_, ": expected the kernel to run on an input of size ", size_of(x_), ", got: ", error);
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kDouble: return Dtype::f64;
    case at::kHalf: return Dtype::f16;
    default: return Dtype::bf16;
  }
}

// Of a single pixel, which may have any, that of channels_last.
static int64_t pixel_stride(const Tensor& t) {
  return t.size(3) > 1 ? t.stride(3) : t.size(2) > 1 ? t.stride(2) : std::max<int64_t>(1, t.size(1));
}

static bool is_walkable(const Tensor& t, at::MemoryFormat format) {
  const int64_t h = t.size(2), w = t.size(3), pixel = pixel_stride(t);
  const bool even = h == 1 || w == 1 || t.stride(2) == w * t.stride(3);
  if (format == at::MemoryFormat::ChannelsLast)
    return even && (t.size(1) == 1 || t.stride(1) == 1) && pixel >= t.size(1);
  return even && (h * w == 1 || pixel == 1);
}

Walk::Walk(const Tensor& t, at::MemoryFormat format) : tensor(is_walkable(t, format) ? t : t.contiguous(format)) {
  const int64_t pixel = format == at::MemoryFormat::ChannelsLast ? pixel_stride(tensor) : 1;
  map = {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), pixel};
}

at::MemoryFormat memory_format(const Tensor& x) {
  const bool channels_last = x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
  return channels_last ? at::MemoryFormat::ChannelsLast : x.suggest_memory_format();
}

at::MemoryFormat walk_format(const Tensor& x) {
  return x.size(1) == 1 ? at::MemoryFormat::Contiguous : memory_format(x);
}

const void* data_of(const std::optional<Tensor>& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }

void define_once(torch::Library& m, const std::string& name, const char* schema, const std::vector<at::Tag>& tags) {
  if (!c10::Dispatcher::singleton().findSchema({"convblocks::" + name, ""})) m.def((name + schema).c_str(), tags);
}

bool under_transform() {
  using c10::DispatchKey;
  return c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerBackMode) ||
         c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// What is larger than the C library keeps comes from the system anew each time, zeroed a page at a time; in large pages,
// where they are for those who ask, that costs a fraction.
static void take_large_pages(const Tensor& y) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kKept = 32 << 20, kPage = 2 << 20;
  if (y.nbytes() <= kKept) return;
  const auto begin = reinterpret_cast<uintptr_t>(y.data_ptr()), end = begin + y.nbytes();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end / kPage * kPage - first, MADV_HUGEPAGE);
#endif
}

Tensor empty_map(const Tensor& x, c10::SymIntArrayRef size) {
  const Tensor y = at::empty_symint(size, x.options(), memory_format(x));
  if (y.is_cpu() && !y.unsafeGetTensorImpl()->is_python_dispatch()) take_large_pages(y);
  return y;
}

}  // namespace convblocks

TORCH_LIBRARY_FRAGMENT(convblocks, m) {
  if (!c10::Dispatcher::singleton().findSchema({"convblocks::_load_kernels", ""})) {
    m.def("_load_kernels(str path, str device) -> ()", convblocks::load_kernels);
  }
}
