"""Which requests are admitted: simulated on engines of all speeds, without threads.

No request is refused that leaves a fifth of its time, none that is accepted is late, and whoever is told to
try again later is accepted about then.
"""

import heapq
import random
from itertools import count

import numpy as np
import pytest

from embedding_service.engine import EmbedRequest
from embedding_service.errors import DeadlineExceeded, Overloaded, ServiceError, TooLarge
from embedding_service.inference.budget import BatchBudget, BatchCost
from embedding_service.inference.pending import PendingRequest, rows_of
from embedding_service.inference.scheduler import Scheduler
from tests.inference.fake_runtime import DIMENSION, FakeRuntime, text

RATES = pytest.mark.parametrize("rate", [2_000, 50_000, 2_000_000])
DEVICES = pytest.mark.parametrize("on_cpu", [False, True], ids=["accelerator", "CPU"])

# A batch costs as much as this many tokens, besides its own.
OVERHEAD_TOKENS = 64


class Engine:
    """A scheduler and streams whose batches take what the budget says, at `rate` tokens a second in all."""

    def __init__(self, rate: float, *, on_cpu: bool, max_queued_tokens: int = 2_000_000) -> None:
        streams = 2 if on_cpu else 1
        model = FakeRuntime(streams=streams, on_cpu=on_cpu)
        cost = BatchCost(OVERHEAD_TOKENS * streams / rate, streams / rate)
        model.budget = BatchBudget(cost, max_seq_length=256, max_batch_tokens=8192)  # type: ignore[assignment]
        self.model, self.rate = model, rate
        self.scheduler = Scheduler(model, max_queued_tokens=max_queued_tokens, cache_bytes=0)
        self.now = 0.0
        self._idle = streams
        self._running: list[tuple[float, int, list, int]] = []
        self._sequence = count()
        self.late: list[PendingRequest] = []
        self.finished: dict[PendingRequest, float] = {}
        self.accepted: list[PendingRequest] = []

    @property
    def batch_seconds(self) -> float:
        return self.model.budget.batch_seconds

    def work(self, tokens: float) -> float:
        """How long this many tokens keep the whole engine busy, in batches of its budget."""
        streams = len(self.model.streams) if self.model.on_cpu else 1
        return tokens / self.model.budget.tokens * self.batch_seconds / streams

    def send(self, texts: int, tokens: int, limit: float, **fields) -> ServiceError | PendingRequest:
        """A request that arrives now, of texts of this many tokens; the error, or the accepted one."""
        number = next(self._sequence)
        names = [text(tokens, f"{number} {index}") for index in range(texts)]
        request = EmbedRequest(texts=names, deadline=self.now + limit, **fields)
        pending = self.scheduler.read(request, print, number, self.now)
        pending.attach(self.model.prepare(names, None, None), 0, texts * tokens)
        try:
            self.scheduler.accept(pending, self.now)
        except ServiceError as error:
            return error
        self.accepted.append(pending)
        self._start()
        return pending

    def run(self, until: float = float("inf")) -> None:
        """Let the time pass until then, or until nothing is left to do."""
        while self._running and self._running[0][0] <= until:
            self.step()
        if until < float("inf"):
            self.now = max(self.now, until)

    def step(self) -> None:
        """Let the next batch end."""
        self.now, _, shares, tokens = heapq.heappop(self._running)
        self._idle += 1
        vectors = np.zeros((sum(len(rows) for _, rows in shares), DIMENSION), np.float32)
        self.scheduler.ran(tokens)
        for pending in self.scheduler.deliver(shares, vectors, vectors, self.now, self.now):
            self.finished[pending] = self.now
        self._start()

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def _start(self) -> None:
        while self._idle and self.scheduler.queue:
            shares, tokens, late = self.scheduler.take(self.now)
            self.late += late
            for pending in late:
                self.scheduler.end(pending)
            if shares:
                self._idle -= 1
                lengths = np.concatenate([part.lengths for part in rows_of(shares)])
                padded = int(lengths.max()) * len(lengths)
                ends = self.now + self.model.budget.cost.seconds(padded)
                batch = (ends, next(self._sequence), shares, tokens)
                heapq.heappush(self._running, batch)

    def assert_all_in_time(self) -> None:
        self.run()
        assert not self.late
        for pending in self.accepted:
            assert self.finished[pending] <= pending.request.deadline


def after_nothing(_engine: Engine) -> None:
    pass


def after_idling(engine: Engine) -> None:
    engine.now += 1000


def after_tiny(engine: Engine) -> None:
    for _ in range(40):
        engine.send(1, 12, 1e6)
        engine.run()


def after_bulk(engine: Engine) -> None:
    engine.send(300, 200, 1e6)
    engine.run()


BEFORE = pytest.mark.parametrize("before", [after_nothing, after_idling, after_tiny, after_bulk])


@RATES
@DEVICES
@BEFORE
@pytest.mark.parametrize(("requests", "texts"), [(1, 256), (4, 64), (32, 8), (256, 1)])
def test_what_fits_with_a_fifth_to_spare_is_accepted_and_in_time(rate, on_cpu, before, requests, texts):
    engine = Engine(rate, on_cpu=on_cpu)
    before(engine)
    limit = (engine.work(256 * 200) + 2 * engine.batch_seconds) / 0.8
    for _ in range(requests):
        assert isinstance(engine.send(texts, 200, limit), PendingRequest)
    engine.assert_all_in_time()


@RATES
@DEVICES
def test_small_requests_beside_bulk_are_accepted_and_all_are_in_time(rate, on_cpu):
    engine = Engine(rate, on_cpu=on_cpu)
    limit = (engine.work(1000 * 100) + 2 * engine.batch_seconds) / 0.75
    assert isinstance(engine.send(1000, 100, limit), PendingRequest)
    for number in range(60):
        engine.run(number * limit / 200)
        assert isinstance(engine.send(1, 12, max(limit / 20, 8 * engine.batch_seconds)), PendingRequest)
    engine.assert_all_in_time()


@DEVICES
def test_bulk_within_the_memory_keeps_small_requests_out_only_by_their_number(on_cpu):
    engine = Engine(50_000, on_cpu=on_cpu, max_queued_tokens=50_000)
    for _ in range(2):
        assert isinstance(engine.send(240, 100, 1000), PendingRequest)
    assert isinstance(engine.send(240, 100, 1000), Overloaded)
    for _ in range(100):
        assert isinstance(engine.send(1, 12, 10), PendingRequest)


@RATES
@DEVICES
@pytest.mark.parametrize("size", [(1, 12), (16, 60), (100, 200)], ids=["small", "middle", "large"])
@pytest.mark.parametrize("crowd", [(1, 200), (64, 100), (400, 100)], ids=["singles", "bulk", "larger bulk"])
def test_whoever_is_told_to_try_again_is_accepted_about_then(rate, on_cpu, size, crowd):
    engine = Engine(rate, on_cpu=on_cpu)
    limit = (engine.work(60_000) + 4 * engine.batch_seconds) / 0.8
    while not isinstance(engine.send(crowd[0], crowd[1], limit), Overloaded):
        pass
    own = max(limit / 3, 1.5 * engine.work(size[0] * size[1]) + 2 * engine.batch_seconds)
    outcome = engine.send(size[0], size[1], own)
    if isinstance(outcome, PendingRequest):
        return
    assert isinstance(outcome, Overloaded)
    said, began = outcome.retry_after_seconds or 0, engine.now
    while isinstance(engine.send(size[0], size[1], own), Overloaded):
        engine.step()
    waited = engine.now - began
    slack = max(0.05, 2 * engine.batch_seconds)
    assert waited / 2 - slack <= said <= 2 * waited + slack


@RATES
def test_what_an_idle_engine_cannot_do_in_time_is_refused_with_the_size_that_it_can(rate):
    engine = Engine(rate, on_cpu=False)
    limit = engine.work(20_000)
    budget = engine.model.budget
    budget.observe(budget.tokens, budget.batch_seconds)
    refused = engine.send(300, 100, limit)
    assert isinstance(refused, TooLarge)
    possible = int(refused.reason.split("at most about ")[1].split()[0])
    assert 14_000 < possible < 17_000
    assert isinstance(engine.send(possible // 100, 100, limit), PendingRequest)
    engine.assert_all_in_time()


def test_a_cost_measured_on_a_busy_machine_refuses_nothing_for_its_size():
    """Clients do not try again after TooLarge."""
    engine = Engine(50_000, on_cpu=False)
    limit = engine.work(20_000)
    cost = engine.model.budget.cost
    cost.batch_seconds *= 3
    cost.token_seconds *= 3
    assert isinstance(engine.send(150, 100, limit), PendingRequest)


@DEVICES
def test_background_requests_keep_nobody_out(on_cpu):
    engine = Engine(50_000, on_cpu=on_cpu)
    limit = engine.work(100_000) / 0.7
    assert isinstance(engine.send(1000, 100, limit, priority="background"), PendingRequest)
    assert isinstance(engine.send(900, 100, limit), PendingRequest)
    assert isinstance(engine.send(1000, 100, limit, priority="background"), Overloaded)


def test_a_deadline_that_passed_already_is_refused():
    assert isinstance(Engine(50_000, on_cpu=False).send(1, 5, 0.0), DeadlineExceeded)


@RATES
@DEVICES
@pytest.mark.parametrize("seed", range(3))
def test_ten_times_the_load_is_refused_or_in_time_and_the_engine_stays_busy(rate, on_cpu, seed):
    engine, chance = Engine(rate, on_cpu=on_cpu), random.Random(seed)
    unit = engine.work(20_000)
    refused: list[Overloaded] = []
    for _ in range(500):
        texts = chance.choice([1, 1, 1, 4, 32, 100])
        tokens = chance.choice([12, 60, 200])
        limit = chance.uniform(1, 10) * (unit + 4 * engine.batch_seconds)
        outcome = engine.send(texts, tokens, limit)
        if not isinstance(outcome, PendingRequest):
            refused.append(outcome)
        engine.run(engine.now + engine.work(texts * tokens) / 10)
    end = engine.now
    assert len(refused) > 50
    assert all(isinstance(one, Overloaded) for one in refused)
    engine.run()
    # What arrives later decides how full the batches are: four in a hundred may be late.
    late = [
        one
        for one in engine.accepted
        if engine.finished.get(one, one.entry.deadline + 1e9) > one.entry.deadline
    ]
    assert len(late) <= len(engine.accepted) / 25
    served = sum(one.tokens for one in engine.accepted)
    assert engine.work(served) > 0.8 * end
