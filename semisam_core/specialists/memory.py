"""How much memory a training step takes, found by running one on PyTorch's meta device, which allocates nothing."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semisam_core.losses import supervised_loss

# With so few channels a convolution gains nothing from blocked layouts, and some CPU kernels unfold its input instead.
FEW_CHANNELS = 4


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of one training step, in bytes.

    Attributes:
        tensors: the most that tensors take between two operations; the same on every processor.
        peak: the same with what convolutions may unfold while they run. Which of them do depends on the library and
            the processor, so this is an upper bound for the layers that are unfolded on some.
    """

    tensors: int
    peak: int


def training_step_memory(
    build: Callable[[], nn.Module], in_channels: int, patch: tuple[int, int, int], batch: int
) -> StepMemory:
    """Return the peak memory of one training step.

    The step is the real one, operation by operation: forward pass, supervised loss, backward pass, AdamW, with the
    EMA teacher in memory. Tensors on the meta device have shapes and lifetimes but no content, so this takes about a
    second and no memory.

    Not counted: what the device's libraries allocate for themselves (several hundred MB for CUDA, cuDNN's workspaces,
    fragmentation), networks of the regularizer, and the scans.

    Args:
        build: returns a new network; called with the meta device as the default.
        in_channels: input channels.
        patch: (H, W, D) in voxels.
        batch: patches whose activations are alive at once.
    """
    with on_meta_device():
        network = build().train()
        teacher = copy.deepcopy(network)
        image, label = torch.empty(batch, in_channels, *patch), torch.empty(batch, *patch)
    optimizer = torch.optim.AdamW(network.parameters())
    tracker = MemoryTracker()
    tracker.track([*network.parameters(), *network.buffers(), *teacher.parameters(), *teacher.buffers(), image, label])
    with tracker:
        loss = supervised_loss(network(image), label)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return StepMemory(tracker.tensors, tracker.peak)


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Build specialists on the meta device within this context: their tensors have shapes but no content."""
    with torch.device("meta"), _LinspaceOnCPU():
        yield


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the storage of every tensor from the operation that returns it until it is freed.

    Attributes:
        tensors: the most bytes alive after any operation so far.
        peak: the most bytes alive at any time so far, with what convolutions may unfold while they run.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors = 0
        self.peak = 0
        self._now = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def track(self, tensors: Iterable[Any]) -> None:
        """Count the storage of tensors, each storage once, until it is freed; what is no tensor is ignored."""
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive:
                continue

            def forget(_: weakref.ref[torch.UntypedStorage], key: int = key, size: int = size) -> None:
                self._now -= size
                del self._alive[key]

            self._alive[key] = weakref.ref(storage, forget)
            self._now += size
        self.tensors = max(self.tensors, self._now)
        self.peak = max(self.peak, self._now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; count what it returns and, in `peak`, what it may unfold while it runs."""
        result = func(*args, **(kwargs or {}))
        self.track(tree_leaves(result))
        self.peak = max(self.peak, self._now + _unfolded_bytes(func, args))
        return result


class _LinspaceOnCPU(TorchFunctionMode):
    """Keep `linspace` on the CPU: SwinUNETR reads its drop-path rates from one, so it needs content."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "cpu"} if func is torch.linspace else kwargs))


def _unfolded_bytes(func: Any, args: Any) -> int:
    """Return the bytes of the input unfolded into columns (im2col), k^3 copies of it; 0 where none are expected."""
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
