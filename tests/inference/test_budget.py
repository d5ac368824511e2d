"""The token budget from synthetic costs (fast CPU, slow CPU, GPU), and its correction by running batches."""

import random

import pytest

from embedding_service.inference.budget import (
    LONGEST_TEXTS,
    SLOWER,
    UNNOTICED_SECONDS,
    BatchBudget,
    BatchCost,
    fit,
    measure,
)

# Seconds per batch and per token.
MACHINES = {
    "fast CPU": (0.001, 20e-6),
    "slow CPU": (0.020, 500e-6),
    "GPU": (0.004, 1e-6),
    "no overhead": (1e-6, 100e-6),
}
each_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)


def budget(cost: tuple[float, float], length: int = 256, most: int = 8192) -> BatchBudget:
    return BatchBudget(BatchCost(*cost), max_seq_length=length, max_batch_tokens=most)


def rate(cost: tuple[float, float], tokens: float) -> float:
    return tokens / (cost[0] + cost[1] * tokens)


@each_machine
@pytest.mark.parametrize("length", [16, 256, 4096])
def test_the_budget_is_the_smallest_that_is_nearly_as_fast_as_the_best(machine, length):
    found = budget(machine, length)
    wait = max(UNNOTICED_SECONDS, LONGEST_TEXTS * BatchCost(*machine).seconds(length))

    def fits(tokens: int) -> bool:
        fastest = rate(machine, tokens) >= (1 - SLOWER) * rate(machine, 8192)
        return fastest or BatchCost(*machine).seconds(tokens) >= wait

    smallest = next(tokens for tokens in range(length, 8193) if tokens == 8192 or fits(tokens))
    assert abs(found.tokens - smallest) <= 1
    assert found.batch_seconds <= wait + 2 * machine[1]


@each_machine
@pytest.mark.parametrize("most", [48, 256, 1_000_000])
def test_no_budget_exceeds_the_memory(machine, most):
    assert budget(machine, most=most).tokens <= most


@each_machine
def test_the_overhead_of_a_batch_is_expressed_in_tokens(machine):
    assert budget(machine).overhead_tokens == round(machine[0] / machine[1])


# Measuring


@each_machine
def test_the_cost_is_found_from_noisy_measurements(machine):
    noise = random.Random(1)

    def run(tokens: int) -> float:
        took = (machine[0] + machine[1] * tokens) * noise.uniform(1, 1.1)
        return took * 5 if noise.random() < 0.1 else took  # another process was in the way

    cost = fit(measure(run, 16, 8192, seconds=2.0))
    for tokens in (64, 512, 2048):
        assert cost.seconds(tokens) == pytest.approx(BatchCost(*machine).seconds(tokens), rel=0.2)


@pytest.mark.parametrize("seconds_per_token", [1e-7, 1e-4, 1e-2, 1.0])
def test_measuring_stops_at_its_time_limit_or_after_three_batches(seconds_per_token):
    spent: list[float] = []

    def run(tokens: int) -> float:
        spent.append(seconds_per_token * tokens)
        return spent[-1]

    measured = measure(run, 16, 8192, seconds=0.5)
    assert 16 in measured
    assert sum(spent) <= max(0.5, 3 * 16 * seconds_per_token) * 1.1


def test_one_batch_size_is_enough_to_estimate_the_cost():
    cost = fit({16: 0.002})
    assert cost.batch_seconds > 0
    assert cost.token_seconds > 0


def test_a_device_whose_time_hardly_grows_with_tokens_gets_large_batches():
    assert budget(_parts(fit({16: 0.005, 1024: 0.005, 8192: 0.0049}))).tokens > 4096


def _parts(cost: BatchCost) -> tuple[float, float]:
    return cost.batch_seconds, cost.token_seconds


# While running


def observe(found: BatchBudget, cost: tuple[float, float], batches: int, seed: int = 1) -> None:
    """Batches of many sizes, up to the budget, on a machine with this cost."""
    source = random.Random(seed)
    for _ in range(batches):
        tokens = source.randint(16, found.tokens)
        found.observe(tokens, (cost[0] + cost[1] * tokens) * source.uniform(0.95, 1.05))


@pytest.mark.parametrize("truth", ["slow CPU", "GPU"])
def test_a_wrong_start_is_corrected(truth):
    found = budget(MACHINES["fast CPU"])
    observe(found, MACHINES[truth], 5000)
    right = budget(MACHINES[truth])
    assert found.tokens == pytest.approx(right.tokens, rel=0.3)


@each_machine
@pytest.mark.parametrize("factor", [2, 5])
def test_a_cost_measured_on_a_busy_machine_is_corrected_by_a_few_batches(machine, factor):
    found = budget((machine[0] * factor, machine[1] * factor))
    assert not found.confirmed
    observe(found, machine, 120)
    assert found.confirmed
    assert found.cost.seconds(2048) == pytest.approx(BatchCost(*machine).seconds(2048), rel=0.4)


def test_a_batch_that_ends_just_after_another_streams_does_not_distort_it():
    machine = MACHINES["GPU"]
    found = budget(machine)
    for _ in range(500):
        for share in (1.9, 0.1):
            found.observe(1000, share * BatchCost(*machine).seconds(1000))
    assert found.cost.seconds(1000) == pytest.approx(BatchCost(*machine).seconds(1000), rel=0.15)


def test_a_steady_machine_keeps_its_budget():
    found = budget(MACHINES["slow CPU"])
    before = found.tokens
    observe(found, MACHINES["slow CPU"], 5000)
    assert found.tokens == before


def test_interrupted_batches_do_not_distort_it():
    found = budget(MACHINES["slow CPU"])
    before = found.tokens
    source = random.Random(2)
    for number in range(2000):
        observe(found, MACHINES["slow CPU"], 1, seed=number)
        if source.random() < 0.05:
            found.observe(found.tokens, 10.0)
    assert found.tokens == pytest.approx(before, rel=0.35)


def test_small_batches_alone_do_not_distort_the_cost_of_a_token():
    """After a quiet hour of single texts, the next busy hour must not start with a useless estimate."""
    found = budget(MACHINES["slow CPU"])
    before = found.tokens
    for _ in range(5000):
        found.observe(16, BatchCost(*MACHINES["slow CPU"]).seconds(16))
    assert found.tokens == before
