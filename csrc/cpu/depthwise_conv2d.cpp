// The depthwise convolution on the CPU, and of each plane of its result the sum.
#include "depthwise.h"
#include "depthwise_halves.h"
#include "depthwise_planes.h"
#include "dispatch.h"

namespace convblocks::cpu {
namespace {

template <class T>
struct Forward : Depthwise<T> {
  CONVBLOCKS_DEPTHWISE(T)

  // A piece of work is a row; with sums, which are added up from those of the pieces, a band of rows.
  void forward_in_place(const Map& x, const Map& y, int64_t cut, A* sums) const {
    const int64_t items = shape.n * cut, elements = shape.out_w * shape.c;
    const bool fetch = fetches(1);
    for_each_part(items, parts(items < 16 * context.threads ? context.threads : 1),
                  std::max<int64_t>(1, 4096 / elements), 0, [&](const Part& p, const A* packed, A* memory, int64_t i) {
                    const int64_t sample = i / cut, band = i % cut;
                    const T* in = static_cast<const T*>(x.data) + sample * x.batch + p.channel;
                    T* out = static_cast<T*>(y.data) + sample * y.batch + p.channel;
                    A* own = sums ? sums + (i * groups() + p.first_block) * L : nullptr;
                    if (sums) std::fill_n(own, p.blocks * L, A(0));
                    const bool later = sizeof(T) >= 4 && !sums && takes_call(activation);
                    for (int64_t row = shape.out_h * band / cut; row < shape.out_h * (band + 1) / cut; row++) {
                      T* const to = out + row * shape.out_w * y.pixel;
                      auto r = forward_row(row, in, 0, x.pixel, packed, to, y.pixel);
                      if (later) r.activation = Activation::none;
                      r.sums = sums ? memory : nullptr;
                      if (fetch) r.fetch = new_rows(r.rows, true);
                      convolve_with_sums(r, p.channels, own, p.blocks);
                      if (later) activate_row(to, y.pixel, p.channels);
                    }
                  });
  }
  template <class D>
  __attribute__((noinline)) void activate_row(D* row, int64_t pixel, int64_t channels) const {
    const int64_t rows = pixel == channels ? 1 : shape.out_w, size = shape.out_w * channels / rows;
    for (int64_t i = 0; i < rows; i++, row += pixel) {
      for_lanes<D>(size, [row, activation = activation](int64_t i, auto lanes)
                             CONVBLOCKS_LOOP { store(row + i, activate(load(row + i, lanes), activation), lanes); });
    }
  }
  // A row's own sums are added to `sums` when they are whole: sums of many terms are built from sums of few.
  template <class S, class D>
  static void convolve_with_sums(const Row<S, D>& row, int64_t channels, A* sums, int64_t blocks) {
    if (row.sums) std::fill_n(row.sums, blocks * L, A(0));
    convolve_row(row, channels);
    for (int64_t i = 0; row.sums && i < blocks * L; i += L) store(sums + i, load(sums + i) + load(row.sums + i));
  }
  // How many pieces the sums of a plane come from.
  int64_t sum_bands() const { return std::clamp<int64_t>(shape.out_h * shape.out_w / kChunk, 1, shape.out_h); }

  int64_t gathered_bands() const { return bands(shape.out_h, L * (shape.stride_h * shape.w + shape.out_w)); }

  void forward_gathered(const Map& x, const Map& y, int64_t cut, A* sums) const {
    const int64_t most = (shape.out_h + cut - 1) / cut;
    const auto met = std::min(shape.h, (most - 1) * shape.stride_h + (shape.kernel_h - 1) * shape.dilation_h + 1);
    const int64_t in_size = met * shape.w * L, out_size = most * shape.out_w * L;
    parallel_for(context, shape.n * groups() * cut, 1, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(block + in_size + out_size + L);
      A *packed = scratch.data(), *in = packed + block, *out = in + in_size, *row_sums = out + out_size;
      for (int64_t item = begin; item < end; item++) {
        const int64_t sample = item / cut / groups(), group = item / cut % groups(), band = item % cut;
        const int64_t first = shape.out_h * band / cut, stop = shape.out_h * (band + 1) / cut;
        const auto [in_first, in_stop] = rows.met_by(first, stop);
        gather_lanes<T>(this->template lanes_of<const T>(x, sample, group), in_first * shape.w, in_stop * shape.w, in);
        for (int64_t j = 0; j < shape.multiplier; j++) {
          pack(group * L * shape.multiplier + j, lanes(group), packed);
          A* own = sums ? sums + (((sample * cut + band) * groups() + group) * shape.multiplier + j) * L : nullptr;
          if (sums) std::fill_n(own, L, A(0));
          for (int64_t row = first; row < stop; row++) {
            A* const to = out + (row - first) * shape.out_w * L;
            auto r = forward_row(row, in, in_first, L, packed, to, L);
            const bool later = !sums && takes_call(activation);
            if (later) r.activation = Activation::none;
            r.sums = sums ? row_sums : nullptr;
            convolve_with_sums(r, L, own, 1);
            if (later) activate_row(to, L, L);
          }
          scatter_lanes<T>(out, this->template results_of<T>(y, sample, group, j), first * shape.out_w,
                           stop * shape.out_w);
        }
      }
    });
  }

  // Adds up the sums of the bands of each sample.
  void add_bands(int64_t cut, bool overlap, const A* bands, A* sums) const {
    const int64_t blocks = groups() * shape.multiplier, channels = shape.c * shape.multiplier;
    for (int64_t i = 0; i < shape.n * blocks; i++) {
      const int64_t sample = i / blocks, b = i % blocks;
      alignas(64) A total[L];
      Vec<A> sum{};
      for (int64_t band = 0; band < cut; band++) sum += load(bands + ((sample * cut + band) * blocks + b) * L);
      store(total, sum);
      const auto [channel, count] = channels_of(b, overlap);
      scatter_lanes<A>(total, {sums + sample * channels + channel, shape.multiplier, 0, count}, 0, 1);
    }
  }

  void run(const Map& x, const Map& y, void* to) const {
    A* sums = static_cast<A*>(to);
    const bool overlap = in_place({x, y});
    const bool slow = shape.out_w <= 8 && takes_call(activation);  // as measured
    if constexpr (std::is_same_v<T, float>) {
      if (!overlap && !slow && planes_fit(shape, x, y) && has_finite_weights(shape, weight))
        return convolve_planes(context, shape, weight, bias, activation, x, y, sums);
    } else if constexpr (sizeof(T) == 2) {
      if (!overlap && !slow && halves_fit(shape, x, y) && has_finite_weights(shape, weight))
        return convolve_halves<T>(context, shape, weight, bias, activation, x, y, sums);
    }
    const int64_t cut = !overlap ? gathered_bands() : sums ? sum_bands() : shape.out_h;
    const int64_t blocks = groups() * shape.multiplier;
    A* bands = sums ? static_cast<A*>(context.workspace(context, shape.n * cut * blocks * L * sizeof(A))) : nullptr;
    overlap ? forward_in_place(x, y, cut, bands) : forward_gathered(x, y, cut, bands);
    if (sums) add_bands(cut, overlap, bands, sums);
  }
};

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_depthwise_conv2d(const convblocks::Context& context,
                                        const convblocks::DepthwiseConv2dArgs& args) {
  using namespace convblocks::cpu;
  return dispatch(args.dtype,
                  [&]<class T>(T) { Forward<T>(context, args.shape, args.weights).run(args.x, args.y, args.sums); });
}
