// What the operations with a number for each pixel share: a sample in tiles of channels x pixels. A tile leaves the sums
// over its channels and those over its pixels in workspace; they are added up in an order that depends on the sizes only.
#pragma once
#include <limits>

#include "reduce.h"

namespace convblocks::cpu {

struct Tile {
  int64_t chunk, first_channel, channels;
  int64_t block, first_pixel, pixels;
};

// Planes are cut into stretches that the first cache holds; the channels of a pixel stay together.
struct Tiles {
  int64_t c, hw, chunk_size, block_size, chunks, blocks;

  Tiles(int64_t channels, int64_t pixels, bool planes)
      : c(channels), hw(pixels), chunk_size(planes ? 64 : std::max<int64_t>(c, 1)), block_size(planes ? 512 : 64),
        chunks((c + chunk_size - 1) / chunk_size), blocks((hw + block_size - 1) / block_size) {}

  template <class F>
  void each(const Team& team, F f) const {
    team.split(chunks * blocks, chunk_size * block_size, [=, this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        Tile t{i / blocks, 0, 0, i % blocks, 0, 0};
        t.first_channel = t.chunk * chunk_size;
        t.channels = std::min(chunk_size, c - t.first_channel);
        t.first_pixel = t.block * block_size;
        t.pixels = std::min(block_size, hw - t.first_pixel);
        f(t);
      }
      finish_stores();
    });
  }
};

// Sums of `count` parts, `n` numbers each, into `out`.
template <class A>
void add_parts(const A* parts, int64_t count, int64_t n, A* out) {
  for_lanes<A>(n, [=](int64_t i, auto lanes) {
    Vec<A> total{};
    for (int64_t part = 0; part < count; part++) total += load(parts + part * n + i, lanes);
    store(out + i, total, lanes);
  });
}

}  // namespace convblocks::cpu
