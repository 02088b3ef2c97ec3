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

template <class A>
void forward(const Context& context, DenseConv2dArgs args) {
  const Convolution<A> whole(args);
  const int64_t panels = whole.panels(), pixels = whole.pixels(), size = whole.panel_size();
  const int64_t together = std::clamp<int64_t>(kPackedBytes / int64_t(size * sizeof(A)), 1, panels);
  // Threads share the pixels, and each packs all weights; or, of many weights, these.
  const bool even = whole.vectors() % (kPanel * context.threads) == 0 || panels >= 16 * context.threads;
  const bool many = panels > together && pixels <= 4096 && even;
  if (args.planes && (panels > together || whole.skips()))
    args.x = interleaved<A>(context, args.x, args.n, args.c, args.h * args.w);
  const auto run = [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    Convolution<A> part(args);
    const Scratch<A> packed(together * size + size / 2);
    for (; first < last; first += together) {
      const int64_t stop = std::min(last, first + together);
      part.pack(first, stop, packed.data());
      part.run(first, stop, packed.data(), begin, end);
    }
  };
  const bool small = pixels * whole.terms() * args.out_c < 100000;  // not worth waking a thread for
  constexpr int64_t kUnit = kGroup / 4;
  const int64_t units = (pixels + kUnit - 1) / kUnit;
  if (many) return parallel_for(context, panels, 1, [&](int64_t a, int64_t b) { run(a, b, 0, pixels); });
  parallel_for(context, units, small ? units : 1,
               [&](int64_t a, int64_t b) { run(0, panels, a * kUnit, std::min(pixels, b * kUnit)); });
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
