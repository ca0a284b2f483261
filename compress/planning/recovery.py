"""Time and memory of recovery: two whole models, what is trained, and one pass.

A value that is trained takes 16 bytes: itself, its gradient and two moments, all in
float32; the copy of the best state, and a checkpoint while it is written, lie in memory
of the host. A run that time ends takes that time; one that steps end takes as many
passes as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.config.recover_section import (
    DistillOptions,
    RecoverOptions,
    SoftPromptOptions,
)
from compress.core.artifact import ModelDescription
from compress.planning import duration
from compress.planning.duration import Speeds
from compress.planning.exchanges import GENERATED_AT_ONCE
from compress.planning.pruning_memory import GRAPH
from compress.planning.shapes import Shapes
from compress.recovery.distill import LOGITS_BYTES
from compress.recovery.soft_prompt import prompt_tokens

_FLOAT = 4
_TRAINED_BYTES = 16
_BEST_BYTES = 4
# The values, the best ones and two moments, once more as the bytes of a file.
_CHECKPOINT_BYTES = 2 * 16
_PASSES_TO_READ = 6  # a weight of either model, and of what is written
_PASSES_TO_STEP = 12  # a trained value: gradient, clipping, AdamW
_LOGITS_PASSES = 20  # two softmaxes, their KL and its gradient
_LOGITS_COPIES = 6  # of a chunk's logits, at once


@dataclass(frozen=True)
class RecoverWork:
    """What a recovery does.

    Attributes:
        options: Of ``distill`` or ``soft_prompt``.
        student: Sizes of the pruned model.
        teacher: Of the original.
        trained: Values that are trained.
        replaced: Weights of the student whose place they take.
        importances: Tokens that ranks of blocks are measured on; 0 for none.
    """

    options: RecoverOptions
    student: Shapes
    teacher: Shapes
    trained: int
    replaced: int
    importances: int

    @property
    def full(self) -> bool:
        """Whether weights are trained, whose gradients are products of their own."""
        return self.replaced > self.trained // 2


def trained_values(options: RecoverOptions, model: ModelDescription) -> tuple[int, int]:
    """Return how many values are trained, and how many weights they stand for.

    Args:
        options: Of recovery.
        model: The student.
    """
    if isinstance(options, SoftPromptOptions):
        return prompt_tokens(options) * int(model.config["hidden_size"]), 0
    assert isinstance(options, DistillOptions)
    family = model.family
    inside = (f"{family.blocks}.", f"{family.final_norm}.")
    sizes = {n: i for n, i in model.tensors.items() if n.startswith(inside)}
    if options.train == "full":
        weights = sum(info.elements for info in sizes.values())
        return weights, weights
    shapes = [model.tensors[f"{name}.weight"].shape for name in model.linears()]
    adapters = sum(options.rank * sum(shape) for shape in shapes)
    norms = [i.elements for n, i in sizes.items() if len(i.shape) == 1 and "norm" in n]
    values = sum(norms) if options.norms else 0
    return adapters + values, values


def recover_seconds(work: RecoverWork, speeds: Speeds) -> float:
    """Return the prediction for the stage, on the device whose speeds are given."""
    options = work.options
    weights = work.student.parameters + work.teacher.parameters
    files = work.student.stored_bytes * work.student.parameters
    total = weights * _PASSES_TO_READ * speeds.host_pass
    total += files / duration.DISK_BYTES_A_SECOND
    total += duration.sweep(work.student, work.importances, speeds)
    ends = []
    if options.seconds is not None:
        ends.append(options.seconds)  # reading the models included
    if options.steps is not None:
        ends.append(options.steps * _step(work, speeds) + _beside(work, speeds))
    return total + min(ends)


def recover_bytes(
    work: RecoverWork, *, dtype: torch.dtype, on_gpu: bool
) -> tuple[int, int]:
    """Return the peaks in memory of the host, beside the process, and of a GPU.

    Args:
        work: What is done.
        dtype: Arithmetic.
        on_gpu: Whether both models are on a GPU; if not, the second number is 0.
    """
    width, options = dtype.itemsize, work.options
    student, teacher = work.student, work.teacher
    frozen = student.parameters - work.replaced
    held = width * (teacher.parameters + frozen) + _TRAINED_BYTES * work.trained
    if width < _FLOAT:
        held += width * work.replaced  # rounded for the products of a pass
    tokens = options.batch * options.sequence_length
    graph = GRAPH[0] * student.hidden + GRAPH[1] * student.inner
    blocks = 1 if options.gradient_checkpointing else student.blocks
    kept = student.blocks * student.hidden if options.gradient_checkpointing else 0
    passing = width * tokens * (blocks * graph + kept)
    room = LOGITS_BYTES["cuda" if on_gpu else "cpu"]
    logits = _LOGITS_COPIES * min(room, _FLOAT * tokens * student.vocabulary)
    saved = (_BEST_BYTES + _CHECKPOINT_BYTES) * work.trained
    device = held + passing + logits
    if on_gpu:
        return saved + student.stored_bytes * student.largest, device
    return device + _BEST_BYTES * work.trained, 0


def _step(work: RecoverWork, speeds: Speeds) -> float:
    options = work.options
    tokens = options.batch * options.accumulate * options.sequence_length
    passes = 2 + work.full + options.gradient_checkpointing
    total = passes * duration.sweep(work.student, tokens, speeds)
    total += duration.sweep(work.teacher, tokens, speeds)
    total += _heads(work, 3 * tokens, tokens, speeds)
    return total + _PASSES_TO_STEP * work.trained * speeds.device_pass


def _beside(work: RecoverWork, speeds: Speeds) -> float:
    """Evaluations on held-out text, and text of the teacher's own."""
    options = work.options
    tokens = options.held_out * options.sequence_length
    count = 1 + min(options.evaluations, options.steps or options.evaluations)
    one = duration.sweep(work.student, tokens, speeds)
    one += duration.sweep(work.teacher, tokens, speeds)
    total = count * (one + _heads(work, 2 * tokens, tokens, speeds))
    generated = options.generated or 0
    written = generated * options.sequence_length
    if options.writing_seconds is not None:
        total += options.writing_seconds
    if written:
        batches = -(-generated // GENERATED_AT_ONCE)
        positions = batches * options.sequence_length
        total += duration.sweep(work.teacher, written, speeds)
        total += positions * work.teacher.parameters * speeds.device_pass
    return total


def _heads(work: RecoverWork, products: int, tokens: int, speeds: Speeds) -> float:
    """Logits of both models and gradients of one, each a product."""
    size = work.student.vocabulary * work.student.hidden
    total = 2 * products * size / speeds.blocks
    passes = _LOGITS_PASSES * tokens * work.student.vocabulary
    return total + passes * speeds.device_pass
