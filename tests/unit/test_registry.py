"""Plug-ins: found by name, lazily, with clear errors for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress import registry
from compress.core.contracts import Quantizer
from compress.core.errors import ConfigError


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    distribution: str,
    points: str,
    group: str = "compress.quantizers",
) -> None:
    """Put a distribution with entry points on the path, as an installer would."""
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_built_ins_are_registered_like_strangers() -> None:
    assert {"rtn", "gptq"} <= set(registry.names("quantizers"))
    assert {"safetensors", "gguf"} <= set(registry.names("exporters"))
    assert registry.quantizers()["rtn"].origin.startswith("compress-llm ")


def test_class_is_loaded_by_name() -> None:
    plugin = registry.get_quantizer("rtn")
    assert issubclass(plugin, Quantizer)
    assert plugin.name == "rtn"


@pytest.mark.parametrize(
    ("get", "name", "near"),
    [
        (registry.get_quantizer, "rtnn", "'rtn'"),
        (registry.get_exporter, "safetensor", "'safetensors'"),
    ],
)
def test_unknown_name_gives_the_nearest(get: object, name: str, near: str) -> None:
    assert callable(get)
    with pytest.raises(ConfigError, match=f"did you mean {near}. Known: "):
        get(name)


def test_unknown_kind_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'exporters'"):
        registry.entries("exporter")


def test_two_distributions_with_one_name_are_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "a", monkeypatch, "left-pack", "same = left:Left")
    install(tmp_path / "b", monkeypatch, "right-pack", "same = right:Right")
    with pytest.raises(registry.PluginError) as caught:
        registry.quantizers()
    assert "'same'" in str(caught.value)
    assert "left-pack 1.0" in str(caught.value)
    assert "right-pack 1.0" in str(caught.value)
    assert "safetensors" in registry.exporters()


def test_name_of_a_built_in_cannot_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "thief", "rtn = thief:Thief")
    with pytest.raises(registry.PluginError, match="compress-llm .*thief|thief.*llm"):
        registry.get_quantizer("rtn")


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("raise RuntimeError('no luck')", "X", "RuntimeError: no luck"),
        ("import surely_missing", "X", "ModuleNotFoundError"),
        ("x = 1", "X", "AttributeError"),
        ("X = 1", "X", "is no Quantizer"),
        ("class X: pass", "X", "is no Quantizer"),
        (
            "from compress.core.contracts import Quantizer\nclass X(Quantizer): pass",
            "X",
            "does not define quantize, schemes, name, summary, source",
        ),
        (
            "from compress.quantizers.rtn import RoundToNearest as X",
            "X",
            "calls itself 'rtn'; it is registered as 'broken'",
        ),
    ],
)
def test_broken_plugin_has_its_reason_and_others_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    target: str,
    reason: str,
) -> None:
    module = f"stranger_{abs(hash(source))}"
    (tmp_path / f"{module}.py").write_text(source)
    install(tmp_path, monkeypatch, "stranger", f"broken = {module}:{target}")
    with pytest.raises(registry.PluginError, match="'broken' of stranger 1.0"):
        registry.get_quantizer("broken")
    problem = registry.quantizers()["broken"].problem()
    assert problem is not None
    assert reason in problem
    assert registry.quantizers()["rtn"].problem() is None


def test_names_are_found_without_importing_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "stranger", "unseen = not_there:X")
    assert "unseen" in registry.names("quantizers")
