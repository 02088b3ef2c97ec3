"""One record per operation, from which the tests, the benchmark, the self-test and the GPU-code proofs are made.

None of them knows an operation by name: a new operation brings its record, in a file of its own, and is covered by all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int, int, int]
Options = dict[str, Any]

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Ways to lay a feature map out in memory; each keeps the values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel_slice": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "channels_last_slice": lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "channels_last_expanded": lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand(x.shape),
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "crop": lambda x: torch.nn.functional.pad(x, (1, 2, 2, 1))[:, :, 2 : x.shape[2] + 2, 1 : x.shape[3] + 1],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(x.shape),  # the values of the first sample for all
}


def _map(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, f) for v in value)
    return f(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Sample:
    """A call: ``op(*args, **kwargs)``. ``args[0]`` is the feature map, or a list of several laid out alike; the
    other tensors among args are parameters, those among kwargs further maps."""

    args: tuple[Any, ...]
    kwargs: Options

    @property
    def x(self) -> Tensor:
        return self.maps[0]

    @property
    def maps(self) -> list[Tensor]:
        first: Any = self.args[0]
        further = [a for a in self.kwargs.values() if isinstance(a, Tensor)]
        return [*([first] if isinstance(first, Tensor) else first), *further]

    def parameters(self) -> list[Tensor]:
        return [a for a in self.args[1:] if isinstance(a, Tensor)]

    def tensors(self) -> list[Tensor]:
        return [*self.maps, *self.parameters()]

    def map(self, f: Callable[[Tensor], Tensor]) -> Sample:
        """The call with all tensors replaced, in the order of ``tensors()``."""
        maps = self.map_maps(f)
        return Sample((maps.args[0], *_map(self.args[1:], f)), maps.kwargs)

    def map_maps(self, f: Callable[[Tensor], Tensor]) -> Sample:
        """The call with its maps replaced."""
        return Sample((_map(self.args[0], f), *self.args[1:]), {name: _map(a, f) for name, a in self.kwargs.items()})


@dataclass(frozen=True)
class BadInput:
    """A call that must be refused with these words, on every backend."""

    args: tuple[Any, ...]
    kwargs: Options
    error: type[Exception]
    message: str


@dataclass(frozen=True)
class OpInfo:
    name: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]  # plain torch, called as op: the peer that the benchmark compiles, too
    parameters: Callable[[Size, Options, Callable[..., Tensor]], tuple[tuple[Any, ...], Options]]
    options: tuple[Options, ...]  # each is tested; the first is the usual one
    bench: tuple[Options, ...]  # those that the benchmark times
    bad_inputs: Callable[[str], Iterator[BadInput]]
    forward_flops: Callable[[Sample], int]
    backward_flops: Callable[[Sample], int]
    gpu_traffic: tuple[float, float]  # bytes that GPU kernels may move, forward and backward, over least_bytes
    bench_sizes: tuple[tuple[Size, ...], ...] = ()  # of each in bench, the most telling first; else the benchmark's own
    traffic_channels: int = 0  # of the maps by which gpu_traffic is judged, where few would tell nothing
    sizes: tuple[Size, ...] = (
        (2, 8, 7, 7),
        (1, 3, 5, 9),
        (3, 16, 14, 14),
        (2, 33, 8, 8),
        (1, 70, 1, 1),
        (2, 1, 3, 4),
        (1, 4, 1, 17),
        (1, 2, 65, 33),
    )
    dtypes: tuple[torch.dtype, ...] = field(default=DTYPES)
    linear: bool = False  # in its maps, its only tensors: the backward operator takes no map
    maps: Callable[[Size, Options], list[Size]] | None = None  # those of a list of maps, where it takes one
    per_sample: Callable[[Tensor], tuple[Tensor, ...]] | None = None  # of one whose other arguments are so: for any map
    bad_gradients: Callable[[str], Iterator[BadInput]] | None = None  # of a linear one, where not as bad_inputs
    autocasts: bool = False  # computes, as torch's convolutions do, in the dtype of autocast
    largest: Callable[[Options], float] = lambda o: 60000.0  # values, in float16, of which the results are finite
    parts: tuple[str, ...] = ()  # the operations that one is composed of
    memory: Callable[[Sample], int] = lambda s: 0  # numbers that CPU kernels keep for the backward besides the inputs
    by_torch: str = ""  # what of it torch computes, and when: it promises no more than torch there

    def sample(
        self,
        size: Size,
        options: Options | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        parameter_dtype: torch.dtype | None = None,
        layout: str = "contiguous",
        device: str | torch.device = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> Sample:
        """A call with random values; the values depend on the seed and the sizes only, not on dtype or layout.
        Maps among its kwargs are laid out like the first, or as the option of their name says."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        def place(t: Tensor, to: torch.dtype) -> Tensor:
            return t.to(device=device, dtype=to)

        options = self.options[0] if options is None else options
        sizes = [size] if self.maps is None else self.maps(size, options)
        maps = [LAYOUTS[layout](place(random(*s), dtype)) for s in sizes]
        args, kwargs = self.parameters(size, options, random)
        args = tuple(place(a, parameter_dtype or dtype) if isinstance(a, Tensor) else a for a in args)
        for name, a in kwargs.items():
            if isinstance(a, Tensor):
                kwargs[name] = LAYOUTS.get(options[name], LAYOUTS[layout])(place(a, dtype))
        sample = Sample((maps[0] if self.maps is None else maps, *args), kwargs)
        if requires_grad:
            for t in sample.tensors():
                t.requires_grad_()
        return sample

    @property
    def dispatched(self) -> str:
        """The operation whose backend is that of this one."""
        return self.parts[-1] if self.parts else self.name

    def output(self, sample: Sample) -> Tensor:
        """Its size and dtype, on the meta device. Raises what the reference raises where there is none."""
        sample = sample.map(lambda t: t.detach().to("meta"))
        return self.reference(*sample.args, **sample.kwargs)

    def gradient(self, sample: Sample, layout: str = "contiguous", seed: int = 1) -> Tensor:
        """A random gradient of the output; as the sample's, its values depend on the seed and the size only."""
        y, generator = self.output(sample), torch.Generator().manual_seed(seed)
        values = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        return LAYOUTS[layout](values.to(device=sample.x.device, dtype=y.dtype))

    def least_bytes(self, sample: Sample, backward: bool = False) -> int:
        """The bytes that any kernel has to move: each input read once, each output written once."""

        def size(*tensors: Tensor) -> int:
            return sum(t.numel() * t.element_size() for t in tensors)

        if backward and not self.linear:  # reads the gradient, the input and the parameters; writes their gradients
            return size(self.output(sample)) + 2 * size(*sample.tensors())
        return size(self.output(sample), *sample.tensors())

    def flops(self, sample: Sample, backward: bool = False) -> int:
        return self.backward_flops(sample) if backward else self.forward_flops(sample)


def bad_maps(op: str, x: Tensor) -> Iterator[tuple[Tensor, type[Exception], str]]:
    """Feature maps that every operation refuses."""
    yield x[0], ValueError, f"{op}: expected a 4-D input (N, C, H, W), got a 3-D tensor of size {list(x.shape[1:])}"
    yield x[None], ValueError, f"{op}: expected a 4-D input (N, C, H, W), got a 5-D tensor of size {[1, *x.shape]}"
    words = f"{op}: expected an input of dtype float32, float64, float16 or bfloat16, got "
    yield x.to(torch.int64), TypeError, words + "int64"
    yield x.to(torch.complex64), TypeError, words + "complex64"
    yield x > 0, TypeError, words + "bool"
