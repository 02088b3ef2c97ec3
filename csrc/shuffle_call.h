// The call of the kernel that concat_shuffle and channel_shuffle share.
#pragma once
#include <c10/util/SmallVector.h>

#include "concat_shuffle.h"
#include "op.h"

namespace convblocks {

// The whole from the parts, or back.
template <class Kernel>
void call_shuffle(const Kernel& kernel, const Tensor& whole, at::TensorList parts, c10::SymInt groups, bool back) {
  const auto format = walk_format(whole);
  c10::SmallVector<Walk, 4> walks;  // which own what they had to copy
  c10::SmallVector<ShufflePart, 4> maps;
  const auto map_of = [&](const Tensor& t) { return walks.emplace_back(t, format).map; };
  const int64_t pixels = whole.size(2) * whole.size(3);
  const Map map = map_of(whole);
  bool channels_last = format == at::MemoryFormat::ChannelsLast || (pixels == 1 && map.channel == 1);
  for (const Tensor& t : parts) {
    if (t.size(1)) maps.push_back({map_of(t), t.size(1)});
  }
  for (const ShufflePart& part : maps) channels_last &= part.map.channel == 1 || part.channels == 1;
  kernel(ShuffleArgs{dtype_of(whole), channels_last, back, whole.size(0), whole.size(1), pixels, groups.expect_int(),
                     map, maps.data(), static_cast<int64_t>(maps.size())});
  const auto finish = [](const Walk& walk, const Tensor& t) {
    if (!walk.tensor.is_same(t)) t.copy_(walk.tensor);
  };
  if (!back) return finish(walks[0], whole);
  size_t i = 1;
  for (const Tensor& t : parts) {
    if (t.size(1)) finish(walks[i++], t);
  }
}

}  // namespace convblocks
