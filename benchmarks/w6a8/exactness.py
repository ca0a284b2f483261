"""Whether the W6A8 kernels compute what the reference says, on the device itself."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from compress.runtime.w6a8 import cuda, reference
from compress.runtime.w6a8.abi import Kernel, Kernels
from compress.runtime.w6a8.arguments import Values
from compress.runtime.w6a8.fused import rms_norm
from compress.runtime.w6a8.tiles import TiledWeight, pack_tiles, unpack_tiles

TOKENS = (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 127, 128, 129, 1000)
ROWS = (1, 8, 15, 16, 17, 1000, 4096, 11008, 32000)
COLUMNS = (32, 96, 128, 160, 3072, 8192, 11008, 14336)
INPUT_GROUPS = (None, 32, 64, 128)
MOST_FEW = 16  # tokens of the kernel for few
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Outcome:
    """What was checked and what failed."""

    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def expect(self, is_true: bool | Tensor, claim: str, case: str) -> None:
        """Count a check, and note it if it fails."""
        self.counts[claim] = self.counts.get(claim, 0) + 1
        if not bool(is_true):
            self.failures.append(f"{claim}: {case}")


@dataclass
class Checks:
    """All checks on one device.

    Attributes:
        kernels: What is tested.
        device: Where.
        kernel: Which is tested.
        outcome: Grows.
    """

    kernels: Kernels
    device: torch.device
    kernel: Kernel = "portable"
    outcome: Outcome = field(default_factory=Outcome)

    def run(self, names: list[str] | None = None) -> Outcome:
        """Run the named checks, or all; one that stops does not stop the others."""
        checks: dict[str, Callable[[], None]] = {
            "inputs": self.inputs,
            "sums": self.sums,
            "results": self.results,
            "repeats": self.repeats,
            "invariance": self.invariance,
            "bad inputs": self.bad_inputs,
            "large": self.large,
            "sources": self.sources,
        }
        for name in names or checks:
            try:
                checks[name]()
                torch.cuda.synchronize()
            except Exception as error:  # the kernels are what is in doubt
                traceback.print_exc()
                self.outcome.failures.append(f"{name}: stopped: {error}")
            print(f"  {name}: done, {len(self.outcome.failures)} failures", flush=True)
        return self.outcome

    def inputs(self) -> None:
        """Codes and scales of inputs are bit-equal to those of the CPU."""
        for dtype in DTYPES:
            for columns in (1, 33, 96, 128, 160, 4096, 11008, 28672):
                x = self.activations(9, columns, dtype)
                x[1], x[2, 0], x[3, -1] = 0, torch.nan, torch.inf
                x[4, columns // 2] = 3e4
                x[5] *= 1e-30 if dtype is not torch.float16 else 1e-6
                for group in (columns, 128, 32):
                    if columns % group == 0:
                        self._inputs(x, group)

    def _inputs(self, x: Tensor, group: int) -> None:
        columns = x.shape[1]
        codes, scales = cuda.quantize(self.kernels, Values(x), group)
        expected, scale = reference.quantize_activations(x.cpu(), group)
        found, case = codes.cpu(), f"{x.dtype} K={columns} group={group}"
        same = torch.equal(found[:, :columns], expected)
        self.outcome.expect(same, "codes of inputs are bit-equal", case)
        bits = scales.cpu().nan_to_num(-1.0), scale.nan_to_num(-1.0)
        self.outcome.expect(torch.equal(*bits), "scales of inputs are bit-equal", case)
        empty = not found[:, columns:].any()
        self.outcome.expect(empty, "inputs are filled up with zeros", case)

    def shapes(self) -> Iterator[tuple[int, int, int]]:
        """Yield tokens, rows, columns: all tokens, and all pairs of sizes."""
        for tokens in self.tokens(TOKENS):
            yield tokens, 1000, 160
            yield tokens, 4096, 3072
        few = self.tokens((1, 9, 64, 24, 8))
        for i, (rows, columns) in enumerate(product(ROWS, COLUMNS)):
            yield few[i % len(few)], rows, columns

    def tokens(self, numbers: Sequence[int]) -> list[int]:
        """Return those that the kernel takes."""
        most = MOST_FEW if self.kernel == "few" else max(numbers)
        return [number for number in numbers if number <= most]

    def sums(self) -> None:
        """Integer sums are bit-equal, for random and for extreme codes."""
        if self.kernel == "few":
            self.whole_sums()
            return
        for tokens, rows, columns in self.shapes():
            for kind in ("random", "largest", "alternating"):
                qa, qw = self.codes(tokens, rows, columns, kind)
                self._sums(qa, qw, 128 if columns > 160 else 32, kind)
        for run in (32, 128) if self.kernel == "hopper" else (32, 64, 128):
            for tokens in (8, 16, 32, 64, 128):
                qa, qw = self.codes(tokens, 1000, 11008, "random")
                self._sums(qa, qw, run, "random")

    def _sums(self, qa: Tensor, qw: Tensor, run: int, kind: str) -> None:
        weight = self.tiled(qw, None)
        filled = torch.nn.functional.pad(qa, (0, -qa.shape[1] % 128))
        found = cuda.sums(self.kernels, filled, weight, run, kernel=self.kernel)
        wide = torch.nn.functional.pad(qw, (0, -qw.shape[1] % 128))
        expected = reference.run_sums(filled, wide, run)
        case = f"M={len(qa)} N={len(qw)} K={qa.shape[1]} run={run} {kind}"
        self.outcome.expect(
            torch.equal(found, expected), "integer sums are bit-equal", case
        )

    def whole_sums(self) -> None:
        """With scales of one results are integers that float32 holds: bit-equal."""
        for tokens, rows, columns in self.shapes():
            for kind in ("random", "largest", "alternating"):
                for group in (None, 32, 128):
                    qa, qw = self.codes(tokens, rows, min(columns, 3072), kind)
                    if group is not None and qw.shape[1] % group:
                        continue
                    self._whole_sums(qa, qw, group, kind)

    def _whole_sums(self, qa: Tensor, qw: Tensor, group: int | None, kind: str) -> None:
        weight = self.tiled(qw, group)
        weight.scales.fill_(1)
        filled = torch.nn.functional.pad(qa, (0, -qa.shape[1] % 128))
        given = filled, torch.ones(len(qa), 1, device=self.device)
        found = cuda.linear_of_codes(
            self.kernels, given, weight, None, dtype=torch.float32
        )
        expected = qa.double() @ qw.double().t()
        case = f"M={len(qa)} N={len(qw)} K={qa.shape[1]} group={group} {kind}"
        self.outcome.expect(
            torch.equal(found.double(), expected), "integer sums are bit-equal", case
        )

    def results(self) -> None:
        """Results are within two ulp and 1e-5 of the sum of magnitudes."""
        for tokens, rows, columns in self.shapes():
            x = self.activations(tokens, columns, torch.bfloat16)
            self._result(x, rows, 32 if columns % 128 else 128, None)
        for dtype in DTYPES:
            for of_weight in (None, 32, 64, 128, 256):
                for of_inputs in (None,) if self.kernel == "few" else INPUT_GROUPS:
                    for tokens in self.tokens((1, 12, 30, 70, 300)):
                        x = self.activations(tokens, 2048, dtype)
                        self._result(x, 1000, of_weight, of_inputs)

    def _result(
        self, x: Tensor, rows: int, of_weight: int | None, of_inputs: int | None
    ) -> None:
        weight, bias = self.weight(rows, x.shape[1], of_weight), self.noise(rows)
        bias = bias.to(x.dtype)
        found = self.linear(x, weight, bias, group=of_inputs)
        exact, tolerance = self.expected(x, weight, bias, of_inputs)
        error = (found.float() - exact).abs()
        case = (
            f"M={len(x)} N={rows} K={x.shape[1]} {x.dtype} weight {of_weight} inputs "
            f"{of_inputs}: {(error / tolerance).max():.2f} of the tolerance"
        )
        self.outcome.expect(
            (error <= tolerance).all(), "results are within tolerance", case
        )

    def expected(
        self, x: Tensor, weight: TiledWeight, bias: Tensor | None, group: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return the reference's float32 result, and how far one may be from it."""
        qa, sa = reference.quantize_activations(x, group)
        qw = unpack_tiles(weight.tiles, weight.shape)
        sw = weight.scales[:, : weight.shape[0]].t()
        exact = reference.linear((qa, sa), (qw, sw), bias, dtype=torch.float32)
        magnitude = reference.linear(
            (qa.abs(), sa), (qw.abs(), sw), None, dtype=torch.float32
        )
        ulp = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
        return exact, 1e-5 * magnitude + 2 * ulp * exact.abs() + 1e-30

    def linear(
        self, x: Tensor, weight: TiledWeight, bias: Tensor | None, *, group: int | None
    ) -> Tensor:
        """Call the kernel under test."""
        return cuda.linear(
            self.kernels, Values(x), weight, bias, group=group, kernel=self.kernel
        )

    def sources(self) -> None:
        """Norms and gates that kernels round are those of torch, but for ties."""
        for kind in ("norm", "norm_plus_one", "gated"):
            for tokens in self.tokens((1, 3, 8, 9, 200)):
                for columns in (4096, 11008, 1056):
                    for dtype in DTYPES:
                        self._source(kind, tokens, columns, dtype)

    def _source(self, kind: str, tokens: int, columns: int, dtype: torch.dtype) -> None:
        norm = (1 + 0.1 * self.noise(columns)).to(dtype)
        if kind == "gated":
            x = 2 * self.noise(tokens, 2 * columns).to(dtype)
            gate, up = x.chunk(2, 1)
            values = Values(x, kind)
            exact = torch.nn.functional.silu(gate) * up
        else:
            x = self.activations(tokens, columns, dtype)
            values = Values(x, kind, norm, 1e-5)
            exact = rms_norm(x, norm, 1e-5, plus_one=kind == "norm_plus_one")
        case = f"{kind} M={tokens} K={columns} {dtype}"
        codes, scales = cuda.quantize(self.kernels, values, None)
        expected, scale = reference.quantize_activations(exact, None)
        apart = (codes[:, :columns].int() - expected.int()).abs()
        close = apart.max() <= 1 and apart.float().mean() <= 0.01
        near = torch.allclose(scales, scale, rtol=2**-7)
        self.outcome.expect(close and near, "codes of norms and gates", case)
        weight = self.weight(1000, columns, 32)
        found = cuda.linear(
            self.kernels, values, weight, None, group=None, kernel=self.kernel
        )
        inputs = codes, scales
        same = cuda.linear_of_codes(self.kernels, inputs, weight, None, dtype=dtype)
        _, tolerance = self.expected(exact, weight, None, None)
        error = (found.float() - same.float()).abs()
        self.outcome.expect(
            (error <= 2 * tolerance).all(), "layers of norms and gates", case
        )

    def repeats(self) -> None:
        """A call twice, and a replayed graph, give the same bits."""
        for tokens, rows, columns in [
            (1, 4096, 4096),
            (8, 8192, 8192),
            (9, 1000, 11008),
            (64, 4096, 4096),
            (500, 1000, 11008),
        ]:
            if tokens not in self.tokens((1, 8, 9, 64, 500)):
                continue
            x = self.activations(tokens, columns, torch.bfloat16)
            weight, case = self.weight(rows, columns, 128), f"M={tokens} N={rows}"
            first = self.linear(x, weight, None, group=None)
            for _ in range(20):
                again = self.linear(x, weight, None, group=None)
                self.outcome.expect(
                    torch.equal(first, again), "a second call is bit-identical", case
                )
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = self.linear(x, weight, None, group=None)
            for _ in range(20):
                replayed.fill_(7)
                graph.replay()
                self.outcome.expect(
                    torch.equal(first, replayed), "a replay is bit-identical", case
                )
            x.copy_(self.activations(tokens, columns, torch.bfloat16) * 2)
            graph.replay()
            fresh = self.linear(x, weight, None, group=None)
            self.outcome.expect(
                torch.equal(fresh, replayed), "a replay reads new inputs", case
            )

    def invariance(self) -> None:
        """A token alone and among others agrees within tolerance."""
        tokens = self.tokens((8, 64))[-1]
        x = self.activations(tokens, 4096, torch.bfloat16)
        weight = self.weight(4096, 4096, 128)
        together = self.linear(x, weight, None, group=None)
        for token in (0, tokens // 2, tokens - 1):
            one = x[token : token + 1].contiguous()
            alone = self.linear(one, weight, None, group=None)
            _, tolerance = self.expected(one, weight, None, None)
            error = (alone.float() - together[token : token + 1].float()).abs()
            self.outcome.expect(
                (error <= 2 * tolerance).all(), "tokens do not mix", str(token)
            )

    def bad_inputs(self) -> None:
        """NaN and infinities spoil their own token, and zeros stay zeros."""
        for group in (None,) if self.kernel == "few" else (None, 128):
            x = self.activations(5, 1024, torch.bfloat16)
            x[1, 700], x[3, 5], x[4] = torch.nan, -torch.inf, 0
            y = self.linear(x, self.weight(300, 1024, 128), None, group=group)
            right = y[[1, 3]].isnan().all() and y[[0, 2]].isfinite().all()
            self.outcome.expect(
                right and not y[4].any(), "bad inputs spoil their token", str(group)
            )

    def large(self) -> None:
        """More than 2^31 bytes of tiles, and elements of the result."""
        rows, columns = 202752, 14336
        shape = (rows // 64, columns // 128, 4, 1536)
        tiles = torch.empty(shape, dtype=torch.uint8, device=self.device)
        tiles.random_(0, 256)
        scales = torch.rand(columns // 128, rows, device=self.device).half()
        weight = TiledWeight(tiles, scales, (rows, columns), 128)
        x = self.activations(2, columns, torch.bfloat16)
        found = self.linear(x, weight, None, group=None)
        self._last_rows(x, found, weight, "tiles beyond 2^31 bytes")
        del tiles, weight, scales
        if self.kernel == "few":
            return
        rows, tokens = 32000, 70000
        weight = self.weight(rows, 128, 128)
        x = self.activations(tokens, 128, torch.bfloat16)
        found = self.linear(x, weight, None, group=None)
        self._last_rows(x[-3:], found[-3:], weight, "results beyond 2^31 elements")

    def _last_rows(
        self, x: Tensor, found: Tensor, weight: TiledWeight, claim: str
    ) -> None:
        last = TiledWeight(
            weight.tiles[-1:], weight.scales[:, -64:], (64, x.shape[1]), 128
        )
        exact, tolerance = self.expected(x, last, None, None)
        error = (found[:, -64:].float() - exact).abs()
        self.outcome.expect((error <= tolerance).all(), claim, "last rows")

    def noise(self, *shape: int) -> Tensor:
        """Return normal float32 numbers, new ones each time."""
        return torch.randn(*shape, device=self.device)

    def activations(self, tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return inputs with columns of different size, as models have them."""
        return (self.noise(tokens, columns) * self.noise(columns).exp()).to(dtype)

    def codes(
        self, tokens: int, rows: int, columns: int, kind: str
    ) -> tuple[Tensor, Tensor]:
        """Return int8 codes of inputs ``[M, K]`` and weights ``[N, K]``."""
        qa = torch.empty(tokens, columns, dtype=torch.int8, device=self.device)
        qw = torch.empty(rows, columns, dtype=torch.int8, device=self.device)
        qa.random_(-127, 128)
        qw.random_(-32, 32)
        if kind == "largest":
            qa.fill_(-127)
            qw.fill_(-32)
        elif kind == "alternating":
            qa[:, ::2], qa[:, 1::2], qw[:, ::2], qw[:, 1::2] = 127, -127, -32, 31
        return qa, qw

    def tiled(self, codes: Tensor, group: int | None) -> TiledWeight:
        """Return codes with random scales."""
        rows, columns = codes.shape
        groups = columns // (group or columns)
        scales = torch.zeros(groups, -(-rows // 64) * 64, device=self.device)
        scales[:, :rows] = torch.rand(groups, rows, device=self.device) * 0.01 + 1e-3
        return TiledWeight(
            pack_tiles(codes), scales.half(), (rows, columns), group or columns
        )

    def weight(self, rows: int, columns: int, group: int | None) -> TiledWeight:
        """Return random codes and scales."""
        if group is not None and columns % group:
            group = None
        return self.tiled(self.codes(1, rows, columns, "random")[1], group)
