// Dense convolution on the CPU: a product of matrices whose rows are pixels and whose columns are output channels. Weights
// are laid out anew at each call, a few panels of columns at a time, so that a panel is used while it is in the second
// cache; the scale is multiplied into it on the way. In channels_last the input is read where it is, or of few channels
// from a padded copy of a few lines. Planes are exchanged with channels in that copy, or of many channels in one without
// padding, and in one of the output.
#pragma once
#include <algorithm>
#include <vector>

#include "convolution_input.h"

namespace convblocks::cpu {

// Of weights and of input that are used together, and of weights that are in the first cache with all else.
constexpr int64_t kPackedBytes = 384 << 10, kPixelBytes = 128 << 10, kNearBytes = 16 << 10;
// Sums of more terms are built from sums of at most so many, which lose less to rounding.
constexpr int64_t kTerms = 512;

template <class A>
class Convolution {
 public:
  static constexpr int L = kLanes<A>;
  // Terms whose weights, of a panel, stay in the first cache for all pixels of a block.
  static constexpr int64_t kTogether = std::min(kTerms, 2 * kNearBytes / (kPanel * L * int64_t(sizeof(A))));

  // Of vectors [from, to) of output channels.
  Convolution(const DenseConv2dArgs& args, int64_t from, int64_t to) : a(args), from_(from), to_(to), input_(args) {
    // Of few channels, the taps of a row are one run of memory, in a padded copy: it costs less to begin few runs.
    exchanges_ = input_.exchanges();
    gathers_ = a.kernel_w > 1 && a.c < 64 && a.dilation_w == 1 && !skips();
    runs_ = gathers_ ? a.kernel_h : a.kernel_h * a.kernel_w;
    length_ = gathers_ ? a.kernel_w * a.c : a.c;
    width_ = (a.out_w - 1) * a.stride_w + a.kernel_w;
    const bool copies = gathers_ || exchanges_;
    const int64_t right = std::min(a.stride_w, a.w), met = copies ? std::min(a.stride_h, a.h) * right : 1;
    const int64_t bytes = a.c * met * int64_t(sizeof(A)), groups = kPixelBytes / bytes / kGroup;
    block_ = std::clamp<int64_t>(groups, gathers_ ? 2 : 8, copies ? 64 : 16) * kGroup;
    column_edges_ =
        gathers_ ? std::vector<int64_t>{0, a.out_w} : edges(a.kernel_w, a.dilation_w, a.stride_w, a.left, a.w, a.out_w);
    row_edges_ =
        gathers_ ? std::vector<int64_t>{0, a.out_h} : edges(a.kernel_h, a.dilation_h, a.stride_h, a.top, a.h, a.out_h);
    ahead_ = copies ? 0 : kGroup * right * a.x.pixel;
    const bool fits =
        all_vectors(a) <= kLineVectors && terms() <= kTerms && a.out_w > 4;  // shorter lines would take longer
    by_lines_ = gathers_ && a.kernel_w == 3 && a.stride_w == 1 && fits;
    if (by_lines_) block_ = std::max<int64_t>(1, block_ / a.out_w) * a.out_w;
  }

  static int64_t all_vectors(const DenseConv2dArgs& args) { return (args.out_c + L - 1) / L; }
  // The output channels are cut into panels of kPanel vectors. No panel has a single one, if that is not all: of panels
  // of two the last has three then, and of panels of four the last ones have three and two.
  int64_t vectors() const { return to_ - from_; }
  int64_t panels() const { return std::max<int64_t>(1, kPanel == 2 ? vectors() / 2 : (vectors() + 3) / 4); }
  int64_t start(int64_t panel) const {  // its first vector
    if (panel == panels()) return to_;
    const bool gives_one = kPanel == 4 && vectors() > 1 && vectors() % 4 == 1 && panel + 1 == panels();
    return from_ + panel * kPanel - gives_one;
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
    if (terms() > kTogether) sums_ = Buffer<A>(block_ * kMost * L);
    const int64_t channel = start(first) * L, channels = std::min(a.out_c, start(last) * L) - channel;
    if (a.planes) exchanged_ = Buffer<A>(block_ * row_size());
    for (int64_t at = begin, stop; at < end; at = stop) {
      stop = std::min(end, by_lines_ ? at / a.out_w * a.out_w + block_ : at + block_);
      if (gathers_ || exchanges_) stop = std::min(stop, (at / hw + 1) * hw);  // copies are of one sample
      locate(at, stop);
      if (a.planes && a.residual.data) {
        each_sample(at, stop, [&](int64_t sample, int64_t pixel, int64_t count, A* exchanged) {
          transpose_into(row<const A>(a.residual, sample, channel, pixel), a.residual.channel, channels, count,
                         exchanged + channel, row_size());
        });
      }
      const auto group = [&](int64_t panel, int64_t term, int64_t p) {
        const int count = static_cast<int>(std::min<int64_t>(kGroup, stop - at - p));
        columns(panel, packed + packed_at(first, panel), term, p, count);
      };
      if (by_lines_) {
        lines(packed, at % hw, stop - at);
      } else if (terms() <= kTogether && packed_at(first, last) * int64_t(sizeof(A)) <= kNearBytes) {
        for (int64_t p = 0; p < stop - at; p += kGroup) {
          for (int64_t i = first; i < last; i++) group(i, 0, p);
        }
      } else {
        for (int64_t i = first; i < last; i++) {
          for (int64_t term = 0; term < terms(); term += kTogether) {
            for (int64_t p = 0; p < stop - at; p += kGroup) group(i, term, p);
          }
        }
      }
      if (a.planes) {
        each_sample(at, stop, [&](int64_t sample, int64_t pixel, int64_t count, A* exchanged) {
          transpose_into<A>(exchanged + channel, row_size(), count, channels, row<A>(a.y, sample, channel, pixel),
                            a.y.channel);
        });
      }
    }
  }

 private:
  // Whether there is input that no tap meets, which a copy with padding would have for nothing.
  bool skips() const { return a.stride_h > a.kernel_h * a.dilation_h || a.stride_w > a.kernel_w; }

  int64_t row_size() const { return all_vectors(a) * L; }  // of a pixel of the output where planes are asked for

  // Rows or columns of the output, between which the same taps meet the input; unless those of a block between two do not
  // fill a tile.
  std::vector<int64_t> edges(int64_t kernel, int64_t dilation, int64_t stride, int64_t padding, int64_t size,
                             int64_t out) const {
    std::vector<int64_t> all{0, out};
    for (int64_t i = 0; i < kernel; i++) {  // where the tap begins to meet the input, and ends to
      const int64_t start = padding - i * dilation;
      for (const int64_t met : {start, start + size}) {
        all.push_back(std::clamp<int64_t>((met + stride - 1) / stride, 0, out));
      }
    }
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    const auto few = [=, this](int64_t from, int64_t to) { return (to - from) * block_ < out * kGroup / kMost; };
    return std::adjacent_find(all.begin(), all.end(), few) == all.end() ? all : std::vector<int64_t>{0, out};
  }

  // Calls f(sample, pixel, count, what is exchanged of them) for each sample that pixels [at, stop) are of.
  template <class F>
  void each_sample(int64_t at, int64_t stop, F f) {
    const int64_t hw = a.out_h * a.out_w;
    for (int64_t i = at, next; i < stop; i = next) {
      next = std::min(stop, (i / hw + 1) * hw);
      f(i / hw, i % hw, next - i, exchanged_.data() + (i - at) * row_size());
    }
  }

  // Of panels laid out from `first` on.
  int64_t packed_at(int64_t first, int64_t panel) const { return (start(panel) - start(first)) * L * terms(); }

  // The first of the runs of pixel p of a block; the next is kGroup further.
  const A** runs_of(int64_t p) { return &runs_of_[p / kGroup * kGroup * runs_ + p % kGroup]; }

  // Where pixels [at, stop) of the output are, and where the runs that they are made of begin. Those of a group lie side
  // by side; the last stands in for those that are missing.
  void locate(int64_t at, int64_t stop) {
    const int64_t sample = at / a.out_w / a.out_h, line = at / a.out_w % a.out_h,
                  last = line + (stop - 1) / a.out_w - at / a.out_w;
    if (gathers_) copy_ = input_.padded(width_, sample, line, last);
    if (!gathers_ && exchanges_) copy_ = input_.exchanged(sample, line, last);
    if (by_lines_) return each_pixel(at, stop, [](const A*, int64_t, int64_t, int64_t) {});
    const int64_t step = exchanges_ ? a.c : a.x.pixel,
                  top = exchanges_ ? input_.first_exchanged(line) : 0;  // the line that the map begins with
    if (gathers_) {
      each_pixel(at, stop, [=, this](const A* map, int64_t h, int64_t w, int64_t p) {
        const A** const to = runs_of(p);
        const A* from = map + ((h - line) * a.stride_h * width_ + w * a.stride_w) * a.c;
        for (int64_t i = 0; i < runs_; i++) to[i * kGroup] = from + i * a.dilation_h * width_ * a.c;
      });
    } else if (a.kernel_h * a.kernel_w == 1 && a.top == 0 && a.left == 0) {
      each_pixel(at, stop, [=, this](const A* map, int64_t h, int64_t w, int64_t p) {
        *runs_of(p) = map + ((h * a.stride_h - top) * a.w + w * a.stride_w) * step;
      });
    } else {
      each_pixel(at, stop, [=, this](const A* map, int64_t line, int64_t column, int64_t p) {
        const A** to = runs_of(p);
        for (int64_t i = 0; i < a.kernel_h; i++) {
          const int64_t h = line * a.stride_h - a.top + i * a.dilation_h;
          for (int64_t j = 0; j < a.kernel_w; j++, to += kGroup) {
            const int64_t w = column * a.stride_w - a.left + j * a.dilation_w;
            const bool inside = h >= 0 && h < a.h && w >= 0 && w < a.w;
            *to = inside ? map + ((h - top) * a.w + w) * step : zeros_.data();
          }
        }
      });
    }
    for (int64_t p = stop - at; p % kGroup; p++) {
      const A** const to = runs_of(p);
      for (int64_t i = 0; i < runs_; i++) to[i * kGroup] = to[i * kGroup - 1];
    }
  }

  // Those that meet the same taps one after the other: the more groups there are of pixels that are alike, the more taps
  // are passed over.
  template <class F>
  void each_pixel(int64_t at, int64_t stop, F f) {
    int64_t p = 0;
    for (size_t i = 0; i + 1 < row_edges_.size(); i++) {
      for (size_t j = 0; j + 1 < column_edges_.size(); j++) {
        for (int64_t line = at / a.out_w; line * a.out_w < stop; line++) {
          const int64_t sample = line / a.out_h, h = line % a.out_h, first = line * a.out_w - at;
          if (h < row_edges_[i] || h >= row_edges_[i + 1]) continue;
          const int64_t begin = std::max(column_edges_[j], -first),
                        end = std::min(column_edges_[j + 1], stop - at - first);
          const A* const map = gathers_ || exchanges_ ? copy_ : row<const A>(a.x, sample, 0);
          for (int64_t w = begin; w < end; w++, p++) {
            const int64_t pixel = h * a.out_w + w;
            A* const y = a.planes ? exchanged_.data() + (first + w) * row_size() : row<A>(a.y, sample, 0, pixel);
            const A* const beside = a.planes || !a.residual.data ? y : row<const A>(a.residual, sample, 0, pixel);
            outputs_[p] = {y, a.residual.data ? beside : nullptr};
            f(map, h, w, p);
          }
        }
      }
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
        const A* const from = copy_ + ((h - first / a.out_w) * a.stride_h * width_ + w) * a.c;
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

  // Adds kTogether terms, from `term` on, to the sums; after the last ones, the output.
  template <int R, int V, class Kind>
  void tile(int64_t o, const A* w, int64_t term, int64_t pixel, int count, Kind activation) const {
    Vec<A> acc[R][V]{};
    const int64_t length = length_, terms = runs_ * length, end = std::min(terms, term + kTogether);
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
    A* const sums = terms > kTogether ? sums_.data() + pixel * kMost * L : nullptr;
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
  int64_t from_, to_;
  bool exchanges_, gathers_;  // planes of the input with channels; input in a copy with padding
  bool by_lines_;             // pixels of a line by themselves, whose taps share what is read
  bool is_finite_ = true;     // of the weights laid out last
  int64_t runs_, length_;     // of memory that a pixel of the output is made of
  int64_t width_;             // of the padded input
  int64_t ahead_;             // from a pixel to where the next group has its own

  int64_t block_;                                  // pixels that are taken together
  std::vector<int64_t> row_edges_, column_edges_;  // of the output, between which the same taps meet the input
  std::vector<A> zeros_;
  ConvolutionInput<A> input_;
  const A* copy_;        // of lines of a sample
  Buffer<A> exchanged_;  // of the output, where planes are asked for
  Buffer<A> sums_;       // of the terms so far
  std::vector<const A*> runs_of_;
  std::vector<TileOutput<A>> outputs_;
};

}  // namespace convblocks::cpu
