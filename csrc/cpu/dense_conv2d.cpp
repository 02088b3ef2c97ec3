// Dense convolution on the CPU: who computes what of it.
#include "convolution.h"
#include "dispatch.h"

namespace convblocks::cpu {
namespace {

// The channels of each pixel of planes side by side.
template <class A>
Map interleaved(const Context& context, const Map& x, int64_t n, int64_t c, int64_t hw) {
  A* const to = static_cast<A*>(context.workspace(context, n * c * hw * sizeof(A)));
  constexpr int64_t kRun = 8 * kLanes<A>;
  const int64_t runs = (hw + kRun - 1) / kRun;
  parallel_for(context, n * runs, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t sample = i / runs, pixel = i % runs * kRun;
      transpose_into(row<const A>(x, sample, 0, pixel), x.channel, c, std::min(kRun, hw - pixel),
                     to + (sample * hw + pixel) * c, c);
    }
  });
  return {to, c * hw, 1, c};
}

constexpr int64_t kShared = 2;  // vectors of output channels that a thread has at least

// Threads share the pixels, and each lays out all weights; or they share the output channels, where laying out takes longer
// than the more even cut of the pixels saves. A weight is laid out in about the time in which kPixels meet it.
inline bool share_channels(const Context& context, int64_t vectors, int64_t pixels) {
  constexpr int64_t kPixels = 16;
  const int64_t threads = context.threads, most = std::max(kShared, (vectors + threads - 1) / threads);
  return most * (kPixels + pixels) < vectors * kPixels + vectors * pixels / threads;
}

template <class A>
void forward(const Context& context, DenseConv2dArgs args) {
  const int64_t vectors = Convolution<A>::all_vectors(args);
  const Convolution<A> whole(args, 0, vectors);
  const int64_t panels = whole.panels(), pixels = whole.pixels(), size = whole.panel_size();
  const int64_t together = std::clamp<int64_t>(kPackedBytes / int64_t(size * sizeof(A)), 1, panels);
  const bool many = panels > together;
  if (args.planes && many) args.x = interleaved<A>(context, args.x, args.n, args.c, args.h * args.w);
  const auto run = [&](int64_t from, int64_t to, int64_t begin, int64_t end) {
    Convolution<A> part(args, from, to);
    const Scratch<A> packed(together * size + size / 2);
    for (int64_t first = 0; first < part.panels(); first += together) {
      const int64_t stop = std::min(part.panels(), first + together);
      part.pack(first, stop, packed.data());
      part.run(first, stop, packed.data(), begin, end);
    }
  };
  if (many && share_channels(context, vectors, pixels)) {
    return parallel_for(context, vectors, kShared, [&](int64_t from, int64_t to) { run(from, to, 0, pixels); });
  }
  const bool small = pixels * whole.terms() * args.out_c < 100000;  // not worth waking a thread for
  constexpr int64_t kUnit = kGroup / 4;
  const int64_t units = (pixels + kUnit - 1) / kUnit;
  parallel_for(context, units, small ? units : 1,
               [&](int64_t a, int64_t b) { run(0, vectors, a * kUnit, std::min(pixels, b * kUnit)); });
}

}  // namespace
}  // namespace convblocks::cpu

const bool convblocks_convolves = true;

const char* convblocks_dense_conv2d(const convblocks::Context& context, const convblocks::DenseConv2dArgs& args) {
  using namespace convblocks;
  if (args.after) return convblocks_scale_shift_act(context, *args.after);
  return cpu::dispatch(args.dtype, [&]<class T>(T) { cpu::forward<cpu::Acc<T>>(context, args); });
}
const char* convblocks_dense_conv2d_backward(const convblocks::Context& context,
                                             const convblocks::ScaleShiftActBackwardArgs& args) {
  return convblocks_scale_shift_act_backward(context, args);
}
