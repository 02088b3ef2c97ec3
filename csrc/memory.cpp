#include "memory.h"

#include <ATen/OpMathType.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "op.h"

namespace convblocks {

static thread_local Memory* innermost = nullptr;

Memory::Memory(const Tensor& x, Tensor kept) : x_(x), kept_(std::move(kept)), outer_(innermost) {
  innermost = c10::impl::TorchDispatchModeTLS::any_modes_set() ? nullptr : this;
}
Memory::~Memory() { innermost = outer_; }

Memory* Memory::of(const Tensor& x, const KernelSlot& remembering) {
  return innermost && innermost->x_.is_same(x) && remembering.on(x) ? innermost : nullptr;
}

void* Memory::keep(const Tensor& x, const KernelSlot& remembering, int64_t size) {
  Memory* const memory = of(x, remembering);
  if (!memory) return nullptr;
  memory->kept_ = at::empty({size}, x.options().dtype(at::toOpMathType(x.scalar_type())));
  return memory->kept_.data_ptr();
}

const void* Memory::kept(const Tensor& x, const KernelSlot& remembering, int64_t size) {
  const Memory* const memory = of(x, remembering);
  if (!memory || !memory->kept_.defined()) return nullptr;
  const Tensor& t = memory->kept_;  // hooks may have put anything in its place
  const bool usable = t.numel() == size && t.scalar_type() == at::toOpMathType(x.scalar_type()) &&
                      t.device() == x.device() && t.is_contiguous();
  return usable ? t.const_data_ptr() : nullptr;
}

}  // namespace convblocks
