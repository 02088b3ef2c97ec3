// Dense convolution on the CPU: a product of matrices whose rows are pixels and whose columns are output channels. Weights
// are laid out anew at each call, a few panels of columns at a time, so that a panel is used while it is in the second
// cache; the scale is multiplied into it on the way. In channels_last the input is read where it is, or of few channels
// from a padded copy of a few lines; planes are exchanged with channels in that copy, and in one of the output.
#pragma once
#include <algorithm>
#include <vector>

#include "convolution_tile.h"
#include "lanes.h"

namespace convblocks::cpu {

// Of weights and of input that are used together, and of weights that are in the first cache with all else.
constexpr int64_t kPackedBytes = 384 << 10, kPixelBytes = 128 << 10, kNearBytes = 16 << 10;
// Sums of more terms are built from sums of so many, which lose less to rounding.
constexpr int64_t kTerms = 512;

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
    const int64_t bytes = a.c * sizeof(A) * (gathers_ ? a.stride_h * a.stride_w : 1),
                  groups = kPixelBytes / bytes / kGroup;
    block_ = (gathers_ ? std::clamp<int64_t>(groups, 2, 64) : std::clamp<int64_t>(groups, 8, 16)) * kGroup;
    edges_ = {0, a.out_w};
    if (!gathers_) cut_columns();
    ahead_ = gathers_ ? 0 : kGroup * a.stride_w * a.x.pixel;
    const bool fits = vectors() <= kLineVectors && terms() <= kTerms && a.out_w > 4;  // shorter lines would take longer
    by_lines_ = gathers_ && a.kernel_w == 3 && a.stride_w == 1 && fits;
    if (by_lines_) block_ = std::max<int64_t>(1, block_ / a.out_w) * a.out_w;
  }

  // Whether there is input that no tap meets, which a copy of lines need not have.
  bool skips() const { return a.stride_h > a.kernel_h * a.dilation_h || a.stride_w > a.kernel_w; }

  // The output channels are cut into panels of kPanel vectors. No panel has a single one, if that is not all: of panels
  // of two the last has three then, and of panels of four the last ones have three and two.
  int64_t vectors() const { return (a.out_c + L - 1) / L; }
  int64_t panels() const { return std::max<int64_t>(1, kPanel == 2 ? vectors() / 2 : (vectors() + 3) / 4); }
  int64_t start(int64_t panel) const {  // its first vector
    if (panel == panels()) return vectors();
    const bool gives_one = kPanel == 4 && vectors() > 1 && vectors() % 4 == 1 && panel + 1 == panels();
    return panel * kPanel - gives_one;
  }
  int64_t width(int64_t panel) const { return start(panel + 1) - start(panel); }
  int64_t terms() const { return runs_ * length_; }
  int64_t pixels() const { return a.n * a.out_h * a.out_w; }
  int64_t panel_size() const { return terms() * kPanel * L; }  // of most

  // Panels [first, last) of the weights, each (runs, length, vectors, L).
  void pack(int64_t first, int64_t last, A* to) {
    Vec<A> zeros{};
    const int64_t taps = a.kernel_h * a.kernel_w, k = terms();
    const bool in_place = taps == 1 || a.weight_channels_last;
    const A *const weight = static_cast<const A*>(a.weight), *const scale = static_cast<const A*>(a.scale);
    for (int64_t vector = start(first), number = first; vector < start(last); vector++) {
      if (vector == start(number + 1)) number++;
      const int64_t o = vector * L, stride = width(number) * L;
      A* const panel = to + packed_at(first, number) + (vector - start(number)) * L;
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
    const int64_t hw = a.out_h * a.out_w;
    zeros_.resize(length_);
    if (!by_lines_) runs_of_.resize(block_ * runs_);
    outputs_.resize(block_);
    if (terms() > kTerms) sums_ = std::make_unique_for_overwrite<A[]>(block_ * kMost * L);
    const int64_t channel = start(first) * L, channels = std::min(a.out_c, start(last) * L) - channel;
    if (a.planes) exchanged_ = std::make_unique_for_overwrite<A[]>(block_ * vectors() * L);
    for (int64_t at = begin, stop; at < end; at = stop) {
      stop = std::min({end, by_lines_ ? at / a.out_w * a.out_w + block_ : at + block_, (at / hw + 1) * hw});
      const int64_t sample = at / hw, pixel = at % hw, row_size = vectors() * L;
      locate(sample, pixel, stop - at);
      if (a.planes && a.residual.data) {
        transpose_into(row<const A>(a.residual, sample, channel, pixel), a.residual.channel, channels, stop - at,
                       exchanged_.get() + channel, row_size);
      }
      const auto group = [&](int64_t panel, int64_t term, int64_t p) {
        const int count = static_cast<int>(std::min<int64_t>(kGroup, stop - at - p));
        columns(panel, packed + packed_at(first, panel), term, p, count);
      };
      if (by_lines_) {
        lines(packed, pixel, stop - at);
      } else if (terms() <= kTerms && packed_at(first, last) * int64_t(sizeof(A)) <= kNearBytes) {
        for (int64_t p = 0; p < stop - at; p += kGroup) {
          for (int64_t i = first; i < last; i++) group(i, 0, p);
        }
      } else {
        for (int64_t i = first; i < last; i++) {
          for (int64_t term = 0; term < terms(); term += kTerms) {
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
  void cut_columns() {
    for (int64_t j = 0; j < a.kernel_w; j++) {  // where the tap begins to meet the input, and ends to
      const int64_t to_left = a.left - j * a.dilation_w;
      for (const int64_t met : {to_left, to_left + a.w}) {
        edges_.push_back(std::clamp<int64_t>((met + a.stride_w - 1) / a.stride_w, 0, a.out_w));
      }
    }
    std::sort(edges_.begin(), edges_.end());
    edges_.erase(std::unique(edges_.begin(), edges_.end()), edges_.end());
    // Not where the columns of a block between two edges do not fill a tile.
    const int64_t lines = block_ / a.out_w;
    const auto few = [=](int64_t from, int64_t to) { return (to - from) * lines < kGroup / kMost; };
    if (std::adjacent_find(edges_.begin(), edges_.end(), few) != edges_.end()) edges_ = {0, a.out_w};
  }

  // Of panels laid out from `first` on.
  int64_t packed_at(int64_t first, int64_t panel) const { return (start(panel) - start(first)) * L * terms(); }

  // The first of the runs of pixel p of a block; the next is kGroup further.
  const A** runs_of(int64_t p) { return &runs_of_[p / kGroup * kGroup * runs_ + p % kGroup]; }

  // Where `count` pixels of a sample of the output are, and where the runs that they are made of begin. Those of a group
  // lie side by side; the last stands in for those that are missing.
  void locate(int64_t sample, int64_t first, int64_t count) {
    const int64_t line = first / a.out_w, last = (first + count - 1) / a.out_w;
    const A* const map = row<const A>(a.x, sample, 0);
    if (gathers_) {
      gather(sample, line, last);
      if (by_lines_) return each_pixel(sample, first, count, [](int64_t, int64_t, int64_t) {});
      each_pixel(sample, first, count, [this, line](int64_t h, int64_t w, int64_t p) {
        const A** const to = runs_of(p);
        const A* from = gathered_.get() + ((h - line) * a.stride_h * width_ + w * a.stride_w) * a.c;
        for (int64_t i = 0; i < runs_; i++) to[i * kGroup] = from + i * a.dilation_h * width_ * a.c;
      });
    } else if (a.kernel_h * a.kernel_w == 1 && a.top == 0 && a.left == 0) {
      each_pixel(sample, first, count, [this, map](int64_t h, int64_t w, int64_t p) {
        *runs_of(p) = map + (h * a.stride_h * a.w + w * a.stride_w) * a.x.pixel;
      });
    } else {
      each_pixel(sample, first, count, [this, map](int64_t line, int64_t column, int64_t p) {
        const A** to = runs_of(p);
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
      const A** const to = runs_of(p);
      for (int64_t i = 0; i < runs_; i++) to[i * kGroup] = to[i * kGroup - 1];
    }
  }

  // In columns that meet the same taps, one after the other: the more groups there are of pixels that are alike, the more
  // taps are passed over.
  template <class F>
  void each_pixel(int64_t sample, int64_t first, int64_t count, F f) {
    A* const y = a.planes ? exchanged_.get() : row<A>(a.y, sample, 0, first);
    const A* const residual = !a.residual.data ? nullptr : a.planes ? y : row<const A>(a.residual, sample, 0, first);
    const int64_t y_step = a.planes ? vectors() * L : a.y.pixel, step = a.planes ? y_step : a.residual.pixel;
    const int64_t stop = first + count;
    int64_t p = 0;
    for (size_t some = 0; some + 1 < edges_.size(); some++) {
      for (int64_t h = first / a.out_w; h * a.out_w < stop; h++) {
        const int64_t begin = std::max(edges_[some], first - h * a.out_w),
                      end = std::min(edges_[some + 1], stop - h * a.out_w);
        for (int64_t w = begin; w < end; w++, p++) {
          const int64_t number = h * a.out_w + w - first;
          outputs_[p] = {y + number * y_step, residual ? residual + number * step : nullptr};
          f(h, w, p);
        }
      }
    }
  }

  // The lines of the input that lines [first, last] of the output are made of, with their padding.
  void gather(int64_t sample, int64_t first, int64_t last) {
    const int64_t top = first * a.stride_h - a.top,
                  lines = (last - first) * a.stride_h + (a.kernel_h - 1) * a.dilation_h + 1,
                  kept = std::clamp<int64_t>(width_ - a.left, 0, a.w), size = lines * width_ * a.c;
    const int64_t room = size + kLine * a.c;  // what the last of a line may read, for nothing
    if (room > gathered_size_) gathered_ = std::make_unique_for_overwrite<A[]>(gathered_size_ = room);
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

  // The frequent activations, which need few registers, as constants.
  template <class F>
  void with_activation(F f) const {
    switch (a.activation) {
      case Activation::none: return f(std::integral_constant<Activation, Activation::none>{});
      case Activation::relu: return f(std::integral_constant<Activation, Activation::relu>{});
      case Activation::relu6: return f(std::integral_constant<Activation, Activation::relu6>{});
      default: return f(a.activation);
    }
  }

  // `count` pixels of a sample, from `first` on, of a kernel 3 wide and few output channels.
  void lines(const A* weights, int64_t first, int64_t count) const {
    with_activation([&](auto activation) {
      for (int64_t at = first; at < first + count;) {
        const int64_t h = at / a.out_w, w = at % a.out_w, left = std::min(first + count - at, a.out_w - w);
        const A* const from = gathered_.get() + ((h - first / a.out_w) * a.stride_h * width_ + w) * a.c;
        const int most = vectors() == 1 ? kLine : kLine / 2, pixels = static_cast<int>(std::min<int64_t>(left, most));
        if (pixels > kLine / 2) {
          line<1, kLine>(from, weights, at - first, pixels, activation);
        } else if (vectors() == 1) {
          line<1, (kLine + 1) / 2>(from, weights, at - first, pixels, activation);
        } else if constexpr (kLineVectors == 2) {
          line<2, kLine / 2>(from, weights, at - first, pixels, activation);
        }
        at += pixels;
      }
    });
  }
  template <int V, int R, class Kind>
  void line(const A* from, const A* weights, int64_t pixel, int count, Kind activation) const {
    Vec<A> acc[R][V]{};
    sum_line<A>(acc, from, weights, a.c, a.kernel_h, a.dilation_h * width_ * a.c);
    finish_tile(acc, a, 0, &outputs_[pixel], count, activation);
  }

  // `count` pixels of a group, of the output channels of a panel.
  void columns(int64_t panel, const A* weights, int64_t term, int64_t pixel, int count) const {
    with_activation([&](auto activation) {
      switch (width(panel)) {
        case 1: return rows<1>(panel, weights, term, pixel, count, activation);
        case 2: return rows<2>(panel, weights, term, pixel, count, activation);
        case 3: return rows<3>(panel, weights, term, pixel, count, activation);
        default: return rows<kMost>(panel, weights, term, pixel, count, activation);
      }
    });
  }

  template <int V, class Kind>
  void rows(int64_t panel, const A* weights, int64_t term, int64_t pixel, int count, Kind activation) const {
    constexpr int R = kGroup / V;
    for (int r = 0; r < count; r += R) {
      if (V == 3 || count - r > R / 2)
        tile<R, V>(start(panel) * L, weights, term, pixel + r, std::min(R, count - r), activation);
      else
        tile<R / 2, V>(start(panel) * L, weights, term, pixel + r, count - r, activation);
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
    if (end == terms) {
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) __builtin_prefetch(outputs_[pixel + std::min(r, count - 1)].y + o + v * L, 1);
      }
    }
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
      while (j < stop) {
#pragma GCC unroll 24
        for (int r = 0; r < R; r++) __builtin_prefetch(from[r] + j + ahead_, 0, 2);
        const int64_t line = std::min(stop, j + int64_t(64 / sizeof(A)));
#pragma GCC unroll 2
        for (; j < line; j++, w += V * L) {
          Vec<A> b[V];
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) b[v] = load(w + v * L);
#pragma GCC unroll 24
          for (int r = 0; r < R; r++) {
            const Vec<A> value = splat<Vec<A>>(from[r][j]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) acc[r][v] += value * b[v];
          }
        }
      }
    }
    A* const sums = sums_.get() + pixel * kMost * L;
    if (term > 0) {
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) acc[r][v] += load(sums + (r * V + v) * L);
      }
    }
    if (end < terms) {
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(sums + (r * V + v) * L, acc[r][v]);
      }
      return;
    }
    finish_tile(acc, a, o, &outputs_[pixel], count, activation);
  }

  const DenseConv2dArgs& a;
  bool exchanges_, gathers_;  // planes of the input with channels; input in a copy
  bool by_lines_;             // pixels of a line by themselves, whose taps share what is read
  bool is_finite_ = true;     // of the weights laid out last
  int64_t runs_, length_;     // of memory that a pixel of the output is made of
  int64_t width_;             // of the padded input
  int64_t ahead_;             // from a pixel to where the next group has its own

  int64_t block_;               // pixels that are taken together
  std::vector<int64_t> edges_;  // columns of the output, between which the same taps meet the input
  std::vector<A> zeros_;
  std::unique_ptr<A[]> gathered_, exchanged_;  // of the input, and of the output where planes are asked for
  std::unique_ptr<A[]> sums_;                  // of the terms so far
  int64_t gathered_size_ = 0;
  std::vector<const A*> runs_of_;
  std::vector<TileOutput<A>> outputs_;
};

}  // namespace convblocks::cpu
