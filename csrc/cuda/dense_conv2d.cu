// Dense convolution: the convolution is torch's, what follows it is scale_shift_act.
#include "../dense_conv2d.h"

const char* convblocks_dense_conv2d(const convblocks::Context& context, const convblocks::DenseConv2dArgs& args) {
  return convblocks_scale_shift_act(context, *args.after);
}
const char* convblocks_dense_conv2d_backward(const convblocks::Context& context,
                                             const convblocks::ScaleShiftActBackwardArgs& args) {
  return convblocks_scale_shift_act_backward(context, args);
}
