// The gradients of a depthwise convolution of a few planes of float in NCHW with pixels in the lanes, for which channels in
// the lanes would leave most of them empty: what CBAM does to its two pooled planes.
#pragma once
#include "depthwise_planes.h"

namespace convblocks::cpu {

#if defined(__AVX2__)
constexpr int64_t kFewPlanes = kLanes<float> / 4;
// Pixels, or those of a longer row, whose products are summed before they are added to others.
constexpr int64_t kPlanePiece = 2048;

// The convolution of the gradient by the reversed filter that gives the gradient of the map.
inline DepthwiseConv2dShape reversed(DepthwiseConv2dShape s) {
  std::swap(s.h, s.out_h);
  std::swap(s.w, s.out_w);
  s.top = s.kernel_h - 1 - s.top;
  s.left = s.kernel_w - 1 - s.left;
  return s;
}

inline bool few_planes_fit(const DepthwiseConv2dShape& s, const float* weight, const Map& grad, const Map& x,
                           const Map& grad_x) {
  if (s.stride_h != 1 || s.multiplier != 1 || s.c > kFewPlanes) return false;
  if (!planes_fit(s, x, grad) || !planes_fit(reversed(s), grad, grad_x)) return false;
  for (int64_t i = 0; i < s.c * s.kernel_h * s.kernel_w; i++) {
    if (!std::isfinite(weight[i])) return false;  // times the zeros around the gradient, it would be seen
  }
  return true;
}

inline void convolve_reversed(const Context& context, const DepthwiseConv2dShape& s, const float* weight,
                              const Map& grad, const Map& grad_x) {
  float taps[kFewPlanes * 49];
  const int64_t k = s.kernel_h * s.kernel_w;
  for (int64_t i = 0; i < s.c; i++) std::reverse_copy(weight + i * k, weight + (i + 1) * k, taps + i * k);
  convolve_planes(context, reversed(s), taps, nullptr, Activation::none, grad, grad_x, nullptr);
}

// The sums of products for row `tap_row` of a plane's filter, of the rows [begin, end) of its gradient.
template <int K>
inline void correlate_plane(const Planes<1, K>& x, const Planes<1, K>& grad, int64_t begin, int64_t end,
                            int64_t tap_row, VecF (&acc)[K]) {
  const int64_t above = tap_row - x.top;
  begin = std::max(begin, -above);
  end = std::min(end, x.h - above);
  for (int64_t column = 0; column < grad.w; column += kLanes<float>) {
    const bool whole = column + kLanes<float> <= grad.w;
    const Mask mask = Planes<1, K>::lanes(0, grad.w - column, kLanes<float>);
    for (int64_t row = begin; row < end; row++) {
      const VecF g = grad.load(row * grad.w + column, mask);
      VecF met[K];
      x.template met<1, false>(row + above, column - x.left, met);
      CONVBLOCKS_UNROLL
      for (int j = 0; j < K; j++) acc[j] += (whole ? met[j] : Planes<1, K>::select(met[j], mask)) * g;
    }
  }
}

// The gradients of the filters and the biases, as sums of `cut` pieces of each sample: of each tap, and of the gradient
// itself, a vector with the planes in its lanes.
template <int K>
void correlate_planes(const Context& context, const DepthwiseConv2dShape& s, const Map& grad, const Map& x, int64_t cut,
                      float* sums) {
  constexpr int64_t L = kLanes<float>, kBlock = (K * K + 1) * L;
  parallel_for(context, s.n * cut, 1, [&](int64_t begin, int64_t end) {
    Planes<1, K> map, by;
    map.h = s.h, map.w = s.w, map.top = s.top, map.left = s.left;
    by.h = s.out_h, by.w = s.out_w;
    std::fill_n(sums + begin * kBlock, (end - begin) * kBlock, 0.0f);
    for (int64_t piece = begin; piece < end; piece++) {
      const int64_t sample = piece / cut, band = piece % cut;
      const int64_t first = s.out_h * band / cut, stop = s.out_h * (band + 1) / cut;
      for (int64_t c = 0; c < s.c; c++) {
        map.in[0] = static_cast<const float*>(x.data) + sample * x.batch + c * x.channel;
        by.in[0] = static_cast<const float*>(grad.data) + sample * grad.batch + c * grad.channel;
        float* const own = sums + piece * kBlock + c;
        for (int64_t i = 0; i < K; i++) {
          VecF acc[K]{};
          correlate_plane(map, by, first, stop, i, acc);
          for (int64_t j = 0; j < K; j++) own[(i * K + j) * L] = sum_lanes(acc[j]);
        }
        VecF total{};
        for_lanes<float>((stop - first) * s.out_w, [&, from = by.in[0] + first * s.out_w](int64_t p, auto lanes) {
          total += load(from + p, lanes);
        });
        own[K * K * L] = sum_lanes(total);
      }
    }
  });
}

inline void correlate_planes(const Context& context, const DepthwiseConv2dShape& s, const Map& grad, const Map& x,
                             int64_t cut, float* sums) {
  if (s.kernel_h == 3) return correlate_planes<3>(context, s, grad, x, cut, sums);
  if (s.kernel_h == 5) return correlate_planes<5>(context, s, grad, x, cut, sums);
  correlate_planes<7>(context, s, grad, x, cut, sums);
}
#endif

}  // namespace convblocks::cpu
