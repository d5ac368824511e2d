"""Clients that pin a fingerprint, behind nginx, while the replicas change from one model to another."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from tests.inference.tiny_models import build

TEXTS = [f"the quick brown fox of river {number}" for number in range(50)]
CLIENTS = 8
EXPECT, OWN = "x-expect-fingerprint", "x-model-fingerprint"


def vectors_of(url: str) -> tuple[str, np.ndarray]:
    answer = requests.post(f"{url}/embed", json={"texts": TEXTS}, timeout=60)
    return answer.headers[OWN], np.array(answer.json()["embeddings"], np.float32)


@pytest.mark.parametrize("answers", [1500, pytest.param(10_000, marks=pytest.mark.long)])
def test_no_client_that_pins_gets_mixed_vectors(start, start_nginx, tmp_path, answers):
    folders = [build(kind, tmp_path / kind) for kind in ("static", "bert") if not (tmp_path / kind).mkdir()]
    old, new = (start(EMBEDDING_MODEL=str(folder)) for folder in folders)
    expected = dict(vectors_of(instance.wait_ready().url) for instance in (old, new))
    assert len(expected) == 2
    front = start_nginx([old.port], **{"rate=100r/s": "rate=100000r/s"})
    lock = threading.Lock()
    seen: Counter[str] = Counter()
    answered = threading.Condition(lock)
    wrong: list[str] = []

    def count(event: str) -> None:
        with answered:
            seen[event] += 1
            answered.notify_all()

    def client(number: int) -> None:
        try:
            keep_asking(number)
        except Exception as error:
            wrong.append(repr(error))
            count("failed")

    def keep_asking(number: int) -> None:
        """Keeps to one model until that refuses; then begins with the one that it meets next."""
        session = requests.Session()
        # A reloading nginx may close a connection on which a request is just being sent. Which model answers
        # the request that is then sent again is what this test is about.
        again = Retry(total=None, connect=3, read=3, other=3, allowed_methods=None)
        session.mount("https://", HTTPAdapter(max_retries=again))
        pinned = None
        while seen["right"] < answers and not wrong:
            number = (number + 1) % len(TEXTS)
            headers = {EXPECT: pinned} if pinned else {}
            # Not as an attribute of the session, over which REQUESTS_CA_BUNDLE wins.
            answer = session.post(
                f"{front.url}/embed",
                json={"texts": TEXTS[number]},
                headers=headers,
                verify=front.certificate,
                timeout=60,
            )
            if answer.status_code == 412:
                count("refused")
                pinned = None
                continue
            if answer.status_code != 200:
                wrong.append(answer.text)
                break
            made = answer.headers[OWN]
            vector = np.array(answer.json()["embeddings"][0], np.float32)
            if pinned not in (None, made) or np.abs(vector - expected[made][number]).max() > 1e-5:
                wrong.append(f"{pinned}: a vector of {made}")
            pinned = made
            count("right")
            count(made)

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(client, number) for number in range(CLIENTS)]
        for share, ports in [(0.3, [old.port, new.port]), (0.7, [new.port])]:
            with answered:
                while seen["right"] < share * answers and not wrong:
                    assert answered.wait(60), "no answers"
            assert not wrong
            if share > 0.5:
                assert seen["refused"], "both models must have been met"
            front.send_to(ports)
        for done in running:
            done.result()
    assert not wrong
    assert seen["right"] >= answers and all(seen[made] > answers / 10 for made in expected), seen
