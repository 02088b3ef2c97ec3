// The gradients of the depthwise convolution on the CPU: in one pass with channels in the lanes, in two, of each plane or
// of all, with pixels in them.
#include "depthwise.h"
#include "depthwise_planes_backward.h"
#include "dispatch.h"

namespace convblocks::cpu {
namespace {

template <class T>
struct Backward : Depthwise<T> {
  CONVBLOCKS_DEPTHWISE(T)

  // A row of the gradient of the map, of `channels`; row `grad_first` of the gradient lies at `grad`.
  template <class S, class D>
  void backward_row(int64_t row, const S* grad, int64_t grad_first, int64_t grad_pixel, const A* packed, D* out,
                    int64_t out_pixel, int64_t channels, bool add, Fetch fetch = {}) const {
    const auto above = rows.reach_inside(row);
    const int64_t grad_row = shape.out_w * grad_pixel;
    for (int64_t phase = 0; phase < std::min(shape.stride_w, shape.w); phase++) {
      const auto r = columns.reach(phase);
      const int64_t last = std::max<int64_t>(0, r.count - 1);  // from there: the columns in rising order
      fetch.end = phase == 0 ? std::min(fetch.end, above.count) : 0;
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
                          Activation::none,
                          fetch},
                         channels);
    }
  }

  template <class S>
  void weight_row(int64_t row, const S* in, int64_t in_first, int64_t in_pixel, const S* grad, int64_t grad_pixel,
                  A* sums, int64_t channels, int64_t rows_ahead = 0) const {
    const auto window = rows.window(row);
    const int64_t in_row = shape.w * in_pixel;
    correlate_row<S>({in + (window.position - in_first) * in_row, shape.dilation_h * in_row, in_pixel, grad, grad_pixel,
                      sums + window.tap * shape.kernel_w * L, shape.kernel_w * L, block, sums + taps * L, window.count,
                      shape.kernel_w, -shape.left, shape.stride_w, shape.dilation_w, shape.w, shape.out_w, rows_ahead},
                     channels);
  }

  // The rows that one piece of work sees to: of the gradient of the map, and of the gradient that came, for the weights.
  struct Band {
    int64_t in_first, in_stop, out_first, out_stop;
  };
  Band band(int64_t index, int64_t cut) const {
    return {shape.h * index / cut, shape.h * (index + 1) / cut, shape.out_h * index / cut,
            shape.out_h * (index + 1) / cut};
  }
  // And all rows that these need, of the gradient that came and of the map.
  struct Needed {
    Band own;
    int64_t out_first, out_stop, in_first, in_stop;
  };
  Needed needed(int64_t index, int64_t cut) const {
    Needed r;
    r.own = band(index, cut);
    std::tie(r.out_first, r.out_stop) = rows.reached_by(r.own.in_first, r.own.in_stop);
    if (r.out_first >= r.out_stop) r.out_first = r.own.out_first, r.out_stop = r.own.out_stop;
    if (r.own.out_first < r.own.out_stop)
      r.out_first = std::min(r.out_first, r.own.out_first), r.out_stop = std::max(r.out_stop, r.own.out_stop);
    std::tie(r.in_first, r.in_stop) = rows.met_by(r.out_first, r.out_stop);
    return r;
  }
  // The sums of a piece of work are added up, from samples that share it and from bands that do not, in an order that
  // only the sizes decide.
  int64_t samples() const {
    const int64_t most = std::max<int64_t>(1, kChunk / (shape.out_h * shape.out_w)), some = (shape.n + most - 1) / most;
    return (shape.n + some - 1) / some;
  }
  int64_t chunks() const { return (shape.n + samples() - 1) / samples(); }

  void backward_in_place(const Map& grad, const Map& x, const Map& grad_x, int64_t cut, A* sums) const {
    const int64_t items = chunks() * cut;
    // With an activation both maps are read before, and what becomes of them is in a near cache.
    const bool fetch = fetches(2), active = activation != Activation::none, fetch_read = fetch && !active;
    const int64_t ahead = fetch_read && shape.stride_h <= shape.kernel_h && shape.dilation_h == 1 ? shape.stride_h : 0;
    int64_t inner_pixels = 0;
    for (int64_t i = 0; active && i < cut; i++) {
      const Needed r = needed(i, cut);
      inner_pixels = std::max(inner_pixels, (r.out_stop - r.out_first) * shape.out_w);
    }
    const int64_t by_room = inner_pixels * shape.c * int64_t(sizeof(A)) / kBandBytes + 1;
    const int64_t cut_channels = parts(std::max(4 * context.threads / items, active ? by_room : 1));
    const int64_t most_blocks = (groups() + cut_channels - 1) / cut_channels;
    for_each_part(
        items, cut_channels, 1, inner_pixels * most_blocks * L,
        [&](const Part& p, const A* packed, A* inner, int64_t item) {
          const auto at = [&](const Map& map, int64_t sample) {
            return static_cast<T*>(map.data) + sample * map.batch + p.channel;
          };
          A* own = sums + (item * groups() + p.first_block) * block;
          std::fill_n(own, p.blocks * block, A(0));
          const Needed r = needed(item % cut, cut);
          const Band b = r.own;
          const int64_t first = item / cut * samples(), stop = std::min(shape.n, first + samples());
          for (int64_t sample = first; sample < stop; sample++) {
            const T* const in = at(x, sample);
            const auto gradients = [&](const auto* g, int64_t g_first, int64_t g_pixel) {
              int64_t row = b.out_first;
              const auto weights = [&](int64_t until) {  // while the rows that they need are in a cache
                for (; row < until; row++)
                  weight_row(row, in, 0, x.pixel, g + (row - g_first) * shape.out_w * g_pixel, g_pixel, own, p.channels,
                             ahead);
              };
              for (int64_t in_row = b.in_first; in_row < b.in_stop; in_row++) {
                backward_row(in_row, g, g_first, g_pixel, packed, at(grad_x, sample) + in_row * shape.w * grad_x.pixel,
                             grad_x.pixel, p.channels, false, {fetch, 0, fetch_read ? 1 : 0});
                weights(std::min(b.out_stop, in_row * shape.out_h / shape.h));
              }
              weights(b.out_stop);
            };
            if constexpr (std::is_same_v<T, A>) {
              if (active) {
                for (int64_t row = r.out_first; row < r.out_stop; row++) {
                  A* const to = inner + (row - r.out_first) * shape.out_w * p.channels;
                  to_inner_gradient(row, in, x.pixel, 0, packed, at(grad, sample) + row * shape.out_w * grad.pixel,
                                    grad.pixel, to, p.channels, fetch);
                }
                gradients(inner, r.out_first, p.channels);
                continue;
              }
            }
            gradients(at(grad, sample), 0, grad.pixel);
          }
        });
  }

  void backward_gathered(const Map& grad, const Map& x, const Map& grad_x, int64_t cut, A* sums) const {
    int64_t outs = 0, ins = 0, owns = 0;
    for (int64_t i = 0; i < cut; i++) {
      const Needed r = needed(i, cut);
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
        const Needed r = needed(item / groups() % cut, cut);
        A* own = sums + item * m * block;
        std::fill_n(own, m * block, A(0));
        for (int64_t sample = chunk * samples(); sample < std::min(shape.n, (chunk + 1) * samples()); sample++) {
          gather_lanes<T>(this->template lanes_of<const T>(x, sample, group), r.in_first * shape.w, r.in_stop * shape.w,
                          in);
          for (int64_t j = 0; j < m; j++) {
            pack(group * L * m + j, lanes(group), packed);
            gather_lanes<T>(this->template results_of<const T>(grad, sample, group, j), r.out_first * shape.out_w,
                            r.out_stop * shape.out_w, g);
            for (int64_t row = r.out_first; active && row < r.out_stop; row++) {
              const int64_t at = (row - r.out_first) * shape.out_w * L;
              to_inner_gradient(row, in, L, r.in_first, packed, g + at, L, inner + at, L);
            }
            const A* const by = active ? inner : g;
            for (int64_t row = r.own.in_first; row < r.own.in_stop; row++)
              backward_row(row, by, r.out_first, L, packed, gx + (row - r.own.in_first) * shape.w * L, L, L, j > 0);
            for (int64_t row = r.own.out_first; row < r.own.out_stop; row++)
              weight_row(row, in, r.in_first, L, by + (row - r.out_first) * shape.out_w * L, L, own + j * block, L);
          }
          scatter_lanes<T>(gx, this->template lanes_of<T>(grad_x, sample, group), r.own.in_first * shape.w,
                           r.own.in_stop * shape.w);
        }
      }
    });
  }

  // A row, from the gradient of what the activation made to that of what it was given.
  void to_inner_gradient(int64_t row, const A* in, int64_t in_pixel, int64_t in_first, const A* packed, const A* grad,
                         int64_t grad_pixel, A* to, int64_t channels, bool fetch = false) const {
    auto r = forward_row(row, in, in_first, in_pixel, packed, to, channels);
    r.activation = Activation::none;
    if (fetch) r.fetch = new_rows(r.rows, false);
    convolve_row(r, channels);
    const int64_t rows = grad_pixel == channels ? 1 : shape.out_w, size = shape.out_w * channels / rows;
    for (int64_t i = 0; i < rows; i++, to += channels, grad += grad_pixel) {
      for_lanes<A>(size, [to, grad, activation = activation](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        store(to + i, activation_backward(load(grad + i, lanes), load(to + i, lanes), activation), lanes);
      });
    }
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
        const auto [channel, count] = channels_of(b, overlap);
        scatter_lanes<W>(total.data(), {grad_weight + channel * taps, m * taps, 1, count}, 0, taps);
        if (grad_bias) scatter_lanes<W>(total.data() + taps * L, {grad_bias + channel, m, 0, count}, 0, 1);
      }
    });
  }

  // With pixels in the lanes, if that serves: not where the gradient is not finite, or its sums, as it meets the zeros of
  // masked lanes.
  bool run_on_planes([[maybe_unused]] const DepthwiseConv2dBackwardArgs& a) const {
#if defined(__AVX2__)
    if constexpr (std::is_same_v<T, float>) {
      const int64_t pixels = shape.out_h * shape.out_w;
      const auto finished = [&](int64_t pieces, auto compute) {
        const int64_t blocks = groups();
        A* sums = static_cast<A*>(context.workspace(context, pieces * blocks * block * sizeof(A)));
        compute(sums);
        for (int64_t i = 0; i < pieces * blocks; i++) {
          const Vec<A> totals = load(sums + i * block + taps * L, lanes(i % blocks));
          if (!std::isfinite(sum_lanes(totals * 0))) return false;
        }
        finish(pieces, blocks, false, sums, static_cast<A*>(a.grad_weight), static_cast<A*>(a.grad_bias));
        return true;
      };
      if (activation == Activation::none && few_planes_fit(shape, weight, a.grad, a.x, a.grad_x)) {
        const int64_t cut = std::clamp<int64_t>(pixels / kPlanePiece, 1, shape.out_h);
        return finished(shape.n * cut, [&](A* sums) {
          correlate_planes(context, shape, a.grad, a.x, cut, sums);
          convolve_reversed(context, shape, weight, a.grad, a.grad_x);
        });
      }
      if (each_plane_fits(shape, weight, a.grad, a.x, a.grad_x)) {
        const int64_t samples = std::clamp<int64_t>(kChunk / pixels, 1, shape.n);
        return finished((shape.n + samples - 1) / samples, [&](A* sums) {
          planes_backward(context, shape, weight, bias, activation, a.grad, a.x, a.grad_x, samples, sums);
        });
      }
    }
#endif
    return false;
  }

  void run(const DepthwiseConv2dBackwardArgs& a) const {
    if (run_on_planes(a)) return;
    const bool kept = activation == Activation::none || std::is_same_v<T, A>;  // what is made of the gradient
    const bool overlap = kept && in_place({a.grad, a.x, a.grad_x});
    // Of few samples, so many that threads share rows and not the channels of each pixel.
    const int64_t few = std::min<int64_t>(8 / shape.n, shape.out_h / (3 * shape.kernel_h));
    const int64_t cut = overlap ? std::clamp<int64_t>(std::max(shape.out_h * shape.out_w / kChunk, few), 1, shape.out_h)
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

const char* convblocks_depthwise_conv2d_backward(const convblocks::Context& context,
                                                 const convblocks::DepthwiseConv2dBackwardArgs& args) {
  using namespace convblocks::cpu;
  return dispatch(args.dtype, [&]<class T>(T) { Backward<T>(context, args.shape, args.weights).run(args); });
}
