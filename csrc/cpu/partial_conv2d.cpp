// Partial convolution on the CPU: the convolution is dense_conv2d's, or torch's, and the rest is that of concat_shuffle.
#include "../partial_conv2d.h"

#include <algorithm>

namespace {

using namespace convblocks;

void skip_samples(Map& map, int64_t count, size_t size) {
  if (map.data) map.data = static_cast<char*>(map.data) + count * map.batch * static_cast<int64_t>(size);
}

}  // namespace

// In channels_last samples are convolved and passed on a few at a time, while they are in the caches: both touch the same
// lines of memory.
const char* convblocks_partial_conv2d(const Context& context, const PartialConv2dArgs& args) {
  if (!args.first) return convblocks_concat_shuffle(context, args.pieces);
  DenseConv2dArgs conv = *args.first;
  ShuffleArgs rest = args.pieces;
  if (!rest.count) return convblocks_dense_conv2d(context, conv);
  ShufflePart part = rest.parts[0];
  rest.parts = &part;
  const size_t size = rest.dtype == Dtype::f64 ? 8 : 4;
  const auto bytes = [size](int64_t count) { return count * static_cast<int64_t>(size); };
  const int64_t weights = bytes(conv.c * conv.out_c * conv.kernel_h * conv.kernel_w);  // laid out anew each time
  const int64_t some = std::max<int64_t>(1 << 20, 16 * weights) / bytes((conv.c + rest.c) * rest.hw),
                together = conv.planes ? rest.n : std::max<int64_t>(1, some);
  for (int64_t left = rest.n; left > 0; left -= together) {
    conv.n = rest.n = std::min(left, together);
    const char* error = convblocks_dense_conv2d(context, conv);
    if (!error) error = convblocks_concat_shuffle(context, rest);
    if (error) return error;
    for (Map* map : {&conv.x, &conv.y, &rest.whole, &part.map}) skip_samples(*map, together, size);
  }
  return nullptr;
}
const char* convblocks_partial_conv2d_backward(const Context& context, const ShuffleArgs& args) {
  return convblocks_concat_shuffle(context, args);
}
