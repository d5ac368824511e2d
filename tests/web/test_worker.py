"""The time limits of a client's connection, tested at the socket."""

import socket

import pytest

from embedding_service.server import worker


@pytest.fixture
def pair(monkeypatch):
    """A patient socket and its client."""
    near, client = socket.socketpair()
    patient = worker.PatientSocket(near.family, near.type, near.proto, near.detach())
    monkeypatch.setattr(worker, "READ_SECONDS", 0.1)
    monkeypatch.setattr(worker, "WRITE_SECONDS", 0.1)
    patient.expect(0.1)
    with patient, client:
        yield patient, client


def test_received_data_is_read(pair):
    patient, client = pair
    client.sendall(b"all of it")
    assert patient.recv(100) == b"all of it"
    assert patient.begun


def test_a_client_that_sends_nothing_times_out(pair):
    patient, _client = pair
    with pytest.raises(TimeoutError):
        patient.recv(100)
    assert not patient.begun


def test_a_client_that_sends_nothing_more_is_cut_off(pair):
    patient, client = pair
    client.sendall(b"half")
    assert patient.recv(100) == b"half"
    with pytest.raises(TimeoutError):
        patient.recv(100)
    assert patient.begun


def test_data_that_arrived_in_time_is_read_after_the_time_is_up(pair):
    patient, client = pair
    patient.expect(-1.0)
    client.sendall(b"complete, but had to wait for its turn")
    assert patient.recv(100).startswith(b"complete")


def test_received_bytes_extend_the_time_limit(pair):
    patient, client = pair
    client.sendall(b"a" * 100_000)
    patient.recv(1)
    before = patient._read_by
    received = len(patient.recv(100_000))
    assert patient._read_by == pytest.approx(before + received / worker.MIN_BYTES_PER_SECOND)


def test_a_client_that_does_not_read_its_response_is_cut_off(pair, monkeypatch):
    patient, _client = pair
    monkeypatch.setattr(worker, "MIN_BYTES_PER_SECOND", 1e12)
    with pytest.raises(TimeoutError):
        patient.sendall(b"a" * 10_000_000)
