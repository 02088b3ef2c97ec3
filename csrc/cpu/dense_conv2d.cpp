// Dense convolution on the CPU: a product of matrices whose rows are pixels and whose columns are output channels. Weights
// are laid out anew at each call, a few panels of columns at a time, so that a panel is used while it is in the second
// cache; the scale is multiplied into it on the way. In channels_last the input is read where it is, or of few channels
// from a padded copy of a few lines; planes are exchanged with channels in that copy, and in one of the output.
#include "../dense_conv2d.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "gate.h"
#include "lanes.h"

namespace convblocks::cpu {
namespace {

// The pixels of a group are taken V vectors of output channels at a time, kGroup / V of them: what the registers hold.
#if defined(__AVX512F__)
constexpr int kGroup = 24;
#else
constexpr int kGroup = 12;
#endif

// Of weights and of input that are used together, and of weights that are in the first cache with all else.
constexpr int64_t kPackedBytes = 384 << 10, kPixelBytes = 128 << 10, kNearBytes = 16 << 10;
// Sums of more terms are built from sums of so many, which lose less to rounding.
constexpr int64_t kTerms = 512;

// to[column][row] = from[row][column]; so many elements from one row to the next.
template <class A>
void transpose_into(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to, int64_t to_stride) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < rows; i += L) {
    const int height = static_cast<int>(std::min<int64_t>(L, rows - i));
    for_lanes<A>(columns, [=](int64_t j, auto lanes) CONVBLOCKS_LOOP {
      const int64_t width = std::min<int64_t>(L, columns - j);
      Vec<A> v[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; l++) v[l] = l < height ? load(from + (i + l) * from_stride + j, lanes) : Vec<A>{};
      transpose<A>(v);
      A* const at = to + j * to_stride + i;
      for (int64_t l = 0; l < width; l++) {
        if (height == L)
          store(at + l * to_stride, v[l]);
        else
          store(at + l * to_stride, v[l], height);
      }
    });
  }
}

template <class A>
class Convolution {
 public:
  static constexpr int L = kLanes<A>;

  explicit Convolution(const DenseConv2dArgs& args) : a(args) {
    // Of few channels, the taps of a row are one run of memory, in a padded copy: it costs less to begin few runs.
    exchanges_ = a.planes && a.x.channel != 1;
    gathers_ = exchanges_ || (a.kernel_w > 1 && a.c < 64 && a.dilation_w == 1 && !skips());
    runs_ = gathers_ ? a.kernel_h : a.kernel_h * a.kernel_w;
    length_ = gathers_ ? a.kernel_w * a.c : a.c;
    width_ = (a.out_w - 1) * a.stride_w + a.kernel_w;
  }

  // Whether there is input that no tap meets, which a copy of lines need not have.
  bool skips() const { return a.stride_h > a.kernel_h * a.dilation_h || a.stride_w > a.kernel_w; }

  // The output channels are cut into panels of two vectors; the last has three, or one if that is all.
  int64_t vectors() const { return (a.out_c + L - 1) / L; }
  int64_t panels() const { return std::max<int64_t>(1, vectors() / 2); }
  int64_t pixels() const { return a.n * a.out_h * a.out_w; }
  int64_t panel_size() const { return runs_ * length_ * 2 * L; }  // but for the last

  // Panels [first, last) of the weights, each (runs, length, vectors, L).
  void pack(int64_t first, int64_t last, A* to) {
    Vec<A> zeros{};
    const int64_t taps = a.kernel_h * a.kernel_w, k = runs_ * length_;
    const bool in_place = taps == 1 || a.weight_channels_last;
    const A *const weight = static_cast<const A*>(a.weight), *const scale = static_cast<const A*>(a.scale);
    for (int64_t vector = 2 * first; vector < 2 * last - 2 + width(last - 1); vector++) {
      const int64_t o = vector * L, number = std::min(vector / 2, panels() - 1), stride = width(number) * L;
      A* const panel = to + (number - first) * panel_size() + (vector - 2 * number) * L;
      const int count = static_cast<int>(std::min<int64_t>(L, a.out_c - o));
      const Vec<A> factor = scale ? load(scale + o, count) : splat<Vec<A>>(1);
      int64_t channel = 0, tap = 0;
      for (int64_t i = 0; i < k; i += L) {
        const int rows = static_cast<int>(std::min<int64_t>(L, k - i));
        Vec<A> v[L];
#pragma GCC unroll 24
        for (int l = 0; l < L; l++) {
          const A* from = weight + (o + l) * k + i;
          v[l] = l >= count ? Vec<A>{} : rows == L ? load(from) : load(from, rows);
        }
        transpose<A>(v);
        for (int l = 0; l < rows; l++) {
          v[l] *= factor;
          zeros += v[l] * 0;
          store(panel + (in_place ? i + l : tap * a.c + channel) * stride, v[l]);
          if (++tap == taps) tap = 0, channel++;
        }
      }
    }
    is_finite_ = sum_lanes(zeros) == 0;
  }

  // Pixels [begin, end) of the output channels of panels [first, last).
  void run(int64_t first, int64_t last, const A* packed, int64_t begin, int64_t end) {
    const int64_t bytes = a.c * sizeof(A) * (gathers_ ? a.stride_h * a.stride_w : 1);
    const int64_t most = std::clamp<int64_t>(kPixelBytes / bytes / kGroup, 2, gathers_ ? 64 : 16) * kGroup;
    const int64_t hw = a.out_h * a.out_w;
    zeros_.resize(length_);
    runs_of_.resize(most * runs_);
    outputs_.resize(most);
    if (runs_ * length_ > kTerms) sums_ = std::make_unique_for_overwrite<A[]>(most * 3 * L);
    const int64_t channel = 2 * first * L, channels = std::min(a.out_c, (2 * last - 2 + width(last - 1)) * L) - channel;
    if (a.planes) exchanged_ = std::make_unique_for_overwrite<A[]>(most * vectors() * L);
    for (int64_t at = begin, stop; at < end; at = stop) {
      stop = std::min({end, at + most, (at / hw + 1) * hw});
      const int64_t sample = at / hw, pixel = at % hw, row_size = vectors() * L;
      locate(sample, pixel, stop - at);
      if (a.planes && a.residual.data) {
        transpose_into(row<const A>(a.residual, sample, channel, pixel), a.residual.channel, channels, stop - at,
                       exchanged_.get() + channel, row_size);
      }
      const auto group = [&](int64_t panel, int64_t term, int64_t p) {
        const int count = static_cast<int>(std::min<int64_t>(kGroup, stop - at - p));
        columns(panel, packed + (panel - first) * panel_size(), term, p, count);
      };
      if ((last - first) * panel_size() * int64_t(sizeof(A)) <= kNearBytes) {
        for (int64_t p = 0; p < stop - at; p += kGroup) {
          for (int64_t i = first; i < last; i++) group(i, 0, p);
        }
      } else {
        for (int64_t i = first; i < last; i++) {
          for (int64_t term = 0; term < runs_ * length_; term += kTerms) {
            for (int64_t p = 0; p < stop - at; p += kGroup) group(i, term, p);
          }
        }
      }
      if (a.planes) {
        transpose_into<A>(exchanged_.get() + channel, row_size, stop - at, channels,
                          row<A>(a.y, sample, channel, pixel), a.y.channel);
      }
    }
  }

 private:
  struct Output {
    A* y;
    const A* residual;
  };

  int64_t width(int64_t panel) const { return panel + 1 == panels() ? vectors() - 2 * panel : 2; }

  // Where `count` pixels of a sample of the output are, and where the runs that they are made of begin. Those of a group
  // lie side by side; the last stands in for those that are missing.
  void locate(int64_t sample, int64_t first, int64_t count) {
    A* const y = a.planes ? exchanged_.get() : row<A>(a.y, sample, 0, first);
    const A* const residual = !a.residual.data ? nullptr : a.planes ? y : row<const A>(a.residual, sample, 0, first);
    const int64_t y_step = a.planes ? vectors() * L : a.y.pixel, step = a.planes ? y_step : a.residual.pixel;
    for (int64_t p = 0; p < count; p++) outputs_[p] = {y + p * y_step, residual ? residual + p * step : nullptr};
    const int64_t line = first / a.out_w, column = first % a.out_w;
    const bool as_they_are = !gathers_ && a.kernel_h * a.kernel_w == 1 && a.top == 0 && a.left == 0 &&
                             a.stride_h == 1 && a.stride_w == 1 && a.out_h == a.h && a.out_w == a.w;
    if (as_they_are) {
      const A* const x = row<const A>(a.x, sample, 0, first);
      for (int64_t p = 0; p < count; p++) runs_of_[p] = x + p * a.x.pixel;
    } else if (gathers_) {
      gather(sample, line, (first + count - 1) / a.out_w);
      each_pixel(line, column, count, [this, line](int64_t h, int64_t w, const A** to) {
        const A* from = gathered_.get() + ((h - line) * a.stride_h * width_ + w * a.stride_w) * a.c;
        for (int64_t i = 0; i < runs_; i++) to[i * kGroup] = from + i * a.dilation_h * width_ * a.c;
      });
    } else {
      const A* const map = row<const A>(a.x, sample, 0);
      each_pixel(line, column, count, [this, map](int64_t line, int64_t column, const A** to) {
        for (int64_t i = 0; i < a.kernel_h; i++) {
          const int64_t h = line * a.stride_h - a.top + i * a.dilation_h;
          for (int64_t j = 0; j < a.kernel_w; j++, to += kGroup) {
            const int64_t w = column * a.stride_w - a.left + j * a.dilation_w;
            const bool inside = h >= 0 && h < a.h && w >= 0 && w < a.w;
            *to = inside ? map + (h * a.w + w) * a.x.pixel : zeros_.data();
          }
        }
      });
    }
    for (int64_t p = count; p % kGroup; p++) {
      const A** const to = &runs_of_[p / kGroup * kGroup * runs_ + p % kGroup];
      for (int64_t i = 0; i < runs_; i++) to[i * kGroup] = to[i * kGroup - 1];
    }
  }

  template <class F>
  void each_pixel(int64_t line, int64_t column, int64_t count, F f) {
    for (int64_t p = 0; p < count; p++) {
      f(line, column, &runs_of_[p / kGroup * kGroup * runs_ + p % kGroup]);
      if (++column == a.out_w) column = 0, line++;
    }
  }

  // The lines of the input that lines [first, last] of the output are made of, with their padding.
  void gather(int64_t sample, int64_t first, int64_t last) {
    const int64_t top = first * a.stride_h - a.top,
                  lines = (last - first) * a.stride_h + (a.kernel_h - 1) * a.dilation_h + 1,
                  kept = std::clamp<int64_t>(width_ - a.left, 0, a.w), size = lines * width_ * a.c;
    if (size > gathered_size_) gathered_ = std::make_unique_for_overwrite<A[]>(gathered_size_ = size);
    A* to = gathered_.get();
    const auto skip = [&](int64_t pixels) { to = std::fill_n(to, pixels * a.c, A(0)); };
    for (int64_t h = top; h < top + lines; h++) {
      if (h < 0 || h >= a.h || kept == 0) {
        skip(width_);
        continue;
      }
      skip(a.left);
      const A* const from = row<const A>(a.x, sample, 0, h * a.w);
      if (exchanges_) {
        transpose_into(from, a.x.channel, a.c, kept, to, a.c);
        to += kept * a.c;
      } else if (a.x.pixel == a.c) {
        to = std::copy_n(from, kept * a.c, to);
      } else {
        for (int64_t w = 0; w < kept; w++, to += a.c) {
          for_lanes<A>(a.c, [to, from = from + w * a.x.pixel](int64_t i, auto lanes)
                                CONVBLOCKS_LOOP { store(to + i, load(from + i, lanes), lanes); });
        }
      }
      skip(width_ - a.left - kept);
    }
  }

  // `count` pixels of a group, of the output channels of a panel: the frequent activations, which need few registers, as
  // constants.
  void columns(int64_t panel, const A* weights, int64_t term, int64_t pixel, int count) const {
    const auto with = [&](auto activation) {
      switch (width(panel)) {
        case 1: return rows<1>(panel, weights, term, pixel, count, activation);
        case 2: return rows<2>(panel, weights, term, pixel, count, activation);
        default: return rows<3>(panel, weights, term, pixel, count, activation);
      }
    };
    switch (a.activation) {
      case Activation::none: return with(std::integral_constant<Activation, Activation::none>{});
      case Activation::relu: return with(std::integral_constant<Activation, Activation::relu>{});
      case Activation::relu6: return with(std::integral_constant<Activation, Activation::relu6>{});
      default: return with(a.activation);
    }
  }

  template <int V, class Kind>
  void rows(int64_t panel, const A* weights, int64_t term, int64_t pixel, int count, Kind activation) const {
    constexpr int R = kGroup / V;
    for (int r = 0; r < count; r += R) {
      if (V == 3 || count - r > R / 2)
        tile<R, V>(2 * panel * L, weights, term, pixel + r, std::min(R, count - r), activation);
      else
        tile<R / 2, V>(2 * panel * L, weights, term, pixel + r, count - r, activation);
    }
  }

  // Adds kTerms terms, from `term` on, to the sums; after the last ones, the output.
  template <int R, int V, class Kind>
  void tile(int64_t o, const A* w, int64_t term, int64_t pixel, int count, Kind activation) const {
    Vec<A> acc[R][V]{};
    const int64_t length = length_, terms = runs_ * length, end = std::min(terms, term + kTerms);
    const A* const nothing = zeros_.data();
    const A* const* runs = &runs_of_[pixel / kGroup * kGroup * runs_ + pixel % kGroup + term / length * kGroup];
    w += term * V * L;
    for (int64_t j = term % length, left = end - term; left > 0; j = 0, runs += kGroup) {
      const A* from[R];
      bool outside = is_finite_;  // else zeros make NaN, whichever pixels are taken together
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) from[r] = runs[r], outside = outside && from[r] == nothing;
      const int64_t stop = std::min(length, j + left);
      left -= stop - j;
      if (outside) {
        w += (stop - j) * V * L;
        continue;
      }
#pragma GCC unroll 2
      for (; j < stop; j++, w += V * L) {
        Vec<A> b[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) b[v] = load(w + v * L);
#pragma GCC unroll 24
        for (int r = 0; r < R; r++) {
          const Vec<A> value = splat<Vec<A>>(from[r][j]);
#pragma GCC unroll 3
          for (int v = 0; v < V; v++) acc[r][v] += value * b[v];
        }
      }
    }
    A* const sums = sums_.get() + pixel * 3 * L;
    if (term > 0) {
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) acc[r][v] += load(sums + (r * V + v) * L);
      }
    }
    if (end < terms) {
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) store(sums + (r * V + v) * L, acc[r][v]);
      }
      return;
    }
    const A* const shift = a.shift ? static_cast<const A*>(a.shift) + o : nullptr;
    const Output* const outputs = &outputs_[pixel];
#pragma GCC unroll 3
    for (int v = 0; v < V; v++) {
      const int lanes = static_cast<int>(std::min<int64_t>(L, a.out_c - o - v * L));
      const Vec<A> offset = shift ? load(shift + v * L, lanes) : Vec<A>{};
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
        if (r >= count) break;
        const auto [y, residual] = outputs[r];
        const int64_t at = o + v * L;
        Vec<A> z = acc[r][v] + offset;
        if (lanes == L) {
          if (residual) z += load(residual + at);
          store(y + at, activate(z, activation));
        } else {
          if (residual) z += load(residual + at, lanes);
          store(y + at, activate(z, activation), lanes);
        }
      }
    }
  }

  const DenseConv2dArgs& a;
  bool exchanges_, gathers_;  // planes of the input with channels; input in a copy
  bool is_finite_ = true;     // of the weights laid out last
  int64_t runs_, length_;     // of memory that a pixel of the output is made of
  int64_t width_;             // of the padded input
  std::vector<A> zeros_;
  std::unique_ptr<A[]> gathered_, exchanged_;  // of the input, and of the output where planes are asked for
  std::unique_ptr<A[]> sums_;                  // of the terms so far
  int64_t gathered_size_ = 0;
  std::vector<const A*> runs_of_;
  std::vector<Output> outputs_;
};

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
  // Threads share the pixels, and each packs all weights; or, of many, the weights.
  const bool many = panels > together && (panels % context.threads == 0 || panels >= 16 * context.threads);
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
  const bool small = pixels * size / (2 * kLanes<A>)*args.out_c < 100000;  // not worth waking a thread for
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
