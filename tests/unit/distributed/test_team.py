"""Processes exchange what they have, and end together when one of them fails."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torchrun_fixtures import outcomes, run_processes

from compress.core.errors import ConfigError
from compress.distributed.team import Team

EXCHANGES = """
import json, os, sys
from pathlib import Path
import torch
from compress.calibration.collect import Moments
from compress.core.errors import ConfigError
from compress.core.scheme import Scheme
from compress.core.tensors import QuantizedTensor
from compress.distributed.codes import from_first
from compress.distributed.team import Team, team
folder, found = Path(sys.argv[1]), {}
windows = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
own = lambda x, rank: {f"a{rank}": x, "b": torch.tensor([rank], dtype=torch.int8)}
for number in (1, 2):  # a process may take part in several runs
    with team("cpu") as (members, device):
        rank = members.rank
        x = torch.full((rank + 1, 3), rank + 0.5, dtype=torch.bfloat16)
        given = own(x, rank) if number == 1 or rank else {}
        seen = members.exchange(given, {"from": rank}, device)
        found["exchanged"] = [
            [{k: [str(v.dtype), v.float().tolist()] for k, v in t.items()}, said]
            for t, said in seen
        ]
        found["told"] = members.tell(f"from {rank}")
        found["alone"] = members.alone(lambda: {"rank": rank})
        found["ahead"] = members.ahead(lambda: rank)
        try:
            members.alone(lambda: (_ for _ in ()).throw(ConfigError("no such key")))
        except Exception as error:
            found["error"] = [str(error), error.exit_code]
        members.check_windows(members.size)
        try:
            members.check_windows(1)
        except Exception as error:
            found["few"] = str(error)
        calls = []
        def part(value):
            calls.append(value)
            total = torch.tensor(value * (rank + 1))
            members.add_([total])
            return float(total)
        found["led"] = members.led(lambda call: call(1.0) + call(10.0), part)
        found["calls"] = calls
        rows = members.rows_at_first(members.share(windows[:, 0, 0]))
        found["rows"] = None if rows is None else rows.tolist()
        moments, whole = Moments(), Moments()
        moments.add(members.share(windows))
        whole.add(windows)
        moments.join_(members)
        a, b = moments.statistics("x"), whole.statistics("x")
        found["hessian"] = [torch.equal(a.hessian, b.hessian), a.tokens, b.tokens]
        largest = torch.tensor([float(rank), -float(rank)])
        members.largest_(largest)
        found["largest"] = largest.tolist()
(folder / f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_processes_exchange(size: int, tmp_path: Path) -> None:
    run_processes(EXCHANGES, tmp_path, None, size=size)
    found = [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(size)]
    rows = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))[:, 0, 0]
    exchanged = [
        [
            {
                f"a{r}": ["torch.bfloat16", [[r + 0.5] * 3] * (r + 1)],
                "b": ["torch.int8", [r]],
            }
            if r
            else {},
            {"from": r},
        ]
        for r in range(size)
    ]
    for rank, one in enumerate(found):
        assert one["exchanged"] == exchanged
        assert one["told"] == "from 0" and one["alone"] == {"rank": 0}
        assert one["ahead"] == rank
        assert one["error"] == ["no such key", 2]
        assert one["few"].startswith("calibration.samples: 1 windows cannot be shared")
        assert one["calls"] == [1.0, 10.0]
        assert one["led"] == 11.0 * sum(range(1, size + 1))
        assert one["rows"] == (None if rank else rows.tolist())
        assert one["hessian"] == [True, 30, 30]
        assert one["largest"] == [size - 1.0, 0.0]


def test_one_process_answers_itself() -> None:
    team, tensors = Team(), {"x": torch.ones(2)}
    assert team.share(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert team.exchange(tensors, 7, "cpu") == [(tensors, 7)]
    assert team.gather(3) == [3] and team.alone(lambda: 4) == 4
    assert team.led(lambda call: call(2.0) + 1, lambda x: 2 * x) == 5


FAILING = """
import os, signal, subprocess, sys, time
import torch.distributed as dist
from compress.core.errors import CompressError, ConfigError
from compress.distributed.team import team
from compress.log import set_up_logging
set_up_logging()
how = sys.argv[2].strip('"')
try:
    with team("cpu") as (members, device):
        members.wait()
        if members.rank == 1:
            if how == "raises":
                raise ConfigError("layer 7: no such scheme")
            os.kill(os.getpid(), signal.SIGKILL)
        if members.rank == 2:
            time.sleep(60)  # computes, and would not notice by itself
        members.wait()
except CompressError as error:
    assert not dist.is_initialized()  # or an exit may abort, and lose its code
    print(f"<{error}>", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def test_an_error_of_one_process_ends_all_with_its_message(tmp_path: Path) -> None:
    started = time.monotonic()
    found = outcomes(FAILING, tmp_path, "raises", size=3)
    assert time.monotonic() - started < 45
    assert [code for code, _ in found] == [2, 2, 2]
    assert "<process 1 of 3" in found[0][1] and "no such scheme>" in found[0][1]
    assert "process 1 of 3" in found[1][1]


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    first, killed = outcomes(FAILING, tmp_path, "dies", size=2)
    assert killed[0] == -9
    assert first[0] == 1 and "--resume" in first[1]


SILENT = """
import os, signal, subprocess, sys, time
from torch.distributed.rendezvous import rendezvous
from compress.distributed.watch import Watch
store, rank, size = next(rendezvous("env://"))
with Watch("run", rank, size, silence=2.0):
    if rank == 1:
        subprocess.Popen(["sh", "-c", f"sleep 14; kill -9 {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_that_is_not_heard_of_counts_as_gone(tmp_path: Path) -> None:
    first, _ = outcomes(SILENT, tmp_path, None)
    assert first[0] == 1 and "process 1 has not been heard of" in first[1]


def test_a_sweep_takes_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.sweeping import sweep

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a sweep takes one process"):
        sweep("never-read.yaml")
