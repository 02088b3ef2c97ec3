// How an operation's kernel is found and called, and the maps that it is given.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "kernel.h"

namespace convblocks {

using at::Tensor;

// A kernel function by its name in the shared objects; null on a device that has none. Filled in by _load_kernels.
struct KernelSlot {
  explicit KernelSlot(std::string symbol, bool everywhere = true);
  std::string symbol;
  bool everywhere;  // in the shared objects of every device
  void* cpu = nullptr;
  void* cuda = nullptr;
  void* on(const Tensor& x) const { return x.is_cuda() ? cuda : cpu; }
};

// One call of a kernel: the context it is lent, and its error turned into an exception.
class Call : Context {
 public:
  Call(const char* op, const KernelSlot& slot, const Tensor& x);
  ~Call();
  Call(const Call&) = delete;

  template <class Args>
  void operator()(const Args& args) const {
    using Function = const char* (*)(const Context&, const Args&);
    if (const char* error = reinterpret_cast<Function>(function_)(*this, args)) fail(error);
  }

 private:
  [[noreturn]] void fail(const char* error) const;
  const char* op_;
  void* function_;
  const Tensor& x_;
  mutable std::vector<Tensor> kept_;
  const size_t used_before_;  // of the thread's memory for small workspaces
};

Dtype dtype_of(const Tensor& t);
// A map as the kernels can walk it in `format`, which all maps of a call share: as it is where its strides allow, else a
// dense copy, which lives as long as this does.
struct Walk {
  Walk(const Tensor& t, at::MemoryFormat format);
  Tensor tensor;
  Map map;
};
// That of an output: channels_last if x is so laid out, dense or not, else contiguous.
at::MemoryFormat memory_format(const Tensor& x);
// That of a call: a single channel is a plane, whatever its strides say.
at::MemoryFormat walk_format(const Tensor& x);
const void* data_of(const std::optional<Tensor>& t);

}  // namespace convblocks
