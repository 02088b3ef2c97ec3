#include "concat_shuffle.h"

#include <ATen/ops/cat.h>

#include "op.h"
#include "shuffle_call.h"

namespace convblocks {

struct ConcatShuffle {
  static constexpr const char* name = "concat_shuffle";
  static constexpr const char* schema = "(Tensor[] tensors, SymInt groups) -> Tensor";
  static constexpr const char* backward_schema = "(Tensor grad, SymInt[] channels, SymInt groups) -> Tensor[]";

  static void check_groups(const c10::SymInt& channels, const c10::SymInt& groups) {
    TORCH_CHECK_VALUE(groups > 0 && channels % groups == 0, name, ": expected groups that divide the ", channels,
                      " channels, got ", groups);
  }
  static void check(at::TensorList tensors, c10::SymInt groups) {
    TORCH_CHECK_VALUE(!tensors.empty(), name, ": expected at least one map, got an empty list");
    for (const Tensor& t : tensors) check_feature_map(name, t);
    const Tensor& x = tensors.front();
    c10::SymInt channels = 0;
    for (const Tensor& t : tensors) {
      TORCH_CHECK_TYPE(t.scalar_type() == x.scalar_type(), name, ": expected maps of dtype ", name_of(x.scalar_type()),
                       " like the first, got ", name_of(t.scalar_type()));
      TORCH_CHECK(t.device() == x.device(), name, ": expected maps on ", x.device(), " like the first, got ",
                  t.device());
      const bool same =
          t.sym_size(0) == x.sym_size(0) && t.sym_size(2) == x.sym_size(2) && t.sym_size(3) == x.sym_size(3);
      TORCH_CHECK_VALUE(same, name, ": expected maps of size [", x.sym_size(0), ", *, ", x.sym_size(2), ", ",
                        x.sym_size(3), "] like the first, got ", size_of(t));
      channels += t.sym_size(1);
    }
    check_groups(channels, groups);
  }
  static void check(const Tensor& grad, c10::SymIntArrayRef channels, c10::SymInt groups) {
    check_feature_map(name, grad);
    c10::SymInt sum = 0;
    bool sizes = true;
    for (const auto& c : channels) sizes = sizes && c >= 0, sum += c;
    TORCH_CHECK_VALUE(sizes && sum == grad.sym_size(1), name, ": expected channels that add up to the ",
                      grad.sym_size(1), " of the gradient, got ", channels);
    check_groups(sum, groups);
  }

  static std::vector<c10::SymInt> output_size(at::TensorList tensors, c10::SymInt) {
    std::vector<c10::SymInt> size = tensors.front().sym_sizes().vec();
    for (const Tensor& t : tensors.slice(1)) size[1] += t.sym_size(1);
    return size;
  }
  static Grads empty_grads(const Tensor& grad, c10::SymIntArrayRef channels, c10::SymInt) {
    Grads grads;
    std::vector<c10::SymInt> size = grad.sym_sizes().vec();
    for (const auto& c : channels) {
      size[1] = c;
      grads.push_back(empty_map(grad, size));
    }
    return grads;
  }

  static Tensor transposed(const Tensor& x, const c10::SymInt& rows, const c10::SymInt& columns) {
    const auto n = x.sym_size(0), h = x.sym_size(2), w = x.sym_size(3);
    const Tensor matrix = x.view_symint({n, rows, columns, h, w}).transpose(1, 2).clone(at::MemoryFormat::Contiguous);
    return matrix.view_symint({n, rows * columns, h, w});
  }
  static Tensor formula(at::TensorList tensors, c10::SymInt groups) {
    const Tensor cat = at::cat(tensors, 1);
    return transposed(cat, groups, cat.sym_size(1) / groups);
  }
  static Grads backward_formula(const Tensor& grad, c10::SymIntArrayRef channels, c10::SymInt groups) {
    Grads grads = transposed(grad, grad.sym_size(1) / groups, groups).split_with_sizes_symint(channels, 1);
    for (Tensor& t : grads) t = t.clone(at::MemoryFormat::Contiguous);  // never views
    return grads;
  }

  static void run(const Call& kernel, const Tensor& y, at::TensorList tensors, c10::SymInt groups) {
    call_shuffle(kernel, y, tensors, groups, false);
  }
  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, c10::SymIntArrayRef,
                           c10::SymInt groups) {
    call_shuffle(kernel, grad, grads, groups, true);
  }
};

CONVBLOCKS_REGISTER(ConcatShuffle)

// Batched gradients: torch's loop over the batch does not know how to stack a list.
TORCH_LIBRARY_IMPL(convblocks, Batched, m) { m.impl("concat_shuffle_backward", ConcatShuffle::backward_formula); }

}  // namespace convblocks
