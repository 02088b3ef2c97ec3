"""Batch norms whose statistics are shared by processes: torch's computation, with what follows the norm in ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import distributed, nn

import convblocks
from convblocks.models import create

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "DepthwiseSeparableConv": lambda: convblocks.DepthwiseSeparableConv(3, 8),
    "ASPP": lambda: convblocks.ASPP(3, (2,), 8, separable=True),
    "ParNetBlock": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), convblocks.ParNetBlock(8)),
    **{
        name: partial(create, name, num_classes=5)
        for name in (
            *("resnet18", "vgg11_bn", "densenet121", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "ghostnet"),
            *("cbam_resnet18", "inception_resnet_v1", "inception_v3", "shufflenet_v1", "shufflenet_v2_x0_5"),
            *("fasternet_t0", "xception", "darknet53", "parnet_s", "res2net50_26w_4s", "unet", "efficientnet_v2_s"),
        )
    },
}


@pytest.mark.parametrize("name", BLOCKS)
def test_same_numbers_keys_and_parameters(name: str) -> None:
    model = BLOCKS[name]().double()
    converted = copy.deepcopy(model)
    parameters = list(converted.parameters())
    assert convblocks.convert_sync_batchnorm(converted) is converted
    assert list(map(id, converted.parameters())) == list(map(id, parameters))
    assert converted.state_dict().keys() == model.state_dict().keys()
    norms = [m for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    size = max(64, getattr(model, "least_size", 0))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for mode in (True, False):
        torch.manual_seed(0)
        expected = model.train(mode)(x)
        torch.manual_seed(0)
        y = converted.train(mode)(x)
        torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.square().sum(), list(converted.parameters()))
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    for g, e in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(g, e)


def test_statistics_are_shared_in_training_only() -> None:
    """Torch shares them between GPUs only, and says so: the call reaches it."""
    block = nn.Sequential(convblocks.VGGBlock(4, 8, norm=True), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    convblocks.convert_sync_batchnorm(block)
    x = torch.randn(2, 4, 8, 8)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        with pytest.raises(ValueError, match=r"SyncBatchNorm expected input tensor to be on"):
            block(x)
        block.eval()(x)
    finally:
        distributed.destroy_process_group()


def test_of_other_dimensions_and_twice() -> None:
    group: Any = object()
    model = nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm3d(4), "c": convblocks.BatchNormAct2d(4, "relu")})
    convblocks.convert_sync_batchnorm(convblocks.convert_sync_batchnorm(model), group)
    assert all(isinstance(m, nn.SyncBatchNorm) and m.process_group is group for m in model.values())
    assert (model["c"](torch.randn(2, 4, 3, 3)) >= 0).all()
    assert "activation=relu" in repr(model["c"])


def test_norms_that_would_lose_something_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), timm.layers.BatchNormAct2d(4))
    words = r"^convert_sync_batchnorm: expected batch norms of torch or convblocks, got timm\S*BatchNormAct2d as '1' "
    with pytest.raises(TypeError, match=words):
        convblocks.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
