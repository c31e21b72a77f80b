"""A batch in parts of about one length, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Sequence

OVERHEAD = 150  # what a part more costs on a CPU, in tokens


def by_length(lengths: Sequence[int], most: int | None, kind: str) -> list[list[int]]:
    """Positions of rows, in parts of at most `most` rows whose padded size, with what each part costs, is least.

    Args:
        kind: the type of the device.

    On an accelerator a part more costs about as much as all others together: rows are only parted where `most` says so.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    most = most or len(order)
    if kind != "cpu":
        return [order[i : i + most] for i in range(0, len(order), most)]
    best: list[tuple[int, int]] = [(0, 0)]  # for the first rows: the least cost, and where the last part begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(min((best[b][0] + (end - b) * longest + OVERHEAD, b) for b in range(max(0, end - most), end)))
    parts, end = [], len(order)
    while end:
        begin = best[end][1]
        parts.append(order[begin:end])
        end = begin
    return parts[::-1]
