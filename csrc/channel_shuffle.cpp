#include "channel_shuffle.h"

#include "op.h"
#include "shuffle_call.h"

namespace convblocks {

struct ChannelShuffle {
  static constexpr const char* name = "channel_shuffle";
  static constexpr const char* schema = "(Tensor x, SymInt groups) -> Tensor";
  static constexpr const char* backward_schema = "(Tensor grad, SymInt groups) -> Tensor";

  static void check(const Tensor& x, c10::SymInt groups) {
    check_feature_map(name, x);
    TORCH_CHECK_VALUE(groups > 0 && x.sym_size(1) % groups == 0, name, ": expected groups that divide the ",
                      x.sym_size(1), " channels, got ", groups);
  }

  static Tensor formula(const Tensor& x, c10::SymInt groups) {
    const Tensor shuffled = x.unflatten_symint(1, {groups, x.sym_size(1) / groups}).transpose(1, 2);
    return shuffled.clone(at::MemoryFormat::Contiguous).flatten(1, 2);  // never a view of x
  }
  static Tensor backward_formula(const Tensor& grad, c10::SymInt groups) {
    return formula(grad, grad.sym_size(1) / groups);
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, c10::SymInt groups) {
    call_shuffle(kernel, y, x, groups, false);
  }
  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, c10::SymInt groups) {
    run(kernel, grads[0], grad, grad.size(1) / groups.expect_int());
  }
};

CONVBLOCKS_REGISTER(ChannelShuffle)

}  // namespace convblocks
