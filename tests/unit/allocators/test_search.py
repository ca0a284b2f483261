"""Searches against the optimum of dynamic programming, and their parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from stable_baselines3.common.env_checker import check_env

from compress import registry
from compress.allocators.choices import ChoiceTable
from compress.allocators.evolution import mutate
from compress.allocators.measuring import Measurements
from compress.allocators.ramp import reward
from compress.allocators.ramp.env import AllocationEnv
from compress.allocators.ramp.features import SIZES, Features, Walk
from compress.core.allocation import Allocation, AllocationProblem
from compress.core.contracts import Allocator
from compress.core.errors import AllocationError
from tests.unit.allocators.test_allocators import SMALL, additive_problem


def make(name: str, **options: object) -> Allocator:
    plugin = registry.get_allocator(name)
    return plugin(plugin.Options.model_validate({**SMALL.get(name, {}), **options}))


def optimum(problem: AllocationProblem) -> float:
    """Least loss within the budget: dynamic programming, one byte unit at a time."""
    grain = int(np.gcd.reduce([c.bytes for u in problem.units for c in u.choices]))
    best = np.zeros(problem.budget // grain + 1)
    for unit in problem.units:
        new = np.full(len(best), np.inf)
        for choice in unit.choices:
            size = choice.bytes // grain
            if size < len(best):
                there = best[: len(best) - size] + choice.loss
                new[size:] = np.minimum(new[size:], there)
        best = new
    return float(best[-1])


@pytest.mark.parametrize("name", ("evolution", "ramp", "reinforce"))
def test_a_search_is_within_two_percent_of_the_optimum(name: str) -> None:
    problem = additive_problem(bits=3.5)
    assert make(name).allocate(problem).objective <= 1.02 * optimum(problem)


def test_random_and_uniform_are_far_from_the_optimum() -> None:
    problem = additive_problem(bits=3.5)
    for name in ("random", "uniform"):
        assert make(name).allocate(problem).objective > 1.2 * optimum(problem)


def wrong_predictions() -> AllocationProblem:
    """What is measured differs from what is predicted by a factor for each unit."""
    problem = additive_problem(bits=3.5)
    factors = np.random.default_rng(5).lognormal(0.0, 1.0, len(problem.units))

    def measure(assignment: object, share: float) -> float:
        pairs = zip(problem.units, assignment, factors, strict=True)  # type: ignore
        return float(sum(u.choices[i].loss * f for u, i, f in pairs))

    return AllocationProblem(problem.units, problem.budget, measure)


@pytest.mark.parametrize(
    "name, options",
    (
        ("evolution", {"evaluations": 100}),
        ("reinforce", {"evaluations": 60}),
        ("ramp", {"episodes": 50}),
    ),
)
def test_measuring_corrects_wrong_predictions(
    name: str, options: dict[str, object]
) -> None:
    problem = wrong_predictions()
    start = problem.measure(ChoiceTable.of(problem).greedy(), 1.0)
    assert make(name, **options).allocate(problem).objective < 0.9 * start


@pytest.mark.parametrize("name", ("random", "evolution", "ramp", "reinforce"))
def test_no_assignment_is_measured_twice_on_the_same_share(name: str) -> None:
    problem = additive_problem()
    seen: list[tuple[object, float]] = []
    before = problem.measure

    def measure(assignment: object, share: float) -> float:
        seen.append((assignment, share))
        return before(assignment, share)  # type: ignore[arg-type]

    problem.measure = measure
    make(name).allocate(problem)
    assert len(seen) == len(set(seen)) > 0


@pytest.mark.parametrize("name", ("random", "evolution", "reinforce"))
def test_evaluations_stay_within_what_was_asked(name: str) -> None:
    found = make(name, evaluations=30).allocate(additive_problem())
    assert 0 < found.evaluations <= 30


def test_a_mutation_keeps_the_budget_and_spends_it() -> None:
    problem = additive_problem(bits=3.5)
    table, draw = ChoiceTable.of(problem), np.random.default_rng(0)
    for _ in range(200):
        child = mutate(table.greedy(), table, draw)
        assert problem.fits(child)
        raised = [
            table.size(child) - unit.choices[i].bytes + unit.choices[i + 1].bytes
            for unit, i in zip(problem.units, child, strict=True)
            if i + 1 < len(unit.choices)
        ]
        assert min(raised) > problem.budget


@pytest.mark.parametrize("version", SIZES)
def test_the_environment_passes_both_checkers(version: str) -> None:
    problem = additive_problem(blocks=1)
    features = Features.of(problem, version)
    env = AllocationEnv(problem, features, Measurements(problem))
    check_env(env)
    check_gymnasium(env, skip_render_check=True)


@pytest.mark.parametrize("version", SIZES)
def test_features_of_a_walk_are_those_along_the_assignment(version: str) -> None:
    problem = additive_problem()
    features = Features.of(problem, version)
    chosen = np.random.default_rng(1).integers(0, 6, len(problem.units)).tolist()
    walk, seen = Walk(features), []
    for choice in chosen:
        seen.append(walk.see())
        walk.choose(choice)
    np.testing.assert_allclose(np.stack(seen), features.along(chosen), atol=1e-6)


def test_the_reward_falls_with_the_bits_and_is_continuous_at_its_joints() -> None:
    bits = np.linspace(3.5, 5.0, 1501)
    values = np.array([reward.budget(b, 4.25) for b in bits])
    steps = np.diff(values)
    assert (steps <= 1e-12).all()
    assert (steps > -0.03 - 1e-9).all()  # 40 (b - B) a bit is 30 at 5.0
    assert reward.budget(4.0, 4.25) == 0.0
    assert reward.budget(4.25, 4.25) == pytest.approx(-0.5)
    assert reward.quality(0.1, 0.1) == 0.0
    assert reward.quality(0.0, np.log(2)) == pytest.approx(5.0)
    assert reward.quality(np.log(2), 0.0) == pytest.approx(-5.0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "new"
    make("ramp", save_policy=folder).allocate(additive_problem())
    return folder


def test_a_policy_serves_a_deeper_model_with_one_measurement(policy: Path) -> None:
    def other() -> AllocationProblem:
        return additive_problem(blocks=6, bits=3.5, seed=9)

    def apply() -> Allocation:
        return make("ramp", policy=policy).allocate(other())

    found = apply()
    assert found.evaluations == 1
    assert found.objective < make("uniform").allocate(other()).objective
    assert found.assignment == apply().assignment


def test_a_policy_is_not_a_pickle(policy: Path) -> None:
    names = sorted(path.name for path in policy.iterdir())
    assert names == ["policy.json", "policy.safetensors"]


def test_a_policy_for_other_bits_is_refused(policy: Path) -> None:
    problem = additive_problem()
    units = tuple(
        type(unit)(unit.name, unit.layers, unit.weights, unit.choices[:4], unit.traits)
        for unit in problem.units
    )
    fewer = AllocationProblem(units, problem.budget, problem.measure)
    with pytest.raises(AllocationError, match="2 to 8 bits.*2 to 5"):
        make("ramp", policy=policy).allocate(fewer)


@pytest.mark.parametrize("damage", ("missing", "version", "cut"))
def test_a_damaged_policy_is_refused(policy: Path, tmp_path: Path, damage: str) -> None:
    card = (policy / "policy.json").read_text()
    weights = (policy / "policy.safetensors").read_bytes()
    if damage != "missing":
        if damage == "version":
            card = card.replace('"v2"', '"v9"')
        (tmp_path / "policy.json").write_text(card)
        cut = weights[: len(weights) // 2] if damage == "cut" else weights
        (tmp_path / "policy.safetensors").write_bytes(cut)
    with pytest.raises(AllocationError):
        make("ramp", policy=tmp_path).allocate(additive_problem())


def test_a_policy_is_either_applied_or_trained() -> None:
    with pytest.raises(ValueError, match="trains nothing"):
        make("ramp", policy="a", save_policy="b")
