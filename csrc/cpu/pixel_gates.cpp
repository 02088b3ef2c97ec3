// Gates of the pixels from few planes on the CPU: a band of lines is copied with its padding, and convolved with pixels in
// the lanes; the sums of a few lines and columns stay in registers.
#include "../pixel_gates.h"

#include <algorithm>

#include "dispatch.h"
#include "gate.h"
#include "reduce.h"
#include "team.h"

namespace convblocks::cpu {
namespace {

constexpr int kLines = 4;                 // of the output, side by side
constexpr int64_t kBandBytes = 64 << 10;  // of the copy

template <class A>
struct Band {
  static constexpr int L = kLanes<A>;
  const PixelGatesArgs& a;
  const Vec<A>* taps;  // (planes, kernel, kernel), each in all lanes
  A shift;
  int64_t lines, width;  // of the copy: of a plane, and elements of a line
  A* copy;

  // What lines [first, first + count) of the output meet.
  void fill(int64_t sample, int64_t first, int64_t count) const {
    const int64_t pad = a.kernel.size / 2;
    const A* const x = static_cast<const A*>(a.x.data) + sample * a.x.batch;
    for (int64_t p = 0; p < a.planes; p++) {
      A* to = copy + p * lines * width;
      for (int64_t h = first - pad; h < first + count + pad; h++, to += width) {
        std::fill_n(to, width, A(0));
        if (h < 0 || h >= a.h) continue;
        const A* const from = x + p * a.x.channel + h * a.w * a.x.pixel;
        for (int64_t w = 0; w < a.w; w++) to[pad + w] = from[w * a.x.pixel];
      }
    }
  }

  // R lines and V vectors of columns of the output. Each line of the input is met by those from `low` to `high`.
  template <int R, int V>
  void tile(int64_t line, int64_t column, A* y, int64_t columns) const {
    const int64_t k = a.kernel.size;
    Vec<A> acc[R][V]{};
    const Vec<A>* of_plane = taps;
    for (int64_t p = 0; p < a.planes; p++, of_plane += k * k) {
      const A* in = copy + (p * lines + line) * width + column;
      for (int64_t i = 0; i < R - 1 + k; i++, in += width) {
        const int low = static_cast<int>(std::max<int64_t>(0, i - k + 1)),
                  high = static_cast<int>(std::min<int64_t>(R - 1, i));
        const auto meet = [&]<int LOW, int HIGH>(std::integer_sequence<int, LOW, HIGH>) CONVBLOCKS_LOOP {
          for (int64_t j = 0; j < k; j++) {
            Vec<A> x[V];
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) x[v] = load(in + j + v * L);
#pragma GCC unroll 4
            for (int r = LOW; r <= HIGH; r++) {
              const Vec<A> tap = of_plane[(i - r) * k + j];
#pragma GCC unroll 2
              for (int v = 0; v < V; v++) acc[r][v] += x[v] * tap;
            }
          }
        };
        [&]<int... C>(std::integer_sequence<int, C...>) CONVBLOCKS_LOOP {
          ((low == C / R && high == C % R ? meet(std::integer_sequence<int, C / R, C % R>{}) : void()), ...);
        }(std::make_integer_sequence<int, R * R>{});
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        const int count = static_cast<int>(std::clamp<int64_t>(columns - v * L, 0, L));
        store(y + r * a.w + v * L, apply_gate(acc[r][v] + shift, a.kernel.gate), count);
      }
    }
  }

  template <int R>
  void of_lines(int64_t line, A* y) const {
    int64_t column = 0;
    for (; a.w - column > L; column += 2 * L) tile<R, 2>(line, column, y + column, a.w - column);
    if (column < a.w) tile<R, 1>(line, column, y + column, a.w - column);
  }

  void run(int64_t sample, int64_t first, int64_t count) const {
    fill(sample, first, count);
    A* y = static_cast<A*>(a.y) + (sample * a.h + first) * a.w;
    int64_t line = 0;
    for (; line + kLines <= count; line += kLines) of_lines<kLines>(line, y + line * a.w);
    switch (count - line) {
      case 3: return of_lines<3>(line, y + line * a.w);
      case 2: return of_lines<2>(line, y + line * a.w);
      case 1: return of_lines<1>(line, y + line * a.w);
    }
  }
};

template <class A>
void forward(const Context& context, const PixelGatesArgs& a) {
  constexpr int L = kLanes<A>;
  const int64_t k = a.kernel.size, size = a.planes * k * k, width = (a.w + 2 * L - 1) / (2 * L) * 2 * L + k - 1;
  Vec<A>* taps = static_cast<Vec<A>*>(context.workspace(context, size * sizeof(Vec<A>)));
  const A scale = a.kernel.scale ? *static_cast<const A*>(a.kernel.scale) : A(1);
  for (int64_t i = 0; i < size; i++) taps[i] = splat<Vec<A>>(static_cast<const A*>(a.kernel.weight)[i] * scale);
  const int64_t fits = kBandBytes / (a.planes * width * int64_t(sizeof(A))) - k + 1;
  const int64_t shared = a.n % context.threads ? (a.h + context.threads - 1) / context.threads : a.h;
  const int64_t most = std::clamp<int64_t>(std::min(fits, shared) / kLines * kLines, kLines, a.h + kLines - 1);
  const int64_t bands = (a.h + most - 1) / most, grain = std::max<int64_t>(1, 2048 / (most * a.w));
  parallel_for(context, a.n * bands, grain, [&](int64_t begin, int64_t end) {
    const int64_t lines = most + k - 1;
    const Scratch<A> copy(a.planes * lines * width);
    const A shift = a.kernel.shift ? *static_cast<const A*>(a.kernel.shift) : A(0);
    const Band<A> band{a, taps, shift, lines, width, copy.data()};
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % bands * most;
      band.run(i / bands, first, std::min(most, a.h - first));
    }
  });
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_pixel_gates(const convblocks::Context& context, const convblocks::PixelGatesArgs& args) {
  using namespace convblocks;
  return cpu::dispatch(args.dtype, [&]<class T>(T) { cpu::forward<cpu::Acc<T>>(context, args); });
}
