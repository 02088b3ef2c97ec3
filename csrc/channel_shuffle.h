// Channel shuffle: y[j * groups + i] = x[i * c / groups + j], for i < groups and j < c / groups. Its gradient, and its
// inverse, is the shuffle with c / groups groups.
#pragma once
#include "kernel.h"

namespace convblocks {

struct ChannelShuffleArgs {
  Dtype dtype;
  int64_t n, c, hw, groups;
  Map x;
  Map y;  // x's layout, dense
};

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_channel_shuffle(const convblocks::Context&,
                                                         const convblocks::ChannelShuffleArgs&);
