// Dense convolution on the CPU, channels_last: a product of matrices whose rows are pixels and whose columns are output
// channels. Weights are laid out anew at each call, a few panels of columns at a time, so that a panel is used while it is
// in the second cache; the scale is multiplied into it on the way. The input is read where it is.
#include "../dense_conv2d.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "gate.h"
#include "lanes.h"

namespace convblocks::cpu {
namespace {

// Of a tile: what the registers hold.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
template <class A>
constexpr int kColumns = 2 * kLanes<A>;

// Of weights and of input that are used together, and of weights that are in the first cache with all else.
constexpr int64_t kPackedBytes = 192 << 10, kPixelBytes = 128 << 10, kNearBytes = 16 << 10;
constexpr int64_t kTerms = 128;  // sums of more are built from sums of so many, which lose less to rounding

template <class A>
class Convolution {
 public:
  static constexpr int L = kLanes<A>, C = kColumns<A>;

  explicit Convolution(const DenseConv2dArgs& args) : a(args) {
    // Of few channels, the taps of a row are one run of memory: it costs less to begin few runs.
    whole_rows_ = a.kernel_w > 1 && a.c < 128 && a.dilation_w == 1 && a.x.pixel == a.c;
    runs_ = whole_rows_ ? a.kernel_h : a.kernel_h * a.kernel_w;
    length_ = whole_rows_ ? a.kernel_w * a.c : a.c;
  }

  int64_t panels() const { return (a.out_c + C - 1) / C; }
  int64_t pixels() const { return a.n * a.out_h * a.out_w; }
  int64_t panel_size() const { return runs_ * length_ * C; }

  // Panels [first, last) of the weights, each (runs, length, C).
  void pack(int64_t first, int64_t last, A* to) const {
    const int64_t taps = a.kernel_h * a.kernel_w, k = runs_ * length_;
    const bool in_place = taps == 1 || a.weight_channels_last;
    const A *const weight = static_cast<const A*>(a.weight), *const scale = static_cast<const A*>(a.scale);
    for (int64_t o = first * C; o < std::min(last * C, a.out_c); o += L) {
      A* const panel = to + (o / C - first) * panel_size() + o % C;
      const int count = static_cast<int>(std::min<int64_t>(L, a.out_c - o));
      const Vec<A> factor = scale ? load(scale + o, count) : splat<Vec<A>>(1);
      int64_t channel = 0, tap = 0;
      for (int64_t i = 0; i < k; i += L) {
        const int rows = static_cast<int>(std::min<int64_t>(L, k - i));
        Vec<A> v[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; l++) {
          const A* from = weight + (o + l) * k + i;
          v[l] = l >= count ? Vec<A>{} : rows == L ? load(from) : load(from, rows);
        }
        transpose<A>(v);
        for (int l = 0; l < rows; l++) {
          store(panel + (in_place ? i + l : tap * a.c + channel) * C, v[l] * factor);
          if (++tap == taps) tap = 0, channel++;
        }
      }
    }
  }

  // Pixels [begin, end) of the output channels of panels [first, last).
  void run(int64_t first, int64_t last, const A* packed, int64_t begin, int64_t end) {
    const int64_t most = std::clamp<int64_t>(kPixelBytes / int64_t(a.c * sizeof(A)) / kRows, 4, 32) * kRows;
    zeros_.resize(length_);
    edges_ = std::make_unique_for_overwrite<A[]>(whole_rows_ ? most * runs_ * length_ : 0);
    runs_of_.resize(most * runs_);
    outputs_.resize(most);
    for (int64_t at = begin; at < end; at += most) {
      const int64_t stop = std::min(end, at + most);
      locate(at, stop);
      const auto tile = [&](int64_t panel, int64_t p) {
        const int count = static_cast<int>(std::min<int64_t>(kRows, stop - at - p));
        columns(panel * C, packed + (panel - first) * panel_size(), p, count);
      };
      if ((last - first) * panel_size() * int64_t(sizeof(A)) <= kNearBytes) {
        for (int64_t p = 0; p < stop - at; p += kRows) {
          for (int64_t i = first; i < last; i++) tile(i, p);
        }
      } else {
        for (int64_t i = first; i < last; i++) {
          for (int64_t p = 0; p < stop - at; p += kRows) tile(i, p);
        }
      }
    }
  }

 private:
  struct Output {
    A* y;
    const A* residual;
  };

  // Where pixels [begin, end) of the output are, and where the runs that they are made of begin: of kRows pixels
  // together, the last of all stands in for those that are missing.
  void locate(int64_t begin, int64_t end) {
    int64_t column = begin % a.out_w, line = begin / a.out_w % a.out_h, sample = begin / a.out_w / a.out_h;
    A* edge = edges_.get();
    for (int64_t p = 0; p < end - begin; p++) {
      const A* const map = row<const A>(a.x, sample, 0);
      const int64_t top = line * a.stride_h - a.top, left = column * a.stride_w - a.left;
      const A** to = &runs_of_[p / kRows * kRows * runs_ + p % kRows];
      for (int64_t i = 0; i < a.kernel_h; i++) {
        const int64_t h = top + i * a.dilation_h;
        const bool inside = h >= 0 && h < a.h;
        if (whole_rows_) {
          const int64_t from = std::max<int64_t>(left, 0), until = std::min(left + a.kernel_w, a.w);
          *to = inside && from < until ? map + (h * a.w + from) * a.c : zeros_.data();
          if (inside && from < until && until - from < a.kernel_w) {
            std::fill_n(edge, length_, A(0));
            std::copy_n(*to, (until - from) * a.c, edge + (from - left) * a.c);
            *to = edge;
            edge += length_;
          }
          to += kRows;
          continue;
        }
        for (int64_t j = 0; j < a.kernel_w; j++, to += kRows) {
          const int64_t w = left + j * a.dilation_w;
          *to = inside && w >= 0 && w < a.w ? map + (h * a.w + w) * a.x.pixel : zeros_.data();
        }
      }
      const int64_t pixel = line * a.out_w + column;
      outputs_[p] = {row<A>(a.y, sample, 0, pixel),
                     a.residual.data ? row<const A>(a.residual, sample, 0, pixel) : nullptr};
      if (++column == a.out_w) {
        column = 0;
        if (++line == a.out_h) line = 0, sample++;
      }
    }
    for (int64_t p = end - begin; p % kRows; p++) {
      const A** const tile = &runs_of_[p / kRows * kRows * runs_ + p % kRows];
      for (int64_t i = 0; i < runs_; i++) tile[i * kRows] = tile[i * kRows - 1];
    }
  }

  // `count` pixels of the C output channels from o on: the frequent activations, which need few registers, as constants.
  void columns(int64_t o, const A* weights, int64_t pixel, int count) const {
    const auto with = [&]<class R>(R, auto activation) {
      if (a.out_c - o > L)
        tile<R::value, 2>(o, weights, pixel, count, activation);
      else
        tile<R::value, 1>(o, weights, pixel, count, activation);
    };
    const auto rows = [&](auto activation) {
      if (count > kRows / 2)
        with(std::integral_constant<int, kRows>{}, activation);
      else
        with(std::integral_constant<int, kRows / 2>{}, activation);
    };
    switch (a.activation) {
      case Activation::none: return rows(std::integral_constant<Activation, Activation::none>{});
      case Activation::relu: return rows(std::integral_constant<Activation, Activation::relu>{});
      case Activation::relu6: return rows(std::integral_constant<Activation, Activation::relu6>{});
      default: return rows(a.activation);
    }
  }

  template <int R, int V, class Kind>
  void tile(int64_t o, const A* w, int64_t pixel, int count, Kind activation) const {
    Vec<A> acc[R][V]{}, total[R][V]{};
    const int64_t length = length_;
    const A* const* runs = &runs_of_[pixel * runs_];
    int64_t terms = 0;
    for (int64_t i = 0; i < runs_; i++, runs += kRows) {
      const A* from[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) from[r] = runs[r];
      for (int64_t j = 0; j < length;) {
        for (const int64_t stop = std::min(length, j + kTerms - terms % kTerms); j < stop; j++, terms++, w += C) {
          Vec<A> b[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) b[v] = load(w + v * L);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) {
            const Vec<A> value = splat<Vec<A>>(from[r][j]);
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) acc[r][v] += value * b[v];
          }
        }
        if (terms % kTerms) continue;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) total[r][v] += acc[r][v], acc[r][v] = Vec<A>{};
        }
      }
    }
    const A* const shift = a.shift ? static_cast<const A*>(a.shift) + o : nullptr;
    const Output* const outputs = &outputs_[pixel];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const int lanes = static_cast<int>(std::min<int64_t>(L, a.out_c - o - v * L));
      const Vec<A> offset = shift ? load(shift + v * L, lanes) : Vec<A>{};
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        if (r >= count) break;
        const auto [y, residual] = outputs[r];
        const int64_t at = o + v * L;
        Vec<A> z = (total[r][v] + acc[r][v]) + offset;
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
  bool whole_rows_;
  int64_t runs_, length_;  // of memory that a pixel of the output is made of
  std::vector<A> zeros_;
  std::unique_ptr<A[]> edges_;  // runs that reach over a border
  std::vector<const A*> runs_of_;
  std::vector<Output> outputs_;
};

template <class A>
void forward(const Context& context, const DenseConv2dArgs& args) {
  const Convolution<A> whole(args);
  const int64_t panels = whole.panels(), pixels = whole.pixels(), size = whole.panel_size();
  const int64_t together = std::clamp<int64_t>(kPackedBytes / int64_t(size * sizeof(A)), 1, panels);
  const auto run = [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    Convolution<A> part(args);
    const Scratch<A> packed(together * size);
    for (; first < last; first += together) {
      const int64_t stop = std::min(last, first + together);
      part.pack(first, stop, packed.data());
      part.run(first, stop, packed.data(), begin, end);
    }
  };
  // Threads share the pixels, and each packs all weights; or, of many, the weights.
  const bool many = panels > together && (panels % context.threads == 0 || panels >= 16 * context.threads);
  const bool small = pixels * size / kColumns<A> * args.out_c < 100000;  // not worth waking a thread for
  const int64_t tiles = (pixels + kRows - 1) / kRows;
  if (many) return parallel_for(context, panels, 1, [&](int64_t a, int64_t b) { run(a, b, 0, pixels); });
  parallel_for(context, tiles, small ? tiles : 1,
               [&](int64_t a, int64_t b) { run(0, panels, a * kRows, std::min(pixels, b * kRows)); });
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
