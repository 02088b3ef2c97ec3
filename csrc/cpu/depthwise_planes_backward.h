// The gradients of a depthwise convolution of planes of float in NCHW with pixels in the lanes: of a few, for which channels
// in the lanes would leave most of them empty (what CBAM does to its two pooled planes), and, with AVX-512, of many.
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
  return planes_fit(s, x, grad) && planes_fit(reversed(s), grad, grad_x) && has_finite_weights(s, weight);
}

inline void convolve_reversed(const Context& context, const DepthwiseConv2dShape& s, const float* weight,
                              const Map& grad, const Map& grad_x) {
  float taps[kFewPlanes * 49];
  const int64_t k = s.kernel_h * s.kernel_w;
  for (int64_t i = 0; i < s.c; i++) std::reverse_copy(weight + i * k, weight + (i + 1) * k, taps + i * k);
  convolve_planes(context, reversed(s), taps, nullptr, Activation::none, grad, grad_x, nullptr);
}

// Adds up what the rows [begin, end) of a plane's gradient give its filter: a vector for each tap, and one for the gradient.
template <int STRIDE, int K>
inline void correlate_plane(const Planes<1, K>& x, const Planes<1, K>& grad, int64_t begin, int64_t end,
                            VecF (&acc)[K * K + 1]) {
  constexpr int kTogether = K == 3 ? K : 1;  // rows of taps, whose sums are in registers
  for (int i = 0; i < K; i += kTogether) {
    VecF sums[kTogether * K], total{};
    for (int t = 0; t < kTogether * K; t++) sums[t] = acc[i * K + t];
    for (int64_t column = 0; column < grad.w; column += kLanes<float>) {
      const bool whole = column + kLanes<float> <= grad.w;
      const Mask mask = Planes<1, K>::lanes(0, grad.w - column, kLanes<float>);
      typename Planes<1, K>::Masks inside;
      x.template masks<STRIDE>(column * STRIDE - x.left, inside);
      VecF met[K];
      const auto meets = [&](int64_t in_row) CONVBLOCKS_LOOP {
        if (static_cast<uint64_t>(in_row) >= static_cast<uint64_t>(x.h)) return false;
        x.template met<STRIDE, false>(in_row, column * STRIDE - x.left, inside, met);
        if (whole) return true;
        CONVBLOCKS_UNROLL
        for (int j = 0; j < K; j++) met[j] = Planes<1, K>::select(met[j], mask);
        return true;
      };
      const auto add = [&](int k, VecF g) CONVBLOCKS_LOOP {
        CONVBLOCKS_UNROLL
        for (int j = 0; j < K; j++) sums[k * K + j] += met[j] * g;
      };
      const auto at = [&](int64_t row) CONVBLOCKS_LOOP { return grad.load(row * grad.w + column, mask); };
      if constexpr (K == 3 && STRIDE == 2) {  // the last tap of a row meets what the first one of the next does
        VecF g = at(begin);
        if (meets(begin * 2 - x.top)) add(0, g);
        for (int64_t row = begin; row < end; row++) {
          total += g;
          if (meets(row * 2 - x.top + 1)) add(1, g);
          const bool last = row + 1 == end;
          const VecF next = last ? VecF{} : at(row + 1);
          if (meets(row * 2 - x.top + 2)) {
            add(2, g);
            if (!last) add(0, next);
          }
          g = next;
        }
        continue;
      }
      for (int64_t row = begin; row < end; row++) {
        const VecF g = at(row);
        total += g;
        CONVBLOCKS_UNROLL
        for (int k = 0; k < kTogether; k++) {
          if (meets(row * STRIDE - x.top + i + k)) add(k, g);
        }
      }
    }
    for (int t = 0; t < kTogether * K; t++) acc[i * K + t] = sums[t];
    if (i == 0) acc[K * K] += total;
  }
}

// The sums of the lanes of each, `stride` apart.
template <int COUNT>
inline void store_sums(const VecF (&acc)[COUNT], float* to, int64_t stride) {
  constexpr int L = kLanes<float>;
  for (int first = 0; first < COUNT; first += L) {
    VecF some[L]{};
    for (int t = first; t < std::min(COUNT, first + L); t++) some[t - first] = acc[t];
    const VecF sums = sum_each(some);
    for (int t = first; t < std::min(COUNT, first + L); t++) to[t * stride] = sums[t - first];
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
        VecF acc[K * K + 1]{};
        correlate_plane<1>(map, by, first, stop, acc);
        store_sums(acc, sums + piece * kBlock + c, L);
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

// --- of many planes, one by one --------------------------------------------------------------------------------------

#if defined(__AVX512F__)
// Where it was measured to be faster; of larger planes a core's caches do not hold the three that it works on.
inline bool each_plane_fits(const DepthwiseConv2dShape& s, const float* weight, const Map& grad, const Map& x,
                            const Map& grad_x) {
  const int64_t k = s.kernel_h;
  const bool fits = s.w > 8 && (k == 3 || (k == 5 && s.out_w > 8)) && s.h * s.w <= 1 << 16;
  if (!fits || s.multiplier != 1 || s.c < kLanes<float> || !planes_fit(s, x, grad)) return false;
  return grad_x.pixel == 1 && has_finite_weights(s, weight);
}

// The gradient of a plane of the map for stride 2: `ODD` says whether the left padding is. Its even and its odd columns
// meet different taps. A row of the gradient that came is read once, for the K rows that it reaches; two of them are done
// then.
template <int ODD, int K>
inline void spread_plane(const Planes<1, K>& grad, const float* weight, int64_t h, int64_t w, int64_t top, int64_t left,
                         float* to, Ahead* ahead) {
  constexpr int L = kLanes<float>;
  VecF tap[K * K];
  for (int t = 0; t < K * K; t++) tap[t] = splat<VecF>(weight[t]);
  if (ahead) ahead->start((w + 2 * L - 1) / (2 * L) * ((h + top + 1) / 2));
  for (int64_t column = 0; 2 * column < w; column += L) {
    constexpr auto side = [](int j) { return (j + ODD) & 1; };  // 1: odd columns
    int64_t at[K];
    Mask inside[K];
    CONVBLOCKS_UNROLL
    for (int j = 0; j < K; j++) {
      at[j] = column + (side(j) + left - j) / 2;
      inside[j] = Planes<1, K>::lanes(-at[j], grad.w - at[j], L);
    }
    const auto finish = [=](int64_t row, VecF even, VecF odd) CONVBLOCKS_LOOP {
      if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(h)) return;
      const auto put = [&]<int kHalf, int... l>(std::integer_sequence<int, l...>, std::integral_constant<int, kHalf>)
                           CONVBLOCKS_LOOP {
                             const VecF v = __builtin_shufflevector(even, odd, (kHalf * L / 2 + l / 2 + l % 2 * L)...);
                             float* const out = to + row * w + 2 * column + kHalf * L;
                             const int64_t count = w - 2 * column - kHalf * L;
                             if (count >= L)
                               store(out, v);
                             else if (count > 0)
                               store(out, v, static_cast<int>(count));
                           };
      constexpr std::make_integer_sequence<int, L> all{};
      put(all, std::integral_constant<int, 0>{});
      put(all, std::integral_constant<int, 1>{});
    };
    VecF sums[K + 2][2]{};  // of the even and the odd columns of rows 2 * g - top and after it
    for (int64_t g = 0; 2 * g - top < h; g++) {
      if (ahead) ahead->step();
      if (g < grad.h) {
        CONVBLOCKS_UNROLL
        for (int j = 0; j < K; j++) {
          const VecF v = grad.load(g * grad.w + at[j], inside[j]);
          CONVBLOCKS_UNROLL
          for (int i = 0; i < K; i++) sums[i][side(j)] += v * tap[i * K + j];
        }
      }
      for (int i = 0; i < 2; i++) finish(2 * g - top + i, sums[i][0], sums[i][1]);
      CONVBLOCKS_UNROLL
      for (int i = 0; i < K; i++) sums[i][0] = sums[i + 2][0], sums[i][1] = sums[i + 2][1];
    }
  }
}

// The gradients of all planes: of the map, and those of the filters and the biases as sums of pieces of `samples` samples.
template <int K, int STRIDE>
void planes_backward(const Context& context, const DepthwiseConv2dShape& s, const float* weight, const float* bias,
                     Activation activation, const Map& grad, const Map& x, const Map& grad_x, int64_t samples,
                     float* sums) {
  constexpr int64_t L = kLanes<float>, kBlock = (K * K + 1) * L;
  const int64_t pieces = (s.n + samples - 1) / samples, blocks = (s.c + L - 1) / L, pixels = s.out_h * s.out_w;
  const bool active = activation != Activation::none;
  const bool fetch = leaves_second_caches(s.n * s.c * (2 * s.h * s.w + pixels) * sizeof(float), context.threads);
  const int64_t bands = std::clamp<int64_t>(pixels / kPlanePiece, 1, s.out_h);
  const int64_t grain = std::max<int64_t>(1, 4096 / (pixels * samples));
  parallel_for(context, pieces * s.c, grain, [&](int64_t begin, int64_t end) {
    const Scratch<float> scratch(2 * pixels);
    Planes<1, K> map, by, back;  // the map, its gradient that came, and the convolution of that
    map.h = s.h, map.w = s.w, map.out_h = s.out_h, map.out_w = s.out_w, map.top = s.top, map.left = s.left;
    map.sums[0] = back.sums[0] = nullptr;
    map.out[0] = scratch.data();
    by.h = s.out_h, by.w = s.out_w;
    back.h = s.out_h, back.w = s.out_w, back.out_h = s.h, back.out_w = s.w;
    back.top = K - 1 - s.top, back.left = K - 1 - s.left, back.bias[0] = 0;
    Ahead ahead;
    if (fetch) back.ahead = &ahead;
    float reversed[K * K];
    back.weight[0] = reversed;
    for (int64_t i = begin; i < end; i++) {
      const int64_t piece = i / s.c, c = i % s.c;
      map.weight[0] = weight + c * K * K;
      map.bias[0] = bias ? bias[c] : 0;
      std::reverse_copy(map.weight[0], map.weight[0] + K * K, reversed);
      VecF acc[K * K + 1]{};
      for (int64_t n = piece * samples; n < std::min(s.n, (piece + 1) * samples); n++) {
        map.in[0] = static_cast<const float*>(x.data) + n * x.batch + c * x.channel;
        by.in[0] = static_cast<const float*>(grad.data) + n * grad.batch + c * grad.channel;
        float* const to = static_cast<float*>(grad_x.data) + n * grad_x.batch + c * grad_x.channel;
        const float* const next = by.in[0] + grad.channel;
        if (active) {
          map.template convolve<STRIDE>();
          for_lanes<float>(
              pixels, [=, inner = map.out[0], from = by.in[0], into = scratch.data() + pixels](int64_t p, auto lanes) {
                store(into + p, activation_backward(load(from + p, lanes), load(inner + p, lanes), activation), lanes);
              });
          by.in[0] = scratch.data() + pixels;
        }
        if (bands == 1) correlate_plane<STRIDE>(map, by, 0, s.out_h, acc);
        for (int64_t band = 0; bands > 1 && band < bands; band++) {
          VecF some[K * K + 1]{};
          correlate_plane<STRIDE>(map, by, s.out_h * band / bands, s.out_h * (band + 1) / bands, some);
          for (int t = 0; t <= K * K; t++) acc[t] += some[t];
        }
        if (fetch) {
          ahead.clear();
          ahead.add(map.in[0] + x.channel, s.h * s.w);
          ahead.add(next, pixels);
          ahead.add(to + grad_x.channel, s.h * s.w);
        }
        if constexpr (STRIDE == 1) {
          back.in[0] = by.in[0];
          back.out[0] = to;
          back.template convolve<1>();
        } else {
          (s.left % 2 ? spread_plane<1, K> : spread_plane<0, K>)(by, map.weight[0], s.h, s.w, s.top, s.left, to,
                                                                 back.ahead);
        }
      }
      store_sums(acc, sums + (piece * blocks + c / L) * kBlock + c % L, L);
    }
  });
}

inline void planes_backward(const Context& context, const DepthwiseConv2dShape& s, const float* weight,
                            const float* bias, Activation activation, const Map& grad, const Map& x, const Map& grad_x,
                            int64_t samples, float* sums) {
  const auto run = [&]<int K>(std::integral_constant<int, K>) {
    (s.stride_h == 1 ? planes_backward<K, 1> : planes_backward<K, 2>)(context, s, weight, bias, activation, grad, x,
                                                                      grad_x, samples, sums);
  };
  s.kernel_h == 3 ? run(std::integral_constant<int, 3>{}) : run(std::integral_constant<int, 5>{});
}
#else
inline bool each_plane_fits(const DepthwiseConv2dShape&, const float*, const Map&, const Map&, const Map&) {
  return false;
}
inline void planes_backward(const Context&, const DepthwiseConv2dShape&, const float*, const float*, Activation,
                            const Map&, const Map&, const Map&, int64_t, float*) {}
#endif
#endif

}  // namespace convblocks::cpu
