"""The batcher's properties, with a runtime whose batches, failures and speed the tests decide."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedding_service.engine import Embeddings
from embedding_service.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailure,
    Overloaded,
    ServiceError,
    TextTooLong,
    Unavailable,
)
from embedding_service.inference.admission import Admission
from embedding_service.inference.batcher import Batcher
from embedding_service.inference.fair_queue import FairQueue
from embedding_service.inference.pending import PendingRequest, normalize
from embedding_service.inference.runtime import DeviceLost, OutOfMemory
from embedding_service.inference.scheduler import Scheduler
from tests.inference.fake_runtime import (
    Answer,
    FakeRuntime,
    Gate,
    lengths,
    padded,
    request,
    submit,
    text,
    vector_of,
    vectors_of,
)
from tests.service import wait_until


def held(build, runtime: FakeRuntime, **arguments) -> tuple[Batcher, Gate]:
    """A batcher whose model is busy with a first text, so that what comes next must queue."""
    gate = Gate()
    after, runtime.on_forward = runtime.on_forward, gate
    batcher = build(runtime, **arguments)
    submit(batcher, [text(3, "first")])
    assert gate.entered.wait(60)
    runtime.batches.clear()
    runtime.on_forward = after
    return batcher, gate


def expect_vectors(outcome: Embeddings | ServiceError, texts, task: str | None = None) -> None:
    assert isinstance(outcome, Embeddings), outcome
    expected = normalize(np.stack([vector_of(one, task) for one in texts]))
    assert np.abs(outcome.vectors - expected).max() < 1e-5


# 1. Groups


def test_only_texts_of_one_group_share_a_batch(build):
    runtime = FakeRuntime()
    batcher, gate = held(build, runtime)
    answers = [submit(batcher, [text(8, n)], input_type=["query", "document"][n % 2]) for n in range(40)]
    gate.open()
    for n, answer in enumerate(answers):
        expect_vectors(answer.wait(), [text(8, n)], task=["query", "document"][n % 2])
    assert all(len({tokens.group for tokens in batch}) == 1 for batch in runtime.batches)


# 2. Order


@pytest.mark.parametrize("seed", range(3))
def test_every_text_gets_its_own_vector_in_its_own_place(build, seed):
    batcher, gate = held(build, FakeRuntime(max_batch_tokens=300))
    wanted = {}
    for name in range(50):
        count = random.Random(seed * 50 + name).choice([1, 3, 30, 300])
        texts = [text(n, f"{name} {i}") for i, n in enumerate(lengths(name, count))]
        wanted[submit(batcher, texts)] = texts
    gate.open()
    for answer, texts in wanted.items():
        expect_vectors(answer.wait(), texts)


def test_tokens_truncations_and_dimensions_are_those_of_the_request(build):
    batcher = build(FakeRuntime(max_seq_length=20))
    texts = [text(5), text(50), text(20), text(21)]
    outcome = submit(batcher, texts, dimensions=3).wait()
    assert (outcome.tokens, outcome.truncated) == (65, [1, 3])
    expected = normalize(np.stack([vector_of(one) for one in texts])[:, :3])
    assert np.allclose(outcome.vectors, expected, atol=1e-6)
    raw = submit(batcher, texts, normalize=False).wait()
    assert np.array_equal(raw.vectors, np.stack([vector_of(one) for one in texts]))


def test_a_text_that_would_be_cut_is_refused_by_its_index_where_cutting_is_off(build):
    batcher = build(FakeRuntime(max_seq_length=20))
    outcome = submit(batcher, [text(5), text(21)], overflow="error").wait()
    assert isinstance(outcome, TextTooLong)
    assert "texts[1] has more than 20 tokens" in outcome.message


# 3. Fairness


def test_tokenization_of_a_bulk_request_holds_nobody_up(build):
    """The bulk request's first piece hangs in the tokenizer; a single text passes it."""
    hung, release = threading.Event(), threading.Event()

    def slow(texts) -> None:
        if len(texts) > 1:
            hung.set()
            assert release.wait(60)

    batcher = build(FakeRuntime(on_prepare=slow))
    bulk = submit(batcher, [text(5, i) for i in range(500)])
    assert hung.wait(60)
    expect_vectors(submit(batcher, [text(5, "single")]).wait(60), [text(5, "single")])
    assert not bulk.done
    release.set()
    assert isinstance(bulk.wait(), Embeddings)


# 4. Failures are narrowed


def failing_on(word: str, error: type[Exception] = RuntimeError):
    def check(batch) -> None:
        if any(word in tokens.text for tokens in batch):
            raise error("injected")

    return check


@pytest.mark.parametrize("seed", range(5))
def test_one_poisoned_text_among_a_hundred_requests_is_exactly_one_error(build, seed):
    runtime = FakeRuntime(on_forward=failing_on("poison"))
    batcher, gate = held(build, runtime)
    guilty = random.Random(seed).randrange(100)
    answers = {}
    for name in range(100):
        texts = [text(n, f"{name} {i}") for i, n in enumerate(lengths(seed + name, 1 + name % 3))]
        if name == guilty:
            texts[-1] += " poison"
        answers[name] = (submit(batcher, texts), texts)
    gate.open()
    for name, (answer, texts) in answers.items():
        if name == guilty:
            assert isinstance(answer.wait(), ModelFailure)
            assert f"texts[{len(texts) - 1}]" in answer.wait().message
        else:
            expect_vectors(answer.wait(), texts)
    assert batcher.queued_tokens == 0


def test_out_of_memory_is_halved_away_and_lowers_the_budget(build):
    def little_memory(batch) -> None:
        if padded(batch) > 100:
            raise OutOfMemory("injected")

    runtime = FakeRuntime(max_batch_tokens=800, max_seq_length=50, on_forward=little_memory)
    batcher, gate = held(build, runtime)
    texts = [text(20, i) for i in range(200)]
    answer = submit(batcher, texts)
    gate.open()
    expect_vectors(answer.wait(), texts)
    failed = [batch for batch in runtime.batches if padded(batch) > 100]
    assert padded(failed[0]) == 800
    assert len(failed) < 10, "the budget did not follow"


def test_a_text_that_never_fits_fails_alone(build):
    runtime = FakeRuntime(on_forward=failing_on("huge", OutOfMemory))
    batcher, gate = held(build, runtime)
    texts = [text(9, i) for i in range(20)]
    huge, fine = submit(batcher, [*texts, text(9, "huge")]), submit(batcher, texts)
    gate.open()
    assert "texts[20] does not fit" in huge.wait().message
    expect_vectors(fine.wait(), texts)


# 5. Vectors that are no numbers


def spoiled(batch) -> np.ndarray:
    vectors = np.stack([vector_of(tokens.text) for tokens in batch])
    for row, tokens in enumerate(batch):
        if "nan" in tokens.text:
            vectors[row, 1] = np.nan
        if "inf" in tokens.text:
            vectors[row] = np.inf
    return vectors


def test_a_vector_that_is_not_finite_is_computed_again_alone(build):
    runtime = FakeRuntime(on_forward=spoiled)
    batcher, gate = held(build, runtime)
    texts = [text(9, "a"), text(9, "nan"), text(9, "b"), text(9, "inf")]
    answer = submit(batcher, texts)
    gate.open()
    expect_vectors(answer.wait(), texts)
    assert [tokens.text for tokens in runtime.exactly] == [texts[1], texts[3]]


@pytest.mark.parametrize("second", ["nan", "error"])
def test_a_vector_that_stays_not_finite_fails_its_request_and_names_the_text(build, second):
    runtime = FakeRuntime(on_forward=spoiled)

    def exact(_one):
        if second == "error":
            raise RuntimeError("injected")
        return np.full((1, 8), np.nan, np.float32)

    runtime.exact.forward = exact
    batcher, gate = held(build, runtime)
    bad, good = submit(batcher, [text(9, "a"), text(9, "nan")]), submit(batcher, [text(9, "c")])
    gate.open()
    assert isinstance(bad.wait(), ModelFailure)
    assert "texts[1] has a vector that is not finite" in bad.wait().message
    expect_vectors(good.wait(), [text(9, "c")])


def test_only_the_request_waits_while_a_vector_is_computed_again(build):
    runtime, waiting, release = FakeRuntime(on_forward=spoiled), threading.Event(), threading.Event()

    def exact(one):
        waiting.set()
        assert release.wait(60)
        return runtime.forward_exact(one)

    runtime.exact.forward = exact
    batcher = build(runtime)
    texts = [text(9, "a"), text(9, "nan")]
    slow = submit(batcher, texts, seconds=120)
    assert waiting.wait(60)
    late = submit(batcher, [text(9, "inf")], seconds=0.05)
    gone = submit(batcher, [text(9, "nan gone")])
    batcher.cancel(gone)
    for number in range(3):
        good = [text(9, number), text(9, f"{number} more")]
        expect_vectors(submit(batcher, good).wait(60), good)
    assert not slow.done
    past = time.monotonic() + 0.06
    wait_until(lambda: time.monotonic() > past)
    release.set()
    expect_vectors(slow.wait(60), texts)
    assert isinstance(late.wait(60), DeadlineExceeded)
    wait_until(lambda: batcher.queued_tokens == 0)
    assert not gone.done
    assert [tokens.text for tokens in runtime.exactly] == [texts[1]]


def test_a_device_that_is_lost_while_a_vector_is_computed_again_is_reported(build):
    runtime, reasons = FakeRuntime(on_forward=spoiled), []

    def lose(_one):
        raise DeviceLost("injected")

    runtime.exact.forward = lose
    batcher = build(runtime, on_device_lost=reasons.append)
    assert isinstance(submit(batcher, [text(9, "nan")]).wait(60), Unavailable)
    assert reasons == ["injected"]


# 6. Deadlines


def test_work_whose_deadline_passed_in_the_queue_never_reaches_the_model(build):
    runtime = FakeRuntime()
    batcher, gate = held(build, runtime)
    late = submit(batcher, [text(9, "late")], seconds=0.5)
    late_bulk = submit(batcher, [text(9, f"late {i}") for i in range(300)], seconds=0.5)
    fine = submit(batcher, [text(9, "fine")])
    past = time.monotonic() + 0.5
    wait_until(lambda: time.monotonic() > past)
    gate.open()
    assert isinstance(fine.wait(), Embeddings)
    assert isinstance(late.wait(), DeadlineExceeded)
    assert isinstance(late_bulk.wait(), DeadlineExceeded)
    assert [tokens.text for batch in runtime.batches for tokens in batch] == [text(9, "fine")]
    assert batcher.queued_tokens == 0


def test_work_whose_deadline_passed_is_not_tokenized(build):
    hung, release = threading.Event(), threading.Event()

    def slow(texts) -> None:
        if "slow" in texts[0]:
            hung.set()
            assert release.wait(60)

    runtime = FakeRuntime(on_prepare=slow)
    batcher = build(runtime)
    first = submit(batcher, [text(5, f"slow {i}") for i in range(100)])
    assert hung.wait(60)
    late = submit(batcher, [text(5, f"late {i}") for i in range(100)], seconds=0.5)
    past = time.monotonic() + 0.5
    wait_until(lambda: time.monotonic() > past)
    release.set()
    assert isinstance(late.wait(), DeadlineExceeded)
    assert isinstance(first.wait(), Embeddings)
    assert not [one for one in runtime.prepared if "late" in one]


def test_a_deadline_that_passed_already_is_refused(build):
    assert isinstance(submit(build(FakeRuntime()), [text(5)], seconds=-1).wait(), DeadlineExceeded)


# Admission


@pytest.mark.parametrize("texts_a_request", [1, 64])
def test_a_full_queue_refuses_and_says_how_long_to_wait(build, texts_a_request):
    batcher, gate = held(build, FakeRuntime(), max_queued_tokens=4000)
    answers = [
        submit(batcher, [text(30, f"{name} {i}") for i in range(texts_a_request)]) for name in range(200)
    ]
    wait_until(lambda: any(answer.done for answer in answers))
    gate.open()
    outcomes = [answer.wait() for answer in answers]
    refused = [outcome for outcome in outcomes if not isinstance(outcome, Embeddings)]
    assert 0 < len(refused) < len(outcomes)
    for outcome in refused:
        assert isinstance(outcome, Overloaded)
        # 4,000 tokens at a little over 10 us each.
        assert 0.01 < (outcome.retry_after_seconds or 0) < 0.5
    assert batcher.queued_tokens == 0


def test_a_text_is_charged_with_what_the_model_can_read_of_it(build):
    """A text of 100,000 characters, truncated to 256 tokens, must not fill the queue."""
    batcher, gate = held(build, FakeRuntime(), max_queued_tokens=2000)
    answers = [submit(batcher, [text(9999, "x" * 100_000 + str(i))]) for i in range(5)]
    gate.open()
    for answer in answers:
        assert isinstance(answer.wait(), Embeddings)


def test_what_waits_is_counted_in_the_tokens_that_were_read(build):
    runtime = FakeRuntime()
    batcher, gate = held(build, runtime)
    before = batcher.queued_tokens
    answers = [
        submit(batcher, [text(n % 90 + 3, f"{n} {size}") for n in range(size)]) for size in (1, 20, 600)
    ]
    wait_until(lambda: len(runtime.prepared) == 1 + 621)
    tokens = sum(n % 90 + 3 for size in (1, 20, 600) for n in range(size))
    wait_until(lambda: batcher.queued_tokens == before + tokens)
    gate.open()
    assert sum(answer.wait().tokens for answer in answers) == tokens  # type: ignore[misc]
    assert batcher.queued_tokens == 0


def test_a_request_without_texts_is_refused(build):
    assert isinstance(submit(build(FakeRuntime()), []).wait(), InvalidRequest)


# 7. Every accepted request gets one outcome


@pytest.mark.parametrize("seed", range(12))
def test_every_accepted_request_gets_one_outcome_whatever_fails(build, seed):
    """Random sizes, deadlines, cancellations, and failures of every part; at last also a lost device."""
    chance = random.Random(seed)
    lock = threading.Lock()

    def fail(_texts_or_batch) -> np.ndarray | None:
        with lock:
            throw = chance.random()
        if throw < 0.05:
            raise OutOfMemory("injected")
        if throw < 0.10:
            raise RuntimeError("injected")
        if throw < 0.12:
            raise MemoryError("injected")
        if throw < 0.13 and seed % 4 == 0 and hasattr(_texts_or_batch[0], "length"):
            raise DeviceLost("injected")
        if throw < 0.16 and hasattr(_texts_or_batch[0], "length"):
            return np.full((len(_texts_or_batch), 8), np.nan, np.float32)
        if throw < 0.17 and hasattr(_texts_or_batch[0], "length"):
            return np.zeros((0, 8), np.float32)
        return None

    streams = {"streams": 2, "all_cores": True} if seed % 3 else {}
    runtime = FakeRuntime(on_forward=fail, on_prepare=fail, seconds_per_token=2e-7, **streams)
    lost = threading.Event()
    batcher = build(runtime, max_queued_tokens=20_000, on_device_lost=lambda _reason: lost.set())
    accepted: list[tuple[Answer, list[str]]] = []

    def client(number: int) -> None:
        own = random.Random(seed * 1000 + number)
        for name in range(40):
            count = own.choice([1, 1, 1, 4, 40, 400])
            texts = [text(n, f"{number} {name} {i}") for i, n in enumerate(lengths(name, count))]
            answer = Answer()
            calls = [(0, request(texts, own.choice([0.001, 0.05, 30])))]
            batcher.submit(calls, answer, may_run=own.random() < 0.5)
            if own.random() < 0.05:
                batcher.cancel(answer)
            else:
                accepted.append((answer, texts))
            if own.random() < 0.3:
                answer.within(0.02)

    with ThreadPoolExecutor(6) as clients:
        list(clients.map(client, range(6)))
    vectors = 0
    for answer, texts in accepted:
        outcome = answer.wait()
        if isinstance(outcome, Embeddings):
            vectors += 1
            expect_vectors(outcome, texts)
    assert vectors or lost.is_set()
    wait_until(lambda: batcher.queued_tokens == 0, "an empty queue")
    assert all(len(answer.outcomes) == 1 for answer, _ in accepted)
    if not lost.is_set():
        expect_vectors(_until_success(batcher), [text(5, "after")])


def _until_success(batcher: Batcher) -> Embeddings | ServiceError:
    for _ in range(200):
        outcome = submit(batcher, [text(5, "after")]).wait()
        if isinstance(outcome, Embeddings):
            return outcome
    return outcome


def test_a_lost_device_fails_what_waits_and_refuses_what_comes(build):
    lost = []
    runtime = FakeRuntime()
    batcher, gate = held(build, runtime, on_device_lost=lost.append)
    runtime.on_forward = failing_on("lost", DeviceLost)
    answers = [submit(batcher, [text(9, "lost")]), submit(batcher, [text(200, i) for i in range(500)])]
    gate.open()
    for answer in answers:
        assert isinstance(answer.wait(), Unavailable)
    assert lost == ["injected"]
    assert isinstance(submit(batcher, [text(9)]).wait(), Unavailable)


def test_a_fault_of_the_batcher_itself_ends_the_process_instead_of_hanging_it(build, monkeypatch):
    lost = []
    batcher = build(FakeRuntime(), on_device_lost=lost.append)

    def broken(*_arguments):
        raise KeyError("injected")

    monkeypatch.setattr(FairQueue, "take", broken)
    assert isinstance(submit(batcher, [text(9)]).wait(60), Unavailable)
    assert len(lost) == 1


def test_closing_fails_what_waits(build):
    batcher, gate = held(build, FakeRuntime())
    waiting = submit(batcher, [text(9)])
    batcher.close("over")
    assert isinstance(waiting.wait(), Unavailable)
    gate.open()
    assert isinstance(submit(batcher, [text(9)]).wait(), Unavailable)


def test_a_cancelled_request_is_not_run_and_frees_its_place(build):
    runtime = FakeRuntime()
    batcher, gate = held(build, runtime)
    before = batcher.queued_tokens
    answer = Answer()
    batcher.submit([(0, request([text(9, "gone")]))], answer)
    batcher.cancel(answer)
    assert batcher.queued_tokens == before
    fine = submit(batcher, [text(9, "fine")])
    gate.open()
    fine.wait()
    assert not answer.done
    assert not [t for batch in runtime.batches for t in batch if "gone" in t.text]


def test_a_recomputation_counts_as_running(build):
    """So that the watchdog sees a hang there too."""
    runtime = FakeRuntime(on_forward=spoiled)
    seen = []
    batcher = build(runtime)

    def exact(one):
        seen.append(batcher.running_since)
        return vectors_of([one])

    runtime.exact.forward = exact
    submit(batcher, [text(9, "nan")]).wait()
    assert seen[0] is not None
    wait_until(lambda: batcher.running_since is None)


# 8. A fault at any stage costs its own request


STAGES = {
    "reading": (Scheduler, "read"),
    "admission": (Admission, "admit"),
    "tokenizing": (FakeRuntime, "prepare"),
    "queueing": (FairQueue, "push"),
    "running": (FakeRuntime, "forward"),
    "delivering": (PendingRequest, "receive"),
    "making the answer": (PendingRequest, "outcome"),
}


@pytest.mark.parametrize("texts", [1, 300], ids=["small", "large"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_at_any_stage_fails_its_request_alone_and_ends_no_thread(build, monkeypatch, stage, texts):
    owner, name = STAGES[stage]
    real, left = getattr(owner, name), [1]

    def broken(*arguments, **named):
        if left[0]:
            left[0] -= 1
            raise KeyError("injected")
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, broken)
    runtime = FakeRuntime(max_batch_tokens=10_000)
    batcher = build(runtime, on_device_lost=pytest.fail)
    outcomes: dict[int, Embeddings | ServiceError] = {}

    def ask(number: int) -> None:
        own = [text(5, f"{number} {index}") for index in range(texts)]
        batcher.submit([(number, request(own))], outcomes.update)
        wait_until(lambda: number in outcomes, "an outcome")

    ask(0)
    if stage == "running" and texts > 1:
        assert isinstance(outcomes[0], Embeddings)  # it was halved away
    else:
        assert isinstance(outcomes[0], ModelFailure)
    for number in range(1, 4):
        ask(number)
        assert isinstance(outcomes[number], Embeddings)
    assert batcher.queued_tokens == 0


class Panic(BaseException):
    """As the Rust tokenizer raises it: not an Exception."""


@pytest.mark.parametrize("texts", [1, 300], ids=["small", "large"])
def test_a_panic_of_the_tokenizer_fails_its_request_alone(build, texts):
    def panic(batch) -> None:
        if "9 bad" in batch:
            raise Panic

    batcher = build(FakeRuntime(max_batch_tokens=10_000, on_prepare=panic))
    outcomes: dict[int, Embeddings | ServiceError] = {}
    calls = [
        (number, request([text(9, name)] * texts)) for number, name in enumerate(["good", "bad", "fine"])
    ]
    batcher.submit(calls, outcomes.update)
    wait_until(lambda: len(outcomes) == 3, "all outcomes")
    assert [type(outcomes[number]) for number in range(3)] == [Embeddings, ModelFailure, Embeddings]
    assert batcher.queued_tokens == 0


def test_a_job_never_waits_for_texts_that_could_not_be_queued(build, monkeypatch):
    batcher = build(FakeRuntime())
    push, left = FairQueue.push, [1]

    def fail_once(*arguments) -> None:
        if left[0]:
            left[0] -= 1
            raise MemoryError
        push(*arguments)

    monkeypatch.setattr(FairQueue, "push", fail_once)
    outcomes: dict[int, Embeddings | ServiceError] = {}
    batcher.submit([(number, request([text(5, "same")])) for number in range(2)], outcomes.update)
    wait_until(lambda: len(outcomes) == 2, "both outcomes")
    assert [type(outcomes[number]) for number in range(2)] == [ModelFailure, Embeddings]
    assert batcher.queued_tokens == 0


def test_a_receiver_that_raises_ends_no_thread(build):
    batcher = build(FakeRuntime())
    heard = threading.Event()

    def broken(_outcomes) -> None:
        heard.set()
        raise OSError("injected")

    batcher.submit([(1, request([text(5)]))], broken)
    assert heard.wait(60)
    assert isinstance(submit(batcher, [text(5)]).wait(), Embeddings)


# 9. Requests that come together


def test_requests_that_come_together_are_tokenized_together_and_answered_together(build):
    runtime = FakeRuntime()
    batcher, gate = held(build, runtime)
    runtime.parallel.clear()
    heard: list[list] = []
    calls = [(n, request([text(5, n), text(6, n)])) for n in range(6)]
    calls += [(6, request([text(5)], input_type="query")), (7, request([])), (8, request([text(9, "\0")]))]
    batcher.submit(calls, lambda found: heard.append(list(found)))
    # One call for each kind, and one more try for each request beside the text that is no text.
    assert len(runtime.parallel) == 2 + 7
    gate.open()
    wait_until(lambda: sum(map(len, heard)) == 9, "all outcomes")
    outcomes = {number: outcome for together in heard for number, outcome in together}
    for number in range(6):
        expect_vectors(outcomes[number], [text(5, number), text(6, number)])
    expect_vectors(outcomes[6], [text(5)], task="query")
    assert isinstance(outcomes[7], InvalidRequest)
    assert (type(outcomes[8]), outcomes[8].index) == (InvalidRequest, 0)
    assert max(map(len, heard)) >= 6


def test_a_receiver_that_has_gone_loses_its_requests_and_no_others(build):
    runtime = FakeRuntime()
    batcher, gate = held(build, runtime)
    heard: list = []

    def gone(found) -> None:
        heard.extend(found)

    batcher.submit([(n, request([text(5, f"gone {n}")])) for n in range(5)], gone)
    fine = submit(batcher, [text(5, "fine")])
    batcher.cancel(gone)
    gate.open()
    fine.wait()
    assert not heard
    assert not [one for batch in runtime.batches for one in batch if "gone" in one.text]


@pytest.mark.parametrize(
    ("accelerator", "texts", "busy", "parallel"),
    [
        (True, 300, True, True),
        (True, 32, True, True),
        (True, 1, True, False),
        (False, 300, True, False),
        (False, 300, False, True),
        (False, 32, False, False),
    ],
)
def test_the_tokenizer_has_its_own_threads_where_cores_are_free(build, accelerator, texts, busy, parallel):
    runtime = FakeRuntime(on_cpu=not accelerator)
    batcher, gate = held(build, runtime)
    if not busy:
        gate.open()
        wait_until(lambda: batcher.running_since is None)
    runtime.parallel.clear()
    submit(batcher, [text(5, n) for n in range(texts)])
    wait_until(lambda: runtime.parallel)
    assert runtime.parallel[0] is parallel
    gate.open()


# 10. Streams


def test_the_next_batch_is_launched_before_the_last_one_is_waited_for(build):
    """Each of two streams returns only once the other has its batch too."""
    both = threading.Barrier(2, timeout=60)

    def run(_batch) -> None:
        both.wait()

    runtime = FakeRuntime(max_batch_tokens=20, streams=2, on_forward=run)
    batcher = build(runtime)
    answers = [submit(batcher, [text(20, n)]) for n in range(8)]
    for n, answer in enumerate(answers):
        expect_vectors(answer.wait(), [text(20, n)])
    assert set(runtime.ran_on) == {0, 1}


def test_what_comes_is_tokenized_and_what_is_done_is_delivered_while_a_stream_runs(build):
    runtime = FakeRuntime(streams=2)
    batcher, gate = held(build, runtime)
    expect_vectors(submit(batcher, [text(5, "beside")]).wait(60), [text(5, "beside")])
    gate.open()


def test_every_core_is_used_for_a_batch_that_is_alone_and_only_for_it(build):
    runtime = FakeRuntime(streams=2, all_cores=True)
    batcher = build(runtime)
    submit(batcher, [text(5)]).wait()
    wait_until(lambda: batcher.running_since is None)
    assert runtime.ran_on == ["all cores"]
    assert runtime.budget.observed == []
    gate = Gate()
    runtime.on_forward = gate
    first = submit(batcher, [text(5, "held")])
    assert gate.entered.wait(60)
    runtime.on_forward = lambda _batch: None
    submit(batcher, [text(7, "beside")]).wait()
    assert runtime.ran_on[-1] in (0, 1)
    gate.open()
    first.wait()
    assert [tokens for tokens, _ in runtime.budget.observed] == [7]


def test_a_thread_that_may_computes_a_single_text_itself_if_nothing_runs(build):
    threads = []

    def run(_batch) -> None:
        threads.append(threading.current_thread().name)

    runtime = FakeRuntime(streams=2, all_cores=True, on_forward=run)
    batcher = build(runtime)
    wait_until(lambda: len(batcher._sleeping) == 3)
    for calls in (1, 2):
        for _ in range(5):
            answer = Answer()
            batcher.submit([(n, request([text(5, n)])) for n in range(calls)], answer, may_run=True)
            wait_until(lambda: len(answer.outcomes) == calls and len(batcher._sleeping) == 3)  # noqa: B023
    assert threads[:5] == [threading.current_thread().name] * 5
    assert set(threads[5:]) <= {"model-0", "model-1", "model-2"}
    assert runtime.ran_on[:5] == ["all cores"] * 5
    assert submit(batcher, [text(5)]).wait().tokens == 5


@pytest.mark.parametrize("error", [DeviceLost("injected"), KeyError("injected")], ids=["device", "code"])
def test_a_thread_that_computes_a_text_itself_reports_a_fault_like_a_stream(build, monkeypatch, error):
    lost = []
    runtime = FakeRuntime(streams=2, all_cores=True)
    batcher = build(runtime, on_device_lost=lost.append)
    wait_until(lambda: len(batcher._sleeping) == 3)

    def broken(*_arguments, **_named) -> None:
        raise error

    if isinstance(error, DeviceLost):
        runtime.on_forward = broken
    else:
        monkeypatch.setattr(Scheduler, "ran", broken)
    answer = Answer()
    batcher.submit([(0, request([text(5)]))], answer, may_run=True)
    assert isinstance(answer.wait(), Unavailable)
    assert len(lost) == 1


def test_the_budget_is_told_what_batches_of_an_accelerator_took_one_after_the_other(build):
    """Two streams of one device: the second batch waits for the first one's end."""
    device = threading.Lock()

    def run(_batch) -> None:
        both.wait()
        with device:
            time.sleep(0.05)

    both = threading.Barrier(2, timeout=60)
    runtime = FakeRuntime(max_batch_tokens=20, streams=2, on_forward=run, on_cpu=False)
    batcher = build(runtime)
    began = time.monotonic()
    answers = [submit(batcher, [text(20, n)]) for n in range(2)]
    for answer in answers:
        answer.wait()
    elapsed = time.monotonic() - began
    # If the time in which it waited for the first one counted as its own, there would be more.
    assert sum(seconds for _, seconds in runtime.budget.observed) <= elapsed
