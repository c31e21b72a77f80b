"""A YAML 1.2 file as plain values, and the line and column of each."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from workbench.errors import Problem
from workbench.tracking.runs import public_url

Loc = tuple[str | int, ...]
Position = tuple[int, int]

_TAG = "tag:yaml.org,2002:"
_TEXT = {_TAG + kind for kind in ("str", "timestamp", "merge", "value")}  # the last three are not in YAML 1.2's core
_SCALARS = {_TAG + kind for kind in ("null", "bool", "int", "float")}
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 2**22, 100_000, 50  # of a file; an alias counts as all that it stands for
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # what stores cannot hold


@dataclass
class Source:
    """A YAML file that was read.

    Attributes:
        file: its path as the user gave it.
        text: its content.
        data: its content as dicts, lists, strings, numbers, booleans and None; None where it could not be read.
        problems: what is wrong with it so far; `report` adds to them.
    """

    file: str
    text: str = ""
    data: Any = None
    problems: list[Problem] = field(default_factory=list)
    _keys: dict[Loc, Position] = field(default_factory=dict)
    _values: dict[Loc, Position] = field(default_factory=dict)
    _unreadable: set[Position] = field(default_factory=set)  # reported already, whatever else is wrong there

    def report(self, loc: Loc, message: str, hint: str = "", *, at_key: bool = False) -> None:
        """Add a problem at the value (or the key) that `loc` leads to, or at the nearest that the file holds."""
        positions = self._keys if at_key else self._values
        while loc and loc not in positions:
            loc = loc[:-1]
        position = positions.get(loc) or self._values.get((), (1, 1))
        if position not in self._unreadable:
            self._report(position, message, hint)

    def _report(self, position: Position, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.file, *position, public_url(message), hint))

    def _report_secrets(self) -> None:
        for number, line in enumerate(self.text.splitlines(), 1):
            if public_url(line) != line:
                hint = "every run has a copy of this file; logins belong into the environment, such as HF_TOKEN"
                self._report((number, 1), "a URL with a password or a token in it", hint)

    def _plain(self, node: Node, loc: Loc) -> Any:
        self._values[loc] = _position(node.start_mark)
        if len(loc) > _MAX_DEPTH:
            raise RecursionError
        if len(self._values) > _MAX_VALUES:
            raise ValueError(f"it holds more than {_MAX_VALUES:,} values, what its aliases stand for among them")
        if isinstance(node, MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, loc)
        if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
            return [self._plain(item, (*loc, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: MappingNode, loc: Loc) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            position = _position(key_node.start_mark)
            if not isinstance(key_node, ScalarNode):
                self._report(position, "a key must be a single word")
                continue
            key = self._scalar(key_node)
            if key in values:
                self._report(position, f"duplicate key {key!r}", f"first on line {self._keys[*loc, key][0]}")
                continue
            self._keys[*loc, key] = position
            values[key] = self._plain(value_node, (*loc, key))
            if value_node.start_mark.index == value_node.end_mark.index:  # nothing written: it "starts" at the next key
                self._values[*loc, key] = position
        return values

    def _scalar(self, node: Node) -> Any:
        if node.tag in _TEXT and isinstance(node, ScalarNode):
            if not _UNFIT.search(node.value):
                return node.value
            message = "a text with a control character, or half of one in two parts"
        elif node.tag in _SCALARS and isinstance(node, ScalarNode):
            try:
                value = YAML(typ="safe", pure=True).constructor.construct_object(node)
                if not isinstance(value, int) or abs(value) < 2**63:
                    return value
                message = "a whole number of more than 64 bits"
            except (YAMLError, ValueError, LookupError, ArithmeticError):
                message = f"{node.value[:100]!r} is not a valid {node.tag.removeprefix(_TAG)}"
        else:
            message = f"the YAML tag {node.tag} is not supported"
        self._report(_position(node.start_mark), message)
        self._unreadable.add(_position(node.start_mark))
        return None


def read(path: str | Path, text: str | None = None) -> Source:
    """Read a YAML file. What is wrong with the file or its YAML is in `problems`, nothing is raised.

    Every duplicate key is found; of other faults in the YAML itself only the first can be known.

    Args:
        text: what the file held, where it may hold something else by now.
    """
    source = Source(str(path))
    try:
        content = Path(path).read_bytes() if text is None else text.encode()
        if len(content) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
        source.text = content.decode()
        source._report_secrets()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML allows it
            # not `load`: only the node tree has the position of every value and all duplicate keys
            root = YAML(typ="safe", pure=True).compose(source.text)
        if root is None:
            source._report((1, 1), "the file is empty")
        else:
            source.data = source._plain(root, ())
    except OSError as error:
        source._report((1, 1), f"the file cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        source._report((content[: error.start].count(b"\n") + 1, 1), "the file is not UTF-8 text")
    except ReaderError as error:
        before = source.text[: error.position]
        position = before.count("\n") + 1, len(before) - before.rfind("\n")
        source._report(position, "a control character that YAML does not allow")
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if mark and error.context_mark and mark.index >= len(source.text.rstrip()):
            mark = error.context_mark  # what is open at the end of the file says more than the end
        text = ", ".join(filter(None, (error.context, error.problem)))
        source._report(_position(mark) if mark else (1, 1), f"not valid YAML: {text}")
    except RecursionError:
        source._report((1, 1), "values are nested too deeply, or an alias holds itself")
    except (YAMLError, ValueError) as error:
        source._report((1, 1), f"not valid YAML: {error}")
    return source


def _position(mark: Any) -> Position:
    return mark.line + 1, mark.column + 1
