"""How much memory a training step takes, found by taking one without memory, on PyTorch's meta device."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semisam_core.losses import supervised_loss

# A convolution over so few channels has nothing to gain from blocking, and CPU libraries unfold its input instead.
FEW_CHANNELS = 4


def training_step_bytes(
    build: Callable[[], nn.Module], in_channels: int, patch: tuple[int, int, int], batch: int
) -> int:
    """Return the largest number of bytes that the tensors of one training step take at once.

    The step is the real one, operation by operation: forward pass, supervised loss, backward pass, AdamW; with the
    EMA teacher beside the specialist. Tensors of the meta device have shapes and lifetimes but no content, so this
    takes a moment and no memory.

    Not counted: what the device's libraries need besides (CUDA's own several hundred MB, cuDNN's workspaces,
    fragmentation), a second network of the regularizer, the scans themselves.

    Args:
        build: returns a new network; called where new tensors are put on the meta device.
        in_channels: input channels.
        patch: (H, W, D) in voxels.
        batch: patches whose activations are alive at once.
    """
    with without_memory():
        network = build().train()
        teacher = copy.deepcopy(network)
        image, label = torch.empty(batch, in_channels, *patch), torch.empty(batch, *patch)
    optimizer = torch.optim.AdamW(network.parameters())
    book = PeakBook()
    book.enter([*network.parameters(), *network.buffers(), *teacher.parameters(), *teacher.buffers(), image, label])
    with book:
        loss = supervised_loss(network(image), label)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return book.peak


@contextmanager
def without_memory() -> Iterator[None]:
    """Within this context a specialist is built on the meta device: tensors with shapes but no content."""
    with torch.device("meta"), _LinspaceOnCPU():
        yield


class PeakBook(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, books every tensor's memory from its first use to its last.

    Attributes:
        peak: the largest sum in bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def enter(self, tensors: Iterable[Any]) -> None:
        """Book the memory of tensors, each storage once, until it is freed."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive:
                continue

            def leave(_: weakref.ref[torch.UntypedStorage], key: int = key, size: int = size) -> None:
                self._now -= size
                del self._alive[key]

            self._alive[key] = weakref.ref(storage, leave)
            self._now += size
        self.peak = max(self.peak, self._now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and book what it returns and, for a moment, what it needs meanwhile."""
        answer = func(*args, **(kwargs or {}))
        self.enter(tree_leaves(answer))
        self.peak = max(self.peak, self._now + _unfolded_bytes(func, args))
        return answer


class _LinspaceOnCPU(TorchFunctionMode):
    """SwinUNETR reads its drop-path rates out of a `linspace`, which therefore needs content."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "cpu"} if func is torch.linspace else kwargs))


def _unfolded_bytes(func: Any, args: Any) -> int:
    """Return the bytes of an unfolded input (im2col), k^3 copies of it, where a convolution makes one."""
    if func is torch.ops.aten.convolution.default:
        image, weight, transposed = args[0], args[1], args[6]
        voxels = _convolved_voxels(image, weight, args)
    elif func is torch.ops.aten.convolution_backward.default:
        gradient, image, weight, transposed = args[0], args[1], args[2], args[7]
        voxels = math.prod(gradient.shape[2:])
    else:
        return 0
    kernel = math.prod(weight.shape[2:])
    if transposed:
        voxels = math.prod(image.shape[2:])
    elif kernel == 1 or weight.shape[1] > FEW_CHANNELS:
        return 0
    return int(image.shape[0] * weight.shape[1] * kernel * voxels * image.element_size())


def _convolved_voxels(image: Tensor, weight: Tensor, args: Any) -> int:
    sides = zip(image.shape[2:], weight.shape[2:], args[3], args[4], args[5], strict=True)
    return math.prod((side + 2 * pad - dilation * (k - 1) - 1) // step + 1 for side, k, step, pad, dilation in sides)
