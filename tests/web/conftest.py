"""The Flask app over a fake engine."""

import pytest

from embedding_service.settings.config import Config
from embedding_service.web.factory import create_app
from tests.fakes import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def app(engine):
    return create_app(engine, Config(max_texts_per_request=8, max_text_characters=100, max_body_bytes=2048))


@pytest.fixture
def client(app):
    return app.test_client()
