"""A finished run as a repository of the hub, with a card that carries its report.

What goes up is one export, the soft prompt if there is one, and the card. Neither the
calibration text nor the work directory goes, and paths of this machine are cut down to
the names of their files, in the card and in every text file.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from compress.core.errors import ConfigError, ExportError
from compress.report.markdown import render_markdown
from compress.report.public import PathHider
from compress.report.wording import branch, plain_data

if TYPE_CHECKING:
    from compress.result import Result

_CARD = "README.md"
_PROMPT = "prompt"
_TEXTS = (".json", ".md", ".jinja", ".txt", ".py")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Publication:
    """What goes to the hub, or went.

    Attributes:
        repo: ``owner/name``.
        files: Paths in the repository and their bytes.
        card: Text of ``README.md``.
        url: Where it is; ``None`` after a dry run.
    """

    repo: str
    files: Mapping[str, int]
    card: str
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**vars(self), "files": dict(self.files)}

    def text(self) -> str:
        """Return what a terminal shows."""
        done = f"is at {self.url}" if self.url else "would get, and nothing was sent:"
        rows = [f"  {size:>14,} bytes  {name}" for name, size in self.files.items()]
        return "\n".join([f"{self.repo} {done}", *rows])


def push_to_hub(
    result: Result,
    repo: str,
    *,
    format: str | None = None,
    private: bool = True,
    dry_run: bool = False,
    force: bool = False,
    token: str | None = None,
    message: str = "Upload a compressed model",
) -> Publication:
    """Create a repository if it is not there, and upload an export with its report.

    Args:
        result: A finished run.
        repo: ``owner/name``.
        format: Which export; may be left out where there is one.
        private: Whether a repository that is created can be seen by its owner alone.
        dry_run: Only return what would go.
        force: Upload although an export failed its check.
        token: Of the hub; the one of ``hf auth login`` if left out.
        message: Of the commit.

    Raises:
        ConfigError: The name is none, or there is no such export.
        ExportError: An export failed its check, or the hub refuses it.
    """
    if not _HUB_ID.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no repository; give owner/name")
    name = _chosen(result, format)
    if result.failures and not force:
        raise ExportError(
            f"{result.failures[0]}; nothing is uploaded. Mend it, or force it"
        )
    with tempfile.TemporaryDirectory(
        prefix=".push-", dir=result.workdir, ignore_cleanup_errors=True
    ) as made:
        folder = Path(made)
        _stage(result, name, folder)
        card = card_of(result, name, repo)
        (folder / _CARD).write_text(card, "utf-8")
        files = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        url = None
        if not dry_run:
            url = _uploaded(folder, repo, private=private, token=token, message=message)
    return Publication(repo, files, card, url)


def _chosen(result: Result, format: str | None) -> str:
    exports = branch(result.report, "exports")
    if not exports:
        raise ConfigError(
            f"{result.workdir} has no export; write one with "
            f"`compress export {result.workdir} --to safetensors`"
        )
    if format is None and len(exports) == 1:
        return str(next(iter(exports)))
    if format is None or format not in exports:
        names = ", ".join(exports)
        raise ConfigError(f"which export? there are {names}; name one as the format")
    return format


def _stage(result: Result, name: str, folder: Path) -> None:
    """Gather what goes up: large files as links, texts without paths."""
    sources = {folder: result.workdir / "export" / name}
    if (result.workdir / _PROMPT).is_dir():
        sources[folder / _PROMPT] = result.workdir / _PROMPT
    hide = _hider(result).file
    for target, source in sources.items():
        if not source.is_dir():
            raise ExportError(f"{source} is gone; run again with --resume")
        target.mkdir(exist_ok=True)
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            new = target / path.relative_to(source)
            new.parent.mkdir(parents=True, exist_ok=True)
            if path.name == "tokenizer.json" or path.suffix not in _TEXTS:
                _link(path, new)
            elif path.suffix == ".json":
                data = json.loads(path.read_text("utf-8"))
                new.write_text(json.dumps(hide(data), indent=2) + "\n", "utf-8")
            else:
                new.write_text(path.read_text("utf-8"), "utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def card_of(result: Result, name: str, repo: str) -> str:
    """Return the model card: how to load it, then the report without paths.

    Args:
        result: A finished run.
        name: Of the export.
        repo: Where it will be.
    """
    report = _hider(result).report(plain_data(result.report))
    written = result.workdir / "export" / name / _CARD
    if written.is_file():
        head = written.read_text("utf-8").replace("FOLDER", repo)
        head = head.replace(
            "is in the `report.md` of the run that made these files",
            "is in the report below",
        )
    else:
        head = _head(report, name, repo)
    origin = str(report["config"]["model"]["path"])
    if _HUB_ID.fullmatch(origin) and "base_model:" not in head:
        head = head.replace("---\n", f"---\nbase_model: {origin}\n", 1)
    parts = [head.rstrip()]
    if (result.workdir / _PROMPT).is_dir():
        parts.append(_prompt_text(report, repo))
    parts.append(
        render_markdown(report).replace("\n## ", "\n### ").replace("# ", "## ", 1)
    )
    return "\n\n".join(parts).rstrip() + "\n"


def _head(report: Mapping[str, Any], name: str, repo: str) -> str:
    """Return front matter and loading of a format whose export has no card."""
    files = branch(report, "exports", name).get("files") or []
    file = PurePath(str(files[0])).name if files else "FILE"
    label = branch(report, "model").get("label")
    lines = ["---", f"library_name: {name}", "pipeline_tag: text-generation"]
    lines += ["tags: [compressed, quantized]", "---", "", f"# {label}, compressed", ""]
    if name == "gguf":
        lines += ["```sh", f"llama-cli --hf-repo {repo} --hf-file {file}", "```", ""]
    lines.append(f"The main file is `{file}`. The licence of the base model applies.")
    return "\n".join(lines)


def _prompt_text(report: Mapping[str, Any], repo: str) -> str:
    tokens = branch(report, "recovery", "served").get("tokens")
    return (
        "## Soft prompt\n\n"
        f"The folder `{_PROMPT}` is a peft adapter of {tokens} virtual tokens, which "
        "take as many of the context. The model runs without it too.\n\n"
        "```python\nfrom peft import PeftModel\n\n"
        f'model = PeftModel.from_pretrained(model, "{repo}", subfolder="{_PROMPT}")\n'
        "```"
    )


def _hider(result: Result) -> PathHider:
    return PathHider(result.report, (result.workdir, result.workdir.resolve()))


def _uploaded(
    folder: Path, repo: str, *, private: bool, token: str | None, message: str
) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ExportError(
            f"the hub refuses {repo}: {error}. Log in with `hf auth login`, or give a "
            "token that may write there; the same command tries again"
        ) from error
    return str(made)
