// The depthwise convolution of planes of halves in NCHW: a band of rows at a time is widened, convolved as a plane of
// floats is, and narrowed; in memory that stays in the first cache where rows are short enough.
#pragma once
#include "depthwise_planes.h"
#include "depthwise_side.h"

namespace convblocks::cpu {

#if defined(__AVX2__)
inline bool halves_fit(const DepthwiseConv2dShape& s, const Map& x, const Map& y) {
  const bool wide = s.kernel_h == 3 ? s.out_w > 12 || s.stride_h == 2 : s.kernel_h == 5 && s.out_w > 16;
  return wide && planes_fit(s, x, y);  // else measured to be slower
}

template <class T>
__attribute__((noinline)) void widen_row(const T* from, float* to, int64_t pixels) {
  for_lanes<T>(pixels, [=](int64_t p, auto lanes) CONVBLOCKS_LOOP { store(to + p, load(from + p, lanes), lanes); });
}

template <class T, int P, int K>
void convolve_halves(const Context& context, const DepthwiseConv2dShape& s, const float* weight, const float* bias,
                     Activation activation, const Map& x, const Map& y, float* sums) {
  constexpr int kRows = Planes<P, K>::kRows;
  const Side rows{s.h, s.out_h, K, s.stride_h, 1, s.top};
  const int64_t planes = s.c * s.multiplier, groups = (planes + P - 1) / P;
  const int64_t band =
      std::min(s.out_h, std::max<int64_t>(1, kNearPixels / (P * (s.w * s.stride_h + s.out_w) * kRows)) * kRows);
  const int64_t in_size = std::min(s.h, (band - 1) * s.stride_h + K) * s.w, out_size = band * s.out_w;
  const int64_t grain = std::max<int64_t>(1, 4096 / (s.out_h * s.out_w * P));
  const bool far = kBytes == 64 && exceeds_caches(s.n * s.c * s.h * s.w * sizeof(T));
  parallel_for(context, s.n * groups, grain, [&](int64_t begin, int64_t end) {
    const Scratch<float> scratch(P * (in_size + out_size));
    Planes<P, K> group;
    group.w = s.w, group.out_w = s.out_w, group.left = s.left;
    // With sums, what is summed are the results; else they are activated on their way.
    if (sums) (P == 1 && takes_call(activation) ? group.later : group.activation) = activation;
    for (int64_t i = begin; i < end; i++) {
      const int64_t sample = i / groups;
      int64_t plane[P];
      float sum[P]{}, band_sum[P];
      for (int p = 0; p < P; p++) plane[p] = std::min(i % groups * P + p, planes - 1);  // an odd last one twice
      for (int64_t first = 0; first < s.out_h; first += band) {
        const int64_t stop = std::min(s.out_h, first + band);
        const auto [in_first, in_stop] = rows.met_by(first, stop);
        group.h = in_stop - in_first, group.out_h = stop - first;
        group.top = s.top + in_first - first * s.stride_h;
        CONVBLOCKS_UNROLL
        for (int p = 0; p < P; p++) {
          const T* from = static_cast<const T*>(x.data) + sample * x.batch + plane[p] / s.multiplier * x.channel;
          float* const widened = scratch.data() + p * (in_size + out_size);
          widen_row(from + in_first * s.w, widened, group.h * s.w);
          group.in[p] = widened, group.out[p] = widened + in_size;
          group.weight[p] = weight + plane[p] * K * K;
          group.bias[p] = bias ? bias[plane[p]] : 0;
          group.sums[p] = sums ? &band_sum[p] : nullptr;
        }
        s.stride_w == 1 ? group.template convolve<1>() : group.template convolve<2>();
        CONVBLOCKS_UNROLL
        for (int p = 0; p < P; p++) {
          T* to = static_cast<T*>(y.data) + sample * y.batch + plane[p] * y.channel + first * s.out_w;
          write_plane(group.out[p], to, group.out_h * s.out_w, sums ? Activation::none : activation, far);
          if (sums) sum[p] += band_sum[p];
        }
      }
      if (!sums) continue;
      for (int p = 0; p < P; p++) sums[sample * planes + plane[p]] = sum[p];
    }
    finish_stores();
  });
}

template <class T>
void convolve_halves(const Context& context, const DepthwiseConv2dShape& s, const float* weight, const float* bias,
                     Activation activation, const Map& x, const Map& y, float* sums) {
  with_planes(s, [&]<int P, int K>(std::integral_constant<int, P>, std::integral_constant<int, K>) {
    convolve_halves<T, P, K>(context, s, weight, bias, activation, x, y, sums);
  });
}
#else
inline bool halves_fit(const DepthwiseConv2dShape&, const Map&, const Map&) { return false; }
template <class T>
void convolve_halves(const Context&, const DepthwiseConv2dShape&, const float*, const float*, Activation, const Map&,
                     const Map&, float*) {}
#endif

}  // namespace convblocks::cpu
