"""Plug-ins, found by name through entry points. Built-ins register as strangers do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from compress.core.errors import ConfigError

if TYPE_CHECKING:
    from compress.core.contracts import Allocator, Exporter, Plugin, Pruner, Quantizer

KINDS = ("quantizers", "pruners", "allocators", "exporters")


class PluginError(ConfigError):
    """A plug-in is installed but cannot be used, or two claim the same name."""


@dataclass(frozen=True)
class PluginEntry:
    """A registered plug-in; its module is imported by :meth:`load` only.

    Attributes:
        name: The word a config uses.
        kind: One of :data:`KINDS`.
        origin: Distribution that registers it, with its version.
        target: ``module:Class``.
    """

    name: str
    kind: str
    origin: str
    target: str

    def load(self) -> type[Plugin]:
        """Import the class and check that it fulfils its contract.

        Raises:
            PluginError: It cannot be imported, or is no plug-in of its kind.
        """
        from compress.core import contracts

        contract = {
            "quantizers": contracts.Quantizer,
            "pruners": contracts.Pruner,
            "allocators": contracts.Allocator,
            "exporters": contracts.Exporter,
        }[self.kind]
        label = f"{self.kind.removesuffix('s')} {self.name!r} of {self.origin}"
        try:
            plugin = EntryPoint(
                name=self.name, value=self.target, group=f"compress.{self.kind}"
            ).load()
        except Exception as error:  # a stranger's module may fail in any way
            raise PluginError(
                f"{label} is broken: {type(error).__name__}: {error}"
            ) from error
        problem = _contract_problem(plugin, contract, self.name)
        if problem:
            raise PluginError(f"{label} is broken: {self.target} {problem}")
        loaded: type[Plugin] = plugin
        return loaded

    def problem(self) -> str | None:
        """Return why the plug-in cannot be used, or ``None`` if it can."""
        try:
            self.load()
        except PluginError as error:
            return str(error).partition(" is broken: ")[2]
        return None


def _contract_problem(plugin: object, contract: type[Plugin], name: str) -> str:
    """Say which part of the contract a class does not fulfil; empty if none."""
    if not (isinstance(plugin, type) and issubclass(plugin, contract)):
        return f"is no {contract.__name__}"
    missing = sorted(getattr(plugin, "__abstractmethods__", ()))
    missing += [a for a in ("name", "summary", "source") if not hasattr(plugin, a)]
    if missing:
        return f"does not define {', '.join(missing)}"
    if plugin.name != name:
        return f"calls itself {plugin.name!r}; it is registered as {name!r}"
    return ""


def quantizers() -> dict[str, PluginEntry]:
    """Return all registered quantizers by name, without importing them.

    Raises:
        PluginError: Two distributions claim one name.
    """
    return _entries("quantizers")


def exporters() -> dict[str, PluginEntry]:
    """Return all registered exporters by name; see :func:`quantizers`."""
    return _entries("exporters")


def names(kind: str) -> list[str]:
    """Return the sorted names of one of :data:`KINDS`."""
    return sorted(_entries(kind))


def entries(kind: str | None = None) -> list[PluginEntry]:
    """Return the plug-ins of one kind, or of all kinds.

    Raises:
        ConfigError: The kind is unknown.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}{_hint(kind, dict.fromkeys(KINDS))}")
    chosen = KINDS if kind is None else (kind,)
    return [entry for one in chosen for entry in _entries(one).values()]


def get_quantizer(name: str) -> type[Quantizer]:
    """Return the class of a quantizer.

    Raises:
        ConfigError: The name is unknown; the message gives the nearest.
        PluginError: The plug-in is broken.
    """
    from compress.core.contracts import Quantizer

    plugin = _find(name, _entries("quantizers"), "quantizer").load()
    assert issubclass(plugin, Quantizer)
    return plugin


def get_pruner(name: str) -> type[Pruner]:
    """Return the class of a pruner; see :func:`get_quantizer`."""
    from compress.core.contracts import Pruner

    plugin = _find(name, _entries("pruners"), "pruner").load()
    assert issubclass(plugin, Pruner)
    return plugin


def get_allocator(name: str) -> type[Allocator]:
    """Return the class of an allocator; see :func:`get_quantizer`."""
    from compress.core.contracts import Allocator

    plugin = _find(name, _entries("allocators"), "allocator").load()
    assert issubclass(plugin, Allocator)
    return plugin


def get_exporter(name: str) -> type[Exporter]:
    """Return the class of an exporter; see :func:`get_quantizer`."""
    from compress.core.contracts import Exporter

    plugin = _find(name, _entries("exporters"), "exporter").load()
    assert issubclass(plugin, Exporter)
    return plugin


def _entries(kind: str) -> dict[str, PluginEntry]:
    found: dict[str, PluginEntry] = {}
    for point in entry_points(group=f"compress.{kind}"):
        distribution = point.dist
        origin = (
            f"{distribution.name} {distribution.version}" if distribution else "unknown"
        )
        entry = PluginEntry(point.name, kind, origin, point.value)
        other = found.get(point.name)
        if other is not None and other != entry:
            raise PluginError(
                f"two distributions claim the name {point.name!r} in compress.{kind}: "
                f"{other.origin} and {origin}; uninstall one of them"
            )
        found[point.name] = entry
    return dict(sorted(found.items()))


def _find(name: str, known: Mapping[str, PluginEntry], noun: str) -> PluginEntry:
    if name in known:
        return known[name]
    if not known:
        raise ConfigError(
            f"unknown {noun} {name!r}: none is registered; install the package "
            "(pip install -e .) so that its entry points are known"
        )
    raise ConfigError(f"unknown {noun} {name!r}{_hint(name, known)}")


def _hint(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "; "
    return f"{guess}{' Known' if near else 'known'}: {', '.join(known)}"
