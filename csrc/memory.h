// What the kernel of an operation computes and that of its backward would compute again. Autograd's node opens a Memory
// around its calls of the two, which go through the dispatcher. Who runs there in place of the kernel (a subclass of tensors,
// another backend) neither fills it nor reads it; a backward that is given none computes all of it. Under a mode none is
// open: a selective checkpoint's takes outputs of the forward for those of its second run, which then has no memory, too.
#pragma once
#include "call.h"

namespace convblocks {

class Memory {
 public:
  // Of the map of a call, for as long as this lives.
  explicit Memory(const Tensor& x, Tensor kept = {});
  ~Memory();
  Memory(const Memory&) = delete;

  const Tensor& kept() const { return kept_; }

  // Where a kernel with the map x writes or reads so many numbers, in the precision of its sums; null where no memory of x
  // is open, or the device's kernels know of none.
  static void* keep(const Tensor& x, const KernelSlot& remembering, int64_t size);
  static const void* kept(const Tensor& x, const KernelSlot& remembering, int64_t size);

 private:
  static Memory* of(const Tensor& x, const KernelSlot& remembering);
  const Tensor& x_;
  Tensor kept_;
  Memory* const outer_;
};

}  // namespace convblocks
