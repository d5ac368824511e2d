"""Which requests are admitted, by limit, measured rate and remaining time. No threads here."""

import pytest

from embedding_service.errors import DeadlineExceeded, Overloaded
from embedding_service.inference.admission import ADMITTED_SHARE, Admission


def measured(rate: float, limit: int = 4000) -> Admission:
    """An Admission that has measured this rate, in tokens per second."""
    admission = Admission(limit)
    admission.begin(0.0)
    for number in range(1, 21):
        admission.measure(100, number * 100 / rate)
    return admission


def test_a_full_queue_rejects_requests_and_says_how_long_to_wait():
    admission = measured(100_000)
    for _ in range(4):
        admission.admit(1000, 60.0, 1.0)
    with pytest.raises(Overloaded) as refused:
        admission.admit(1, 60.0, 1.0)
    assert refused.value.retry_after_seconds == pytest.approx(0.05)
    assert admission.queued_tokens == 4000
    admission.release(1000)
    admission.admit(1000, 60.0, 1.0)


def test_the_wait_follows_the_rate():
    admission = measured(1000)
    admission.admit(4000, 600.0, 1.0)
    with pytest.raises(Overloaded) as refused:
        admission.admit(1, 600.0, 1.0)
    assert refused.value.retry_after_seconds == pytest.approx(2.0)


def test_a_request_that_would_miss_its_deadline_is_rejected_at_once():
    admission = measured(1000, limit=1_000_000)
    admission.admit(900, 60.0, 1.0)
    with pytest.raises(Overloaded):
        admission.admit(100, 1.0 + 0.99 / ADMITTED_SHARE, 1.0)
    admission.admit(100, 1.0 + 1.01 / ADMITTED_SHARE, 1.0)


def test_an_idle_service_accepts_a_request_larger_than_the_queue():
    Admission(1024).admit(5000, 1.0, 0.0)


def test_a_deadline_that_passed_already_is_refused():
    with pytest.raises(DeadlineExceeded):
        Admission(1024).admit(5, 1.0, 1.0)


def test_background_requests_keep_nobody_out():
    admission = measured(1000)
    admission.admit(4000, 600.0, 1.0, background=True)
    admission.admit(1000, 11.0, 1.0)
    with pytest.raises(Overloaded):
        admission.admit(1, 600.0, 1.0, background=True)
    admission.release(1000)
    admission.release(4000, background=True)
    admission.admit(4000, 600.0, 1.0)
    with pytest.raises(Overloaded):
        admission.admit(1, 600.0, 1.0)


def test_a_full_queue_accepts_a_request_without_cost():
    admission = measured(1.0)
    admission.admit(4000, 1e9, 0.0)
    admission.admit(0, 1.0, 0.0)


def test_a_pause_does_not_lower_the_rate():
    admission = measured(1000)
    admission.begin(1000.0)
    admission.measure(100, 1000.1)
    assert admission.tokens_per_second == pytest.approx(1000)
