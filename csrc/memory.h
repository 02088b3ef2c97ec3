// What the kernel of an operation computes and that of its backward would compute again. Autograd's node opens a Memory
// around its calls of the two, which go through the dispatcher. Who runs there in place of the kernel neither fills it nor
// reads it; a backward that is given an unfilled one, or none, computes all of it.
#pragma once
#include "call.h"

namespace convblocks {

class Memory {
 public:
  // For as long as this lives, the memory of the call with the map x. `size` numbers in the precision of the kernel's sums,
  // and one that says whether they are there: saved whether they are or not, so that a second run of the forward saves
  // as many tensors as the first, though there is a mode, under which none is filled, around one of them. 0: none.
  Memory(const Tensor& x, int64_t size);
  Memory(const Tensor& x, Tensor kept);
  ~Memory();
  Memory(const Memory&) = delete;

  const Tensor& kept() const { return kept_; }

  // Where the kernel of a call with the map x writes the numbers, or null; where that of the backward finds them, or null.
  static void* keep(const Tensor& x, int64_t size);
  static const void* kept(const Tensor& x, int64_t size);

 private:
  enum class Opened { by_forward, by_backward };
  Memory(const Tensor& x, Tensor kept, Opened opened);
  static Memory* of(const Tensor& x, Opened opened);

  const Tensor& x_;
  Tensor kept_;
  const Opened opened_;
  Memory* const outer_;
};

}  // namespace convblocks
