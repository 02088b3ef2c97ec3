from __future__ import annotations

from typing import TypeVar

from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convblocks.blocks.batch_norm_act import BatchNormAct2d

M = TypeVar("M", bound=nn.Module)


class SyncBatchNormAct2d(BatchNormAct2d, nn.SyncBatchNorm):
    """``BatchNormAct2d`` whose statistics in training are those of all processes, as ``nn.SyncBatchNorm`` has them.

    Made by ``convert_sync_batchnorm``. Torch's own conversion would take residual and activation away from it, too.
    """


class _SyncBatchNorm1d(nn.BatchNorm1d, nn.SyncBatchNorm):
    pass


class SyncBatchNorm2d(nn.BatchNorm2d, nn.SyncBatchNorm):
    """``nn.BatchNorm2d`` with the statistics of all processes. Made by ``convert_sync_batchnorm``."""


class _SyncBatchNorm3d(nn.BatchNorm3d, nn.SyncBatchNorm):
    pass


_SYNCHRONIZED: dict[type, type[nn.SyncBatchNorm]] = {
    BatchNormAct2d: SyncBatchNormAct2d,
    nn.BatchNorm1d: _SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: _SyncBatchNorm3d,
}


def convert_sync_batchnorm(model: M, process_group: distributed.ProcessGroup | None = None) -> M:
    """Synchronizes the batch norms of a model across processes, in place; they keep their activations and residuals.

    As ``nn.SyncBatchNorm.convert_sync_batchnorm``, which would take these away. Parameters, buffers, their names and
    hooks stay, so an optimizer may be there already. Wrap the result in ``DistributedDataParallel``. A second call
    gives the norms another process group. ``accelerate(fold_bn=True)`` leaves such norms as they are.

    Args:
        model: any module; norms of ``convblocks`` and of torch in it are converted.
        process_group: the processes that share statistics; None: all.

    Returns:
        The model.

    Raises:
        TypeError: a batch norm of another kind; nothing is converted then.

    Example:
        >>> model = convblocks.convert_sync_batchnorm(convblocks.models.resnet18())
        >>> y = model(torch.randn(2, 3, 64, 64))
    """
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    for name, norm in norms:
        if type(norm) not in _SYNCHRONIZED and not isinstance(norm, nn.SyncBatchNorm):
            kind = f"{type(norm).__module__}.{type(norm).__qualname__}"
            words = "accelerated ones: revert first; timm's: timm.layers.convert_sync_batchnorm"
            raise TypeError(
                f"convert_sync_batchnorm: expected batch norms of torch or convblocks, got {kind} as {name!r} ({words})"
            )
    for _, norm in norms:
        norm.__class__ = _SYNCHRONIZED.get(type(norm), type(norm))
        if type(norm) in _SYNCHRONIZED.values():
            vars(norm).update(process_group=process_group)
    return model
