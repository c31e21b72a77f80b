"""A dict of buffers, as torch's `ParameterDict` is one of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn


class BufferDict(MutableMapping[str, Any], nn.Module):
    """Holds buffers by name.

    Args:
        buffers: the first ones.
        persistent: whether they are in the module's state dict.
    """

    __hash__ = nn.Module.__hash__

    def __init__(
        self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None, persistent: bool = False
    ):
        nn.Module.__init__(self)
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, buffer: Tensor) -> None:
        self.register_buffer(name, buffer, persistent=self.persistent)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)
