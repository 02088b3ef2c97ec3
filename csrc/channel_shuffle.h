// Channel shuffle: y[j * groups + i] = x[i * c / groups + j], for i < groups and j < c / groups: concat_shuffle of one map.
// Its gradient, and its inverse, is the shuffle with c / groups groups.
#pragma once
#include "concat_shuffle.h"

CONVBLOCKS_KERNEL const char* convblocks_channel_shuffle(const convblocks::Context&, const convblocks::ShuffleArgs&);
