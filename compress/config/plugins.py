"""Check what a config says about plug-ins: names, options and schemes.

The schema checks the frame; here the chosen plug-in's own ``Options`` check the rest,
with the path prefixed, so that outside plug-ins give the same errors as built-ins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compress.config.diagnostics import Findings, KeyPath, suggest
from compress.config.prune_section import PruneSection
from compress.config.schema import DENSE, QuantizeSection
from compress.config.training_checks import check_recover, check_tune, validated
from compress.core.errors import ConfigError, SchemeError
from compress.core.scheme import Scheme
from compress.registry import (
    get_allocator,
    get_exporter,
    get_pruner,
    get_quantizer,
)

if TYPE_CHECKING:
    from compress.config.schema import TransformEntry
    from compress.core.contracts import Allocator, Exporter, Plugin, Pruner, Quantizer
    from compress.transforms.chain import Chain
    from compress.transforms.contract import Transform

_TUNING_NAMES = {"pv": "pv", "pv_tuning": "pv", "edkm": "edkm", "dkm": "edkm"}


def create_quantizer(
    name: str, options: Mapping[str, Any] | None = None, *, path: KeyPath = ()
) -> Quantizer:
    """Return a quantizer with checked options.

    Args:
        name: As in ``quantize.method``.
        options: As in ``quantize.options``.
        path: Where the options stand in a config, for messages.

    Raises:
        ConfigError: The name or an option is wrong; one line for each error.
    """
    plugin = get_quantizer(name)
    return plugin(_checked_options(plugin, options or {}, path))


def create_exporter(
    name: str, options: Mapping[str, Any] | None = None, *, path: KeyPath = ()
) -> Exporter:
    """Return an exporter with checked options; see :func:`create_quantizer`."""
    plugin = get_exporter(name)
    return plugin(_checked_options(plugin, options or {}, path))


def create_allocator(
    name: str, options: Mapping[str, Any] | None = None, *, path: KeyPath = ()
) -> Allocator:
    """Return an allocator with checked options; see :func:`create_quantizer`."""
    plugin = get_allocator(name)
    return plugin(_checked_options(plugin, options or {}, path))


def create_pruner(
    name: str, options: Mapping[str, Any] | None = None, *, path: KeyPath = ()
) -> Pruner:
    """Return a pruner with checked options; see :func:`create_quantizer`."""
    plugin = get_pruner(name)
    return plugin(_checked_options(plugin, options or {}, path))


def create_transform(
    name: str, options: Mapping[str, Any] | None = None, *, path: KeyPath = ()
) -> Transform:
    """Return a transform with checked options; see :func:`create_quantizer`."""
    from compress.transforms.catalog import TRANSFORMS

    if name not in TRANSFORMS:
        raise ConfigError(f"unknown transform {name!r}{suggest(name, TRANSFORMS)}")
    kind = TRANSFORMS[name]
    return kind(_checked_options(kind, options or {}, path))


def create_chain(
    entries: Iterable[TransformEntry], methods: Iterable[Quantizer]
) -> Chain:
    """Return the transforms of a config, then those that its methods bring along.

    Raises:
        ConfigError: A name or an option is wrong.
    """
    from compress.transforms.chain import Chain

    made = [
        create_transform(entry.name, entry.options, path=("transforms", index))
        for index, entry in enumerate(entries)
    ]
    for method in sorted(methods, key=lambda method: method.name):
        for name in method.transforms:
            if all(transform.name != name for transform in made):
                made.append(create_transform(name))
    return Chain(tuple(made))


def _checked_options(
    plugin: type[Plugin] | type[Transform], options: Mapping[str, Any], path: KeyPath
) -> Any:
    return validated(plugin.Options, options, path)


def check_plugins(data: Mapping[str, Any], findings: Findings) -> None:
    """Add the errors of all plug-ins that plain config data names.

    Works on the data, not on a ``Config``, so that these errors are told together with
    those of the frame; whatever has the wrong type is left to the schema.
    """
    section = data.get("quantize")
    if isinstance(section, dict):
        _check_quantize(section, findings)
    _check_allocation(data, findings)
    prune = data.get("prune")
    if isinstance(prune, dict):
        _check_prune(prune, findings)
    entries = data.get("export")
    if isinstance(entries, list):
        _check_exports(entries, findings)
    recover = data.get("recover")
    if isinstance(recover, dict):
        _check_recover(recover, data, findings)
    tune = data.get("tune")
    if isinstance(tune, dict):
        check_tune(tune, findings)
        if not isinstance(section, dict):
            findings.add(("tune",), "there are no codes to tune; add quantize")
    transforms = data.get("transforms")
    if isinstance(transforms, list) and transforms:
        _check_transforms(transforms, isinstance(section, dict), findings)


def _check_recover(
    section: dict[str, Any], data: Mapping[str, Any], findings: Findings
) -> None:
    check_recover(section, findings)
    if data.get("prune") is not None:
        return
    if section.get("method") != "soft_prompt":
        message = "nothing was removed that training could bring back; add prune"
        findings.add(("recover",), message)
    elif data.get("quantize") is None:
        message = "nothing was taken that a prompt could bring back"
        findings.add(("recover",), f"{message}; add prune or quantize")


def _check_quantize(section: dict[str, Any], findings: Findings) -> None:
    method = section.get("method", QuantizeSection.model_fields["method"].default)
    scheme, options = section.get("scheme"), section.get("options", {})
    if not isinstance(options, dict):
        options = {}
    made = _build_quantizer(method, options, ("quantize", "method"), findings)
    _check_scheme(made, scheme, ("quantize", "scheme"), findings)
    overrides = section.get("overrides")
    for pattern, override in overrides.items() if isinstance(overrides, dict) else ():
        if not isinstance(override, dict):
            continue
        path = ("quantize", "overrides", pattern)
        special = made
        if override.get("method") is not None:
            special = _build_quantizer(
                override["method"], {}, (*path, "method"), findings
            )
        own = override.get("scheme")
        place = (*path, "method" if own is None else "scheme")
        if own is not None or special is not made:
            _check_scheme(special, scheme if own is None else own, place, findings)


def _check_prune(section: dict[str, Any], findings: Findings) -> None:
    method = section.get("method", PruneSection.model_fields["method"].default)
    options = section.get("options", {})
    if not isinstance(method, str) or not isinstance(options, dict):
        return
    try:
        plugin = get_pruner(method)
        plugin.Options.model_validate(options)
    except ConfigError as error:
        findings.add(("prune", "method"), str(error))
    except ValidationError as error:
        schema = plugin.Options.model_json_schema()
        findings.add_validation(error, schema, ("prune", "options"))


def _check_allocation(data: Mapping[str, Any], findings: Findings) -> None:
    """Check budget and allocator, which go together, and the schemes it may choose."""
    section, allocate = data.get("quantize"), data.get("allocate")
    if data.get("budget") is None:
        if isinstance(section, dict) and "scheme" not in section:
            findings.add(("quantize", "scheme"), "required key is missing")
        if allocate is not None:
            message = "an allocator needs a budget; add budget: {bytes: ...}"
            findings.add(("allocate",), message)
        return
    if not isinstance(section, dict):
        findings.add(("budget",), "there is nothing to choose without quantize")
        return
    if section.get("scheme") is not None:
        message = (
            "the schemes are chosen under the budget; leave this out, name the "
            "choices in allocate.schemes and pin layers with overrides"
        )
        findings.add(("quantize", "scheme"), message)
    if isinstance(allocate, dict):
        _check_allocator(allocate, section, findings)


def _check_allocator(
    allocate: dict[str, Any], quantize: dict[str, Any], findings: Findings
) -> None:
    name, options = allocate.get("method", "ilp"), allocate.get("options", {})
    if isinstance(name, str) and isinstance(options, dict):
        try:
            plugin = get_allocator(name)
            plugin.Options.model_validate(options)
        except ConfigError as error:
            findings.add(("allocate", "method"), str(error))
        except ValidationError as error:
            schema = plugin.Options.model_json_schema()
            findings.add_validation(error, schema, ("allocate", "options"))
    method = quantize.get("method", QuantizeSection.model_fields["method"].default)
    schemes = allocate.get("schemes")
    if not isinstance(schemes, list | tuple) or not isinstance(method, str):
        return
    try:
        quantizer = get_quantizer(method)()
    except ConfigError:
        return  # told under quantize
    for index, scheme in enumerate(schemes):
        place = ("allocate", "schemes", index)
        _check_scheme(quantizer, scheme, place, findings)


def _build_quantizer(
    method: Any, options: dict[str, Any], path: KeyPath, findings: Findings
) -> Quantizer | None:
    if not isinstance(method, str):
        return None
    if method in _TUNING_NAMES:
        message = (
            f"{method} is no way to make codes, it tunes them: name the method that "
            f"makes them here, and write tune: {{method: {_TUNING_NAMES[method]}}} "
            "beside quantize"
        )
        findings.add(path, message)
        return None
    try:
        plugin = get_quantizer(method)
    except ConfigError as error:
        findings.add(path, str(error))
        return None
    try:
        return plugin(plugin.Options.model_validate(options))
    except ValidationError as error:
        schema = plugin.Options.model_json_schema()
        findings.add_validation(error, schema, ("quantize", "options"))
        return None


def _check_scheme(
    quantizer: Quantizer | None, name: Any, path: KeyPath, findings: Findings
) -> None:
    if quantizer is None or not isinstance(name, str) or name == DENSE:
        return
    try:
        scheme = Scheme.parse(name)
    except SchemeError:
        return  # the schema says so
    if not quantizer.supports(scheme):
        able = ", ".join(quantizer.schemes())
        findings.add(
            path, f"{quantizer.name} cannot quantize to {name}; it can to: {able}"
        )


def _check_exports(entries: list[Any], findings: Findings) -> None:
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        name = entry.get("format") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            continue
        place: KeyPath = ("export", index)
        if name in seen:
            first = f"export.{seen[name]}"
            message = f"{name!r} is also {first}; a format is written once a run"
            findings.add((*place, "format"), message)
        seen.setdefault(name, index)
        try:
            plugin = get_exporter(name)
        except ConfigError as error:
            findings.add((*place, "format"), str(error))
            continue
        options = {key: value for key, value in entry.items() if key != "format"}
        try:
            plugin.Options.model_validate(options)
        except ValidationError as error:
            findings.add_validation(error, plugin.Options.model_json_schema(), place)


def _check_transforms(
    entries: list[Any], is_quantized: bool, findings: Findings
) -> None:
    from compress.transforms.catalog import TRANSFORMS, order_problem

    names = []
    for index, entry in enumerate(entries):
        given = {"name": entry} if isinstance(entry, str) else entry
        name = given.get("name") if isinstance(given, dict) else None
        if not isinstance(given, dict) or not isinstance(name, str):
            return  # the schema says so
        place: KeyPath = ("transforms", index)
        names.append(name)
        if name not in TRANSFORMS:
            message = f"unknown transform {name!r}{suggest(name, TRANSFORMS)}"
            findings.add(place, message)
            return
        if name == "awq" and not is_quantized:
            findings.add(place, "awq searches on the plan's grids; add quantize: ...")
        kind = TRANSFORMS[name]
        options = {key: value for key, value in given.items() if key != "name"}
        try:
            kind.Options.model_validate(options)
        except ValidationError as error:
            findings.add_validation(error, kind.Options.model_json_schema(), place)
    problem = order_problem(names)
    if problem is not None:
        findings.add(("transforms", problem[0]), problem[1])
