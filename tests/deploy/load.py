"""Clients that keep sending requests while something happens to the instances, and record the results."""

import threading
import time
from typing import Any

import numpy as np
import requests

TEXTS = [f"sentence number {index} about the weather" for index in range(20)]


class Load:
    """`clients` threads that each send a request every `interval_seconds`, over persistent connections."""

    def __init__(self, url: str, certificate: str, clients: int = 8, interval_seconds: float = 0.25) -> None:
        self._url = f"{url}/embed"
        self._certificate = certificate
        self._interval_seconds = interval_seconds
        self._expected = [self._ask(requests, text) for text in TEXTS]
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.answered = 0
        self.failures: list[str] = []
        self.slowest_seconds = 0.0
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(clients)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Stop, and wait for the last responses."""
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, session: Any, text: str) -> np.ndarray:
        response = session.post(self._url, json={"texts": text}, verify=self._certificate, timeout=60)
        if response.status_code != 200:
            raise requests.HTTPError(f"{response.status_code} {response.text}")
        return np.array(response.json()["embeddings"][0])

    def _run(self, client: int) -> None:
        session = requests.Session()
        number = client
        while not self._ended.is_set():
            began = time.monotonic()
            failure = self._try(session, number % len(TEXTS))
            took = time.monotonic() - began
            with self._lock:
                if failure is None:
                    self.answered += 1
                    self.slowest_seconds = max(self.slowest_seconds, took)
                else:
                    self.failures.append(failure)
            number += 1
            self._ended.wait(max(0.0, self._interval_seconds - took))

    def _try(self, session: requests.Session, index: int) -> str | None:
        try:
            try:
                vector = self._ask(session, TEXTS[index])
            except requests.exceptions.SSLError:
                # A reloading nginx may close a connection in its handshake, before any request is sent.
                vector = self._ask(session, TEXTS[index])
        except requests.RequestException as error:
            return f"{type(error).__name__}: {error}"
        difference = float(np.abs(vector - self._expected[index]).max())
        return None if difference < 1e-5 else f"text {index} got another's vector (off by {difference})"
