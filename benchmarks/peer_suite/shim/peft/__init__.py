"""What the peer's tests import as `peft`: our own package, under the peer's names.

`peft.a.b.Name` is, in this order,

1. what names.json says: {"names": {"peft.a.b.Name": "module:attribute"}, "modules": {"peft.a.b": "module"}};
2. `Name` in workbench.adapters.a.b if there is such a module. Then `sys.modules["peft.a.b"]` is that module itself, so
   that a test that patches something there reaches our code;
3. workbench.adapters.Name;
4. the one definition of `Name` anywhere in workbench.adapters;
5. a placeholder: collecting tests it is whatever they do with it, running one it raises `MissingName`, so that a name
   that we lack stops only the tests that need it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import pkgutil
import sys
import types
from pathlib import Path
from typing import Any

TARGET = "workbench.adapters"
ABSENT: Any = object()

__version__ = importlib.metadata.version("peft")
target = importlib.import_module(TARGET)
names_file = json.loads(Path(__file__).parents[2].joinpath("names.json").read_text())
peer_modules = {
    ".".join(file.with_suffix("").parts).removesuffix(".__init__")
    for file in importlib.metadata.files("peft") or ()
    if file.suffix == ".py"
}
collecting = True
placeholders: dict[str, Any] = {}
definitions: dict[str, list[types.ModuleType]] = {}


class MissingName(ImportError):
    """A test needs something that workbench.adapters does not have."""


def collected() -> None:
    """From now on tests run."""
    global collecting
    collecting = False


# ---------------------------------------------------------------- placeholders


class PlaceholderType(type):
    """A class that can be subscripted, called and iterated while tests are collected."""

    name: str

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(f"{cls.name}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return type.__call__(cls) if collecting else cls._missing()

    def __getitem__(cls, key: Any) -> Any:
        return placeholder(f"{cls.name}[{key!r}]") if collecting else cls._missing()

    def __iter__(cls) -> Any:
        return iter(()) if collecting else cls._missing()

    def __contains__(cls, value: Any) -> bool:
        return False

    def __or__(cls, other: Any) -> Any:  # in annotations
        return cls

    def __ror__(cls, other: Any) -> Any:
        return other

    def _missing(cls) -> Any:
        raise MissingName(cls.name)


class Placeholder(metaclass=PlaceholderType):
    """An instance of a missing class; as a decorator it leaves a function as it is."""

    name = ""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(f"{type(self).name}().{name}") if collecting else type(self)._missing()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not collecting:
            type(self)._missing()
        return args[0] if len(args) == 1 and callable(args[0]) else self


def placeholder(name: str) -> Any:
    """The placeholder of a name; of a warning or an error one that can be raised."""
    if name not in placeholders:
        short = name.rpartition(".")[2]
        own = {"name": name, "__module__": "peft"}
        if short.endswith("Warning"):
            placeholders[name] = type(short, (UserWarning,), own)
        elif short.endswith(("Error", "Exception")):
            placeholders[name] = type(short, (Exception,), own)
        else:
            placeholders[name] = PlaceholderType(short, (Placeholder,), own)
    return placeholders[name]


# ---------------------------------------------------------------- looking up


def our_module(peer_name: str) -> types.ModuleType | None:
    """Our module that stands for a module of the peer."""
    name = names_file["modules"].get(peer_name, peer_name.replace("peft", TARGET, 1))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def look_up(module: str, name: str) -> Any:
    """Ours for `module.name`; ABSENT if there is none."""
    if f"{module}.{name}" in names_file["names"]:
        ours, _, attribute = names_file["names"][f"{module}.{name}"].partition(":")
        return getattr(importlib.import_module(ours), attribute, ABSENT)
    own = our_module(module)
    if own is not None and module != "peft" and name in vars(own):
        return vars(own)[name]
    value = getattr(target, name, ABSENT)
    if not isinstance(value, types.ModuleType) and (module == "peft" or is_ours(value, name)):
        return value
    value = defined_once(name, set(module.replace("_", ".").split(".")))
    return about_the_machine(name) if value is ABSENT else value


def is_ours(value: Any, name: str) -> bool:
    """Whether what workbench.adapters has under a name is its own, not something it imported."""
    module = getattr(value, "__module__", None) or TARGET
    return value is not ABSENT and (name in getattr(target, "__all__", ()) or module.startswith("workbench"))


def defined_once(name: str, words: set[str]) -> Any:
    """What one of our modules defines under a name; of several the one whose path shares most words with the peer's."""
    if not definitions:
        for found in pkgutil.walk_packages(target.__path__, f"{TARGET}."):
            module = importlib.import_module(found.name)
            for own, value in list(vars(module).items()):
                elsewhere = getattr(value, "__module__", module.__name__) != module.__name__
                if not own.startswith("__") and not isinstance(value, types.ModuleType) and not elsewhere:
                    definitions.setdefault(own, []).append(module)
    shared = [(len(words & set(m.__name__.replace("_", ".").split("."))), m) for m in definitions.get(name, ())]
    best = max((count for count, _ in shared), default=0)
    modules = [module for count, module in shared if count == best]
    return getattr(modules[0], name) if len(modules) == 1 else ABSENT


def about_the_machine(name: str) -> Any:
    """What a test asks about the machine, not about an adapter library."""
    if name == "infer_device":
        return lambda: "cpu"
    if name.startswith("is_transformers_ge_v"):
        import transformers
        from packaging.version import Version

        wanted = Version(name.removeprefix("is_transformers_ge_v").replace("_", "."))
        return Version(transformers.__version__) >= wanted
    if name == "is_diffusers_available":
        return lambda: importlib.util.find_spec("diffusers") is not None
    if name.startswith("is_") and name.endswith("_available"):
        return lambda *args, **kwargs: False
    return ABSENT


def asked_by_others() -> bool:
    """Whether a test or a library asks; our own code and importlib's get an honest AttributeError."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        top = frame.f_globals.get("__name__", "").partition(".")[0]
        if top not in ("importlib", "_frozen_importlib", "peft"):
            return top in ("tests", "diffusers", "transformers", "accelerate")
        frame = frame.f_back
    return False


class PeerModule(types.ModuleType):
    """A module of the peer's name: what it lacks is looked up."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        module = peer_name_of.get(id(self), self.__name__)
        if f"{module}.{name}" in peer_modules:
            return importlib.import_module(f"{module}.{name}")
        value = look_up(module, name)
        if value is ABSENT and not asked_by_others():
            raise AttributeError(f"{TARGET} has nothing for {module}.{name}")
        return placeholder(f"{module}.{name}") if value is ABSENT else value


peer_name_of: dict[int, str] = {}  # of our modules that stand for the peer's


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `peft.a.b`: ours if there is one, else an empty module if the peer has one."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("peft.") or (fullname not in peer_modules and our_module(fullname) is None):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        ours = our_module(spec.name)
        if ours is None:
            return PeerModule(spec.name)
        if type(ours) is types.ModuleType:
            ours.__class__ = PeerModule
        peer_name_of.setdefault(id(ours), spec.name)
        kept = ("__spec__", "__path__", "__package__", "__loader__")
        spec.loader_state = {name: vars(ours)[name] for name in kept if name in vars(ours)}
        return ours

    def exec_module(self, module: types.ModuleType) -> None:
        spec = module.__spec__
        if spec is None or spec.loader_state is None:
            return
        vars(module).pop("__path__", None)  # the import system put the peer's there; our module gets its own back
        vars(module).update(spec.loader_state)
        sys.modules[spec.name] = module


sys.meta_path.insert(0, Finder())
__all__ = list(target.__all__)
sys.modules[__name__].__class__ = PeerModule
