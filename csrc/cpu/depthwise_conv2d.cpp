// Depthwise convolution on the CPU: channels in the lanes of vectors, in both layouts. A map in channels_last is used where
// it lies; of one in NCHW, or with few channels, the planes of a vector's channels are gathered into scratch memory, a
// band of rows at a time, and what becomes of them is scattered back.
#include "../depthwise_conv2d.h"

#include "depthwise_planes.h"
#include "depthwise_side.h"
#include "dispatch.h"
#include "lanes.h"
#include "weights.h"

namespace convblocks::cpu {
namespace {

using Shape = DepthwiseConv2dShape;

constexpr int64_t kBandBytes = 256 << 10;  // of scratch memory for a band of rows
constexpr int64_t kChunk = 1024;           // pixels whose products are summed before they are added to other sums

template <class T>
struct Depthwise {
  using A = Acc<T>;
  static constexpr int L = kLanes<T>;

  const Context& context;
  const Shape& shape;
  const A *weight, *bias;
  Activation activation;
  Side rows, columns;
  int64_t taps, block;  // elements of a block of packed weights, and of sums: the taps and one more, each a vector

  Depthwise(const Context& context, const Shape& s, const DepthwiseConv2dWeights& w)
      : context(context), shape(s),
        weight(widened<A>(context, w.weight, w.dtype, s.c * s.multiplier * s.kernel_h * s.kernel_w)),
        bias(widened<A>(context, w.bias, w.dtype, s.c * s.multiplier)), activation(w.activation),
        rows{s.h, s.out_h, s.kernel_h, s.stride_h, s.dilation_h, s.top},
        columns{s.w, s.out_w, s.kernel_w, s.stride_w, s.dilation_w, s.left}, taps(s.kernel_h * s.kernel_w),
        block((taps + 1) * L) {}

  // The weights and the bias of `count` channels, `multiplier` apart: the taps in turn, then the bias.
  void pack(int64_t channel, int count, A* to) const {
    const int64_t m = shape.multiplier;
    gather_lanes<A>({weight + channel * taps, m * taps, 1, count}, 0, taps, to);
    if (bias)
      gather_lanes<A>({bias + channel, m, 0, count}, 0, 1, to + taps * L);
    else
      store(to + taps * L, Vec<A>{});
  }

  // A row of the result. Row `in_first` of the map lies at `in`, whose rows are whole.
  template <class S, class D>
  Row<S, D> forward_row(int64_t row, const S* in, int64_t in_first, int64_t in_pixel, const A* packed, D* out,
                        int64_t out_pixel) const {
    const auto window = rows.window(row);
    const int64_t in_row = shape.w * in_pixel;
    return {in + (window.position - in_first) * in_row,
            shape.dilation_h * in_row,
            in_pixel,
            packed + window.tap * shape.kernel_w * L,
            shape.kernel_w * L,
            L,
            block,
            packed + taps * L,
            block,
            window.count,
            shape.kernel_w,
            -shape.left,
            shape.stride_w,
            shape.dilation_w,
            shape.w,
            out,
            out_pixel,
            shape.out_w,
            false,
            activation};
  }

  // A row of the gradient of the map, of `channels`; row `grad_first` of the gradient lies at `grad`.
  template <class S, class D>
  void backward_row(int64_t row, const S* grad, int64_t grad_first, int64_t grad_pixel, const A* packed, D* out,
                    int64_t out_pixel, int64_t channels, bool add) const {
    const auto above = rows.reach_inside(row);
    const int64_t grad_row = shape.out_w * grad_pixel;
    for (int64_t phase = 0; phase < std::min(shape.stride_w, shape.w); phase++) {
      const auto r = columns.reach(phase);
      const int64_t last = std::max<int64_t>(0, r.count - 1);  // from there: the columns in rising order
      convolve_row<S, D>({grad + (above.position - grad_first) * grad_row,
                          -above.step * grad_row,
                          grad_pixel,
                          packed + (above.tap * shape.kernel_w + r.tap + last * r.tap_step) * L,
                          above.tap_step * shape.kernel_w * L,
                          -r.tap_step * L,
                          block,
                          nullptr,
                          0,
                          above.count,
                          r.count,
                          r.position - last * r.step,
                          1,
                          r.step,
                          shape.out_w,
                          out + phase * out_pixel,
                          shape.stride_w * out_pixel,
                          (shape.w - phase + shape.stride_w - 1) / shape.stride_w,
                          add,
                          Activation::none},
                         channels);
    }
  }

  template <class S>
  void weight_row(int64_t row, const S* in, int64_t in_first, int64_t in_pixel, const S* grad, int64_t grad_pixel,
                  A* sums, int64_t channels) const {
    const auto window = rows.window(row);
    const int64_t in_row = shape.w * in_pixel;
    correlate_row<S>({in + (window.position - in_first) * in_row, shape.dilation_h * in_row, in_pixel, grad, grad_pixel,
                      sums + window.tap * shape.kernel_w * L, shape.kernel_w * L, block, sums + taps * L, window.count,
                      shape.kernel_w, -shape.left, shape.stride_w, shape.dilation_w, shape.w, shape.out_w},
                     channels);
  }

  // --- in channels_last: the channels of `part` of `parts`, in whole vectors, of which the last may overlap another ---

  bool in_place(std::initializer_list<Map> maps) const {
    bool dense = shape.multiplier == 1 && shape.c >= L;
    for (const Map& map : maps) dense &= map.channel == 1;
    return dense;
  }
  struct Part {
    int64_t first_block, blocks, channel, channels;
  };
  Part part(int64_t index, int64_t parts) const {
    const int64_t all = (shape.c + L - 1) / L, begin = all * index / parts, end = all * (index + 1) / parts;
    const int64_t stop = std::min(shape.c, end * L), channel = std::min(begin * L, shape.c - L);
    return {begin, end - begin, channel, stop - channel};
  }
  void pack(const Part& p, A* to) const {
    for (int64_t b = 0; b < p.blocks; b++) pack(p.channel + std::min(b * L, p.channels - L), L, to + b * block);
  }
  // Calls f(part, packed weights, begin, end) for parts and ranges of [0, items).
  template <class F>
  void for_each_part(int64_t items, int64_t most_parts, int64_t grain, F f) const {
    const int64_t parts = std::clamp<int64_t>(most_parts, 1, (shape.c + L - 1) / L);
    parallel_for(context, parts * items, grain, [&](int64_t begin, int64_t end) {
      Scratch<A> packed(((shape.c + L - 1) / L) * block);
      while (begin < end) {
        const int64_t index = begin / items, stop = std::min(end, (index + 1) * items);
        const Part p = part(index, parts);
        pack(p, packed.data());
        f(p, packed.data(), begin - index * items, stop - index * items);
        begin = stop;
      }
    });
  }

  void forward_in_place(const Map& x, const Map& y) const {
    const int64_t lines = shape.n * shape.out_h, elements = shape.out_w * shape.c;
    for_each_part(lines, lines < 16 * context.threads ? context.threads : 1, std::max<int64_t>(1, 4096 / elements),
                  [&](const Part& p, const A* packed, int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; i++) {
                      const int64_t sample = i / shape.out_h, row = i % shape.out_h;
                      const T* in = static_cast<const T*>(x.data) + sample * x.batch + p.channel;
                      T* out = static_cast<T*>(y.data) + sample * y.batch + row * shape.out_w * y.pixel + p.channel;
                      convolve_row(forward_row(row, in, 0, x.pixel, packed, out, y.pixel), p.channels);
                    }
                  });
  }

  // --- otherwise: groups of L channels, each in scratch memory, a band of rows at a time ------------------------------

  int64_t groups() const { return (shape.c + L - 1) / L; }
  int lanes(int64_t group) const { return static_cast<int>(std::min<int64_t>(L, shape.c - group * L)); }
  template <class E>
  LaneMap<E> lanes_of(const Map& map, int64_t sample, int64_t group) const {
    return {static_cast<E*>(map.data) + sample * map.batch + group * L * map.channel, map.channel, map.pixel,
            lanes(group)};
  }
  // Channel j of those that each of the group's channels becomes.
  template <class E>
  LaneMap<E> results_of(const Map& map, int64_t sample, int64_t group, int64_t j) const {
    const int64_t m = shape.multiplier;
    return {static_cast<E*>(map.data) + sample * map.batch + (group * L * m + j) * map.channel, m * map.channel,
            map.pixel, lanes(group)};
  }
  // How many bands the rows are cut into, for so many elements of scratch memory for each row.
  static int64_t bands(int64_t rows, int64_t row_elements) {
    const int64_t band = std::max<int64_t>(4, kBandBytes / (row_elements * static_cast<int64_t>(sizeof(A))));
    return (rows + band - 1) / band;
  }

  void forward_gathered(const Map& x, const Map& y) const {
    const int64_t cut = bands(shape.out_h, L * (shape.stride_h * shape.w + shape.out_w));
    const int64_t most = (shape.out_h + cut - 1) / cut;
    const auto met = std::min(shape.h, (most - 1) * shape.stride_h + (shape.kernel_h - 1) * shape.dilation_h + 1);
    const int64_t in_size = met * shape.w * L, out_size = most * shape.out_w * L;
    parallel_for(context, shape.n * groups() * cut, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(block + in_size + out_size);
      A *packed = scratch.data(), *in = packed + block, *out = in + in_size;
      for (int64_t item = begin; item < end; item++) {
        const int64_t sample = item / cut / groups(), group = item / cut % groups(), band = item % cut;
        const int64_t first = shape.out_h * band / cut, stop = shape.out_h * (band + 1) / cut;
        const auto [in_first, in_stop] = rows.met_by(first, stop);
        gather_lanes<T>(lanes_of<const T>(x, sample, group), in_first * shape.w, in_stop * shape.w, in);
        for (int64_t j = 0; j < shape.multiplier; j++) {
          pack(group * L * shape.multiplier + j, lanes(group), packed);
          for (int64_t row = first; row < stop; row++)
            convolve_row(forward_row<A, A>(row, in, in_first, L, packed, out + (row - first) * shape.out_w * L, L), L);
          scatter_lanes<T>(out, results_of<T>(y, sample, group, j), first * shape.out_w, stop * shape.out_w);
        }
      }
    });
  }

  // --- the gradients ---------------------------------------------------------------------------------------------------

  // The rows that one piece of work sees to: of the gradient of the map, and of the gradient that came, for the weights.
  struct Band {
    int64_t in_first, in_stop, out_first, out_stop;
  };
  Band band(int64_t index, int64_t cut) const {
    return {shape.h * index / cut, shape.h * (index + 1) / cut, shape.out_h * index / cut,
            shape.out_h * (index + 1) / cut};
  }
  // The sums of a piece of work are added up, from samples that share it and from bands that do not, in an order that
  // only the sizes decide.
  int64_t samples() const { return std::max<int64_t>(1, kChunk / (shape.out_h * shape.out_w)); }
  int64_t chunks() const { return (shape.n + samples() - 1) / samples(); }

  void backward_in_place(const Map& grad, const Map& x, const Map& grad_x, int64_t cut, A* sums) const {
    const int64_t items = chunks() * cut;
    for_each_part(
        items, 4 * context.threads / items, 1, [&](const Part& p, const A* packed, int64_t begin, int64_t end) {
          const auto at = [&](const Map& map, int64_t sample) {
            return static_cast<T*>(map.data) + sample * map.batch + p.channel;
          };
          for (int64_t item = begin; item < end; item++) {
            A* own = sums + (item * groups() + p.first_block) * block;
            std::fill_n(own, p.blocks * block, A(0));
            const Band b = band(item % cut, cut);
            const int64_t first = item / cut * samples(), stop = std::min(shape.n, first + samples());
            for (int64_t sample = first; sample < stop; sample++) {
              const T *g = at(grad, sample), *in = at(x, sample);
              int64_t row = b.out_first;
              const auto weights = [&](int64_t until) {  // while the rows that they need are in a cache
                for (; row < until; row++)
                  weight_row<T>(row, in, 0, x.pixel, g + row * shape.out_w * grad.pixel, grad.pixel, own, p.channels);
              };
              for (int64_t in_row = b.in_first; in_row < b.in_stop; in_row++) {
                backward_row<T, T>(in_row, g, 0, grad.pixel, packed,
                                   at(grad_x, sample) + in_row * shape.w * grad_x.pixel, grad_x.pixel, p.channels,
                                   false);
                weights(std::min(b.out_stop, in_row * shape.out_h / shape.h));
              }
              weights(b.out_stop);
            }
          }
        });
  }

  void backward_gathered(const Map& grad, const Map& x, const Map& grad_x, int64_t cut, A* sums) const {
    struct Rows {
      Band own;
      int64_t out_first, out_stop, in_first, in_stop;  // of the gradient that came and of the map, all that is needed
    };
    const auto rows_of = [&](int64_t index) {
      Rows r;
      r.own = band(index, cut);
      std::tie(r.out_first, r.out_stop) = rows.reached_by(r.own.in_first, r.own.in_stop);
      if (r.out_first >= r.out_stop) r.out_first = r.own.out_first, r.out_stop = r.own.out_stop;
      if (r.own.out_first < r.own.out_stop)
        r.out_first = std::min(r.out_first, r.own.out_first), r.out_stop = std::max(r.out_stop, r.own.out_stop);
      std::tie(r.in_first, r.in_stop) = rows.met_by(r.out_first, r.out_stop);
      return r;
    };
    int64_t outs = 0, ins = 0, owns = 0;
    for (int64_t i = 0; i < cut; i++) {
      const Rows r = rows_of(i);
      outs = std::max(outs, (r.out_stop - r.out_first) * shape.out_w * L);
      ins = std::max(ins, (r.in_stop - r.in_first) * shape.w * L);
      owns = std::max(owns, (r.own.in_stop - r.own.in_first) * shape.w * L);
    }
    const bool active = activation != Activation::none;
    parallel_for(context, chunks() * cut * groups(), 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(block + (active ? 2 : 1) * outs + ins + owns);
      A *packed = scratch.data(), *g = packed + block, *in = g + outs, *gx = in + ins, *inner = gx + owns;
      for (int64_t item = begin; item < end; item++) {
        const int64_t chunk = item / groups() / cut, group = item % groups(), m = shape.multiplier;
        const Rows r = rows_of(item / groups() % cut);
        A* own = sums + item * m * block;
        std::fill_n(own, m * block, A(0));
        for (int64_t sample = chunk * samples(); sample < std::min(shape.n, (chunk + 1) * samples()); sample++) {
          gather_lanes<T>(lanes_of<const T>(x, sample, group), r.in_first * shape.w, r.in_stop * shape.w, in);
          for (int64_t j = 0; j < m; j++) {
            pack(group * L * m + j, lanes(group), packed);
            gather_lanes<T>(results_of<const T>(grad, sample, group, j), r.out_first * shape.out_w,
                            r.out_stop * shape.out_w, g);
            if (active) to_inner_gradient(r.out_first, r.out_stop, in, r.in_first, packed, inner, g);
            for (int64_t row = r.own.in_first; row < r.own.in_stop; row++)
              backward_row<A, A>(row, g, r.out_first, L, packed, gx + (row - r.own.in_first) * shape.w * L, L, L,
                                 j > 0);
            for (int64_t row = r.own.out_first; row < r.own.out_stop; row++)
              weight_row<A>(row, in, r.in_first, L, g + (row - r.out_first) * shape.out_w * L, L, own + j * block, L);
          }
          scatter_lanes<T>(gx, lanes_of<T>(grad_x, sample, group), r.own.in_first * shape.w, r.own.in_stop * shape.w);
        }
      }
    });
  }

  // From the gradient of what the activation made to that of what it was given.
  void to_inner_gradient(int64_t first, int64_t stop, const A* in, int64_t in_first, const A* packed, A* inner,
                         A* grad) const {
    for (int64_t row = first; row < stop; row++) {
      auto r = forward_row<A, A>(row, in, in_first, L, packed, inner + (row - first) * shape.out_w * L, L);
      r.activation = Activation::none;
      convolve_row(r, L);
    }
    for (int64_t i = 0; i < (stop - first) * shape.out_w * L; i += L)
      store(grad + i, activation_backward(load(grad + i), load(inner + i), activation));
  }

  // Adds up the sums of all pieces of work.
  template <class W>
  void finish(int64_t pieces, int64_t blocks, bool overlap, const A* sums, W* grad_weight, W* grad_bias) const {
    const int64_t m = shape.multiplier;
    parallel_for(context, blocks, std::max<int64_t>(1, 16384 / (pieces * block)), [&](int64_t begin, int64_t end) {
      Scratch<A> total(block);
      for (int64_t b = begin; b < end; b++) {
        for (int64_t i = 0; i < block; i += L) {
          Vec<A> sum = load(sums + b * block + i);
          for (int64_t piece = 1; piece < pieces; piece++) sum += load(sums + (piece * blocks + b) * block + i);
          store(total.data() + i, sum);
        }
        // A gradient that is NaN makes all taps NaN, also those that it meets in the padding: so do its products with 0.
        const Vec<A> all = load(total.data() + taps * L), nan = all == all ? Vec<A>{} : all;
        for (int64_t i = 0; i < taps * L; i += L) store(total.data() + i, load(total.data() + i) + nan);
        const int count = overlap ? L : lanes(b / m);
        const int64_t channel = overlap ? std::min(b * L, shape.c - L) : b / m * L * m + b % m;
        scatter_lanes<W>(total.data(), {grad_weight + channel * taps, m * taps, 1, count}, 0, taps);
        if (grad_bias) scatter_lanes<W>(total.data() + taps * L, {grad_bias + channel, m, 0, count}, 0, 1);
      }
    });
  }

  void forward(const Map& x, const Map& y) const {
    if (in_place({x, y}))
      forward_in_place(x, y);
    else if (std::is_same_v<T, float> && planes_fit(shape, x, y))
      convolve_planes(context, shape, reinterpret_cast<const float*>(weight), reinterpret_cast<const float*>(bias),
                      activation, x, y);
    else
      forward_gathered(x, y);
  }
  void backward(const DepthwiseConv2dBackwardArgs& a) const {
    const bool overlap = activation == Activation::none && in_place({a.grad, a.x, a.grad_x});
    const int64_t cut = overlap ? std::clamp<int64_t>(shape.out_h * shape.out_w / kChunk, 1, shape.out_h)
                                : bands(std::max(shape.h, shape.out_h), L * 2 * (shape.w + shape.out_w));
    const int64_t blocks = groups() * shape.multiplier, pieces = chunks() * cut;
    A* sums = static_cast<A*>(context.workspace(context, pieces * blocks * block * sizeof(A)));
    if (overlap)
      backward_in_place(a.grad, a.x, a.grad_x, cut, sums);
    else
      backward_gathered(a.grad, a.x, a.grad_x, cut, sums);
    const auto finish_as = [&]<class W>(W) {
      finish(pieces, blocks, overlap, sums, static_cast<W*>(a.grad_weight), static_cast<W*>(a.grad_bias));
    };
    if (a.weights.dtype == Dtype::f32 && sizeof(A) == 4)
      finish_as(A{});
    else
      finish_as(T{});
  }
};

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_depthwise_conv2d(const convblocks::Context& context,
                                        const convblocks::DepthwiseConv2dArgs& args) {
  using namespace convblocks::cpu;
  return dispatch(args.dtype,
                  [&]<class T>(T) { Depthwise<T>(context, args.shape, args.weights).forward(args.x, args.y); });
}

const char* convblocks_depthwise_conv2d_backward(const convblocks::Context& context,
                                                 const convblocks::DepthwiseConv2dBackwardArgs& args) {
  using namespace convblocks::cpu;
  return dispatch(args.dtype, [&]<class T>(T) { Depthwise<T>(context, args.shape, args.weights).backward(args); });
}
