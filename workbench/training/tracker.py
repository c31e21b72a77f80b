"""The bytes of tensors, counted as operations make them and as they go."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Tracker(TorchDispatchMode):
    """While it is entered, counts the storages of all tensors that operations give out; views count once.

    What an operation takes for itself and gives back before it ends is not seen. Tensors without data count as if they
    had some.

    Args:
        held: tensors that exist already and count as well.

    Attributes:
        now: bytes that are there.
        peak: the most that were there at once since `reset`.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in held:
            self.note(tensor)

    def reset(self) -> None:
        """Let the peak start again from what is there."""
        self.peak = self.now

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = self.perform(func, types, args, kwargs or {})
        for tensor in tensors(out):
            self.note(tensor)
        return out

    def perform(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What an operation gives."""
        return func(*args, **kwargs)

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on, as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        _, known = self._alive.get(key, (None, 0))
        if size != known:  # new, or resized
            self._alive[key] = weakref.ref(storage, partial(self._gone, key)), size
            self.now += size - known
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, _: object) -> None:
        self.now -= self._alive.pop(key)[1]


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, and in lists of these."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)
