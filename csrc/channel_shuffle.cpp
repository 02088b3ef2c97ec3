#include "channel_shuffle.h"

#include "op.h"

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
    const auto format = walk_format(x);
    kernel(ChannelShuffleArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), groups.expect_int(),
                              Walk(x, format).map, Walk(y, format).map});
  }
  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, c10::SymInt groups) {
    run(kernel, grads[0], grad, grad.size(1) / groups.expect_int());
  }
};

CONVBLOCKS_REGISTER(ChannelShuffle)

}  // namespace convblocks
