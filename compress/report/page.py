"""The report as one HTML page: no network, no library, readable without the script."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from compress.report.allocation import budget_table, scheme_table, unit_table
from compress.report.allocation_plots import bits_map, budget_bar, progress_plot
from compress.report.html import document, draw, paragraph
from compress.report.layers import SENSITIVITY_NOTE, layer_table
from compress.report.plots import histogram_plots, ladder_plot, layer_plot, size_plot
from compress.report.pruning import block_table, pruning_table, recovery_table
from compress.report.samples import samples_section
from compress.report.serving import (
    cache_table,
    parts_table,
    prompt_table,
    upgrades_table,
)
from compress.report.svg import element
from compress.report.tables import (
    Report,
    Table,
    distance_table,
    export_table,
    group_table,
    provenance_table,
    quality_table,
    run_table,
    size_table,
    verdict,
)
from compress.report.tasks import task_table
from compress.report.training_plots import training_plot
from compress.report.transforms import transform_table
from compress.report.tuning import tuning_table
from compress.report.wording import (
    GRADES,
    RERUN_NOTE,
    branch,
    calibration_note,
    count,
    divergence,
    fixed,
    grade_of,
    methods_used,
    nats,
    number_at,
    percent,
    size,
    text_name,
    times,
    worst_text,
)


def render_page(report: Report) -> str:
    """Return the whole page; every text from outside is escaped."""
    label = str(branch(report, "model").get("label", "model"))
    sections = {
        "size": ("Size", _size_section(report)),
        "quality": ("Quality", _quality_section(report)),
        "samples": ("Samples", samples_section(report)),
        "pruning": (
            "Pruning",
            draw(pruning_table(report)) + _headed(block_table(report), class_="tall"),
        ),
        "recovery": (
            "Recovery",
            _training(report, "recovery", recovery_table(report))
            + _headed(prompt_table(report)),
        ),
        "transforms": ("Transforms", draw(transform_table(report))),
        "tuning": ("Tuning", _training(report, "tuning", tuning_table(report))),
        "serving": ("Inputs and cache", _serving_section(report)),
        "budget": ("Budget", _budget_section(report)),
        "layers": ("Layers", _layer_section(report)),
        "exports": ("Exports", _export_section(report)),
        "run": ("Time and memory", draw(run_table(report))),
        "provenance": ("Provenance", _provenance_section(report)),
    }
    present = {key: part for key, part in sections.items() if part[1]}
    body = element(
        "div",
        _header(report, label, {key: title for key, (title, _) in present.items()}),
        element("main", _cards(report), _warnings(report), _sections(present)),
        element(
            "footer",
            "Written by compress. The same numbers, for programs: ",
            element("code", "report.json"),
            ".",
        ),
        class_="wrap",
    )
    return document(f"{label}: compression report", body)


def _header(report: Report, label: str, links: dict[str, str]) -> str:
    model = branch(report, "model")
    facts = (
        f"{model.get('family', 'unknown')} family, "
        f"{count(number_at(model, 'parameters'))} parameters, "
        f"{count(number_at(model, 'blocks'))} blocks, {model.get('dtype')}. "
        f"Compressed: {methods_used(report)}."
    )
    items = [
        element("li", element("a", escape(title), href=f"#{key}"))
        for key, title in links.items()
    ]
    return element(
        "header",
        element("h1", escape(label), ": compression report"),
        paragraph(facts),
        paragraph(_when(str(report.get("date") or "")), "soft"),
        element("nav", element("ul", *items), aria_label="Parts of the report"),
    )


def _when(date: str) -> str:
    """Return an ISO date as people write it."""
    return date.replace("+00:00", " UTC").replace("T", " ", 1)


def _sections(present: dict[str, tuple[str, str]]) -> str:
    return "".join(
        element("section", element("h2", title, id=key), content)
        for key, (title, content) in present.items()
    )


def _warnings(report: Report) -> str:
    items = [element("li", escape(str(text))) for text in report.get("warnings") or []]
    if not items:
        return ""
    title = "Warning" if len(items) == 1 else "Warnings"
    return element(
        "div",
        element("h2", title),
        element("ul", *items),
        class_="warnings",
        role="note",
    )


def _cards(report: Report) -> str:
    cards = [
        *_size_cards(report),
        *_quality_cards(report),
        *_verification_card(report),
    ]
    return element("ul", *cards, class_="cards") if cards else ""


def _card(what: str, value: str, more: str) -> str:
    """Return one number that a reader wants first, with what it depends on."""
    return element(
        "li",
        element("div", escape(what), class_="what"),
        element("div", value, class_="value"),
        element("div", escape(more), class_="more"),
    )


def _size_cards(report: Report) -> Iterable[str]:
    sizes, bits = branch(report, "size_bytes"), branch(report, "bits_per_weight")
    base = number_at(sizes, "base")
    for name in sizes:
        bytes_ = number_at(sizes, name)
        if name != "base" and bytes_ is not None:
            share = f"{percent(bytes_ / base)} of {size(base)}" if base else ""
            yield _card(f"Size, {name}", escape(size(bytes_)), share)
    linears = number_at(bits, "linears")
    if linears is not None:
        files = [
            f"{name} {fixed(number_at(bits, name))}"
            for name in bits
            if name not in ("base", "linears")
        ]
        more = "quantized layers"
        more += f"; whole file: {', '.join(files)}" if files else ""
        yield _card("Bits per weight", fixed(linears), more)


def _quality_cards(report: Report) -> Iterable[str]:
    """Return the numbers of the worst text: a mean over texts would hide it."""
    name = worst_text(report)
    if name is None:
        return
    base = branch(report, "metrics", "base", "texts", name)
    worst = branch(report, "metrics", "compressed", "texts", name)
    total = len(branch(report, "metrics", "compressed", "texts"))
    short = text_name(name)
    where = f"worst of {total} texts: {short}" if total > 1 else f"on {short}"
    protocol = f"{worst.get('protocol')}, {where}"
    ratio = times(number_at(worst, "ppl_ratio"))
    if number_at(worst, "ppl_ratio") is not None:
        before, after = (fixed(number_at(m, "perplexity")) for m in (base, worst))
        yield _card("Perplexity", escape(ratio), f"{before} → {after}; {protocol}")
    grade = grade_of(number_at(worst, "kl"))
    if grade is not None:
        number = f"{grade.symbol} {nats(number_at(worst, 'kl'))}"
        lamp = element("span", number, class_=f"light {grade.name}")
        more = f"{grade.name}: {divergence(worst)} nats; {protocol}"
        yield _card("KL to base", lamp, more)
    prompted = branch(report, "metrics", "with_prompt", "texts", name)
    if number_at(prompted, "kl") is not None:
        tokens = count(number_at(branch(report, "recovery", "served"), "tokens"))
        ratio = times(number_at(prompted, "ppl_ratio"))
        more = f"after {tokens} virtual tokens; perplexity {ratio}; {where}"
        yield _card("KL with the prompt", nats(number_at(prompted, "kl")), more)
    if number_at(worst, "top1") is not None:
        yield _card("Same top-1", percent(number_at(worst, "top1")), where)


def _verification_card(report: Report) -> Iterable[str]:
    exports = branch(report, "exports")
    if not exports:
        return
    words = {name: verdict(branch(exports, name, "verify")) for name in exports}
    passed = sum(word == "passed" for word in words.values())
    value = f"{passed} of {len(exports)}"
    if "FAILED" in words.values():
        value = element("span", f"{value}", class_="failed")
    yield _card(
        "Exports verified",
        value,
        "; ".join(f"{n}: {word}" for n, word in words.items()),
    )


def _size_section(report: Report) -> str:
    plot = size_plot(report)
    table = element("div", draw(size_table(report)))
    return element("div", table, plot, class_="figures") if plot else table


def _quality_section(report: Report) -> str:
    table, tasks = quality_table(report), task_table(report)
    if not table.rows:
        return _headed(tasks)
    parts = [draw(table)]
    distance = distance_table(report)
    ladder = ladder_plot(report)
    if ladder:
        parts.append(_lamps())
        plots = [ladder, *histogram_plots(report)]
        parts.append(element("div", *plots, class_="figures"))
        parts.append(_headed(distance))
    return "".join([*parts, _headed(tasks)])


def _headed(table: Table, *, class_: str = "") -> str:
    """Return a table under its title; nothing without rows."""
    drawn = draw(table, class_=class_)
    return element("h3", escape(table.title)) + drawn if drawn else ""


def _training(report: Report, key: str, table: Table) -> str:
    """Return the table of a training stage beside its curves."""
    plot = training_plot(branch(report, key), title=key.title())
    drawn = draw(table)
    if not plot:
        return drawn
    return element("div", element("div", drawn), plot, class_="figures")


def _serving_section(report: Report) -> str:
    tables = parts_table(report), upgrades_table(report), cache_table(report)
    return "".join(map(_headed, tables))


def _lamps() -> str:
    items = [
        element(
            "li",
            element("span", grade.label, class_=f"light {grade.name}"),
            f": {escape(grade.meaning)}",
        )
        for grade in GRADES
    ]
    note = (
        "The limits are a rule of thumb from models of 8 billion parameters, where "
        "published 5-bit files reach 0.005 and 3-bit files 0.05 to 0.16. Small models "
        "lose more at the same number of bits."
    )
    return element("ul", *items, class_="lamps") + paragraph(note, "note")


def _budget_section(report: Report) -> str:
    """Return how the plan came about; nothing for a run without a budget."""
    if not branch(report, "allocation"):
        return ""
    schemes, units = scheme_table(report), unit_table(report)
    plots = budget_bar(report), progress_plot(report)
    notes = branch(report, "allocation").get("notes") or []
    left_out = element("ul", *(element("li", escape(str(note))) for note in notes))
    return "".join(
        [
            draw(budget_table(report)),
            element("div", *plots, class_="figures"),
            _headed(schemes),
            _headed(units, class_="tall"),
            element("h3", "Candidates left out") + left_out if notes else "",
        ]
    )


def _layer_section(report: Report) -> str:
    groups = group_table(report)
    if not groups.rows:
        return ""
    losses = f" {SENSITIVITY_NOTE}" if branch(report, "allocation") else ""
    plots = [
        bits_map(report),
        layer_plot(
            report,
            "error",
            title="Error of each layer's output",
            note=f"Relative squared error. {calibration_note(report)}",
        ),
        layer_plot(
            report,
            "weight_error",
            title="Error of each layer's weights",
            note="Relative squared error; every weight counts the same.",
        ),
    ]
    return "".join(
        [
            element("div", *plots, class_="figures layers") if any(plots) else "",
            _headed(groups, class_="tall"),
            element("h3", "Every layer"),
            paragraph(f"Choose a column's heading to sort by it.{losses}", "caption"),
            layer_table(report),
        ]
    )


def _export_section(report: Report) -> str:
    table = export_table(report)
    if not table.rows:
        return ""
    items = []
    for name, export in branch(report, "exports").items():
        files = [element("code", escape(str(f))) for f in export.get("files") or []]
        items += [element("li", escape(name), ": ", file) for file in files]
        items += [
            element("li", escape(f"{name}: {n}")) for n in export.get("notes") or []
        ]
    return draw(table) + element("ul", *items)


def _provenance_section(report: Report) -> str:
    parts = []
    if report.get("command"):
        command = element("code", escape(str(report["command"])))
        parts += [element("h3", "Command"), element("pre", command, tabindex=0)]
    if report.get("config_text"):
        config = element("code", escape(str(report["config_text"])))
        parts += [element("h3", "Config"), element("pre", config, tabindex=0)]
    if parts:
        parts.append(paragraph(RERUN_NOTE, "note"))
    table = provenance_table(report)
    parts += [element("h3", "Versions, seeds and hashes"), draw(table, class_="plain")]
    return "".join(parts)
