"""The page at / in a real Chromium, with the real service and with one that fails on request."""

import json
import math
import re
import subprocess
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from axe_core_python.base import AXE_SCRIPT
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from embedding_service.engine import Status
from embedding_service.errors import Overloaded
from tests.browser.conftest import KEY
from tests.conftest import require_program
from tests.fakes import INFO
from tests.service import wait_until


class Page:
    """The page as a user sees it.

    Only elements with an id outlast a redraw, so `page[id]` may be kept. The others are read by one script,
    which the page cannot interrupt.
    """

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)

    def __getitem__(self, name: str):
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        """The visible text of an element."""
        return self[name].text

    def texts(self, selector: str) -> list[str]:
        """The visible texts of all elements that match a CSS selector."""
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)"
        return self.browser.execute_script(script, selector)

    def count(self, selector: str) -> int:
        """The number of elements that match a CSS selector."""
        return self.browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)

    def press(self, *keys: str) -> None:
        """Press keys in the element that has the focus."""
        ActionChains(self.browser).send_keys(*keys).perform()

    def wait(self, name: str, words: str) -> None:
        """Wait until an element shows the words."""
        wait_until(lambda: words in self.text(name), f"{words!r} in #{name}")

    def type(self, *texts: str) -> None:
        """Replace the content of the box as an input method would, so that every character works."""
        self["texts"].clear()
        self["texts"].click()
        self.browser.execute_cdp_cmd("Input.insertText", {"text": "\n".join(texts)})

    def compare(self, *texts: str) -> None:
        """Type texts, press Compare and wait for the response."""
        self.type(*texts)
        before = self.text("curl") if self["curl"].is_displayed() else ""
        self["compare"].click()
        wait_until(lambda: self["compare"].is_enabled() and self.text("curl") != before, "an answer")

    def matrix(self) -> np.ndarray:
        """The numbers in the heat map."""
        cells = [float(cell.replace("−", "-")) for cell in self.texts("#matrix td[data-i]")]
        return np.array(cells).reshape(math.isqrt(len(cells)), -1)

    def resize(self, width: int, height: int = 900) -> None:
        """Set the size of the screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def go_dark(self) -> None:
        """Prefer a dark colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def scheme(self) -> str:
        """The page's background colour."""
        return self.browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")

    def console(self) -> list[str]:
        """The browser's console, which would show a blocked style or script."""
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def hosts(self) -> set[str]:
        """All hosts that the browser has sent requests to."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).netloc for url in urls if url.startswith(("http", "ws"))}

    def accessibility_violations(self) -> list[str]:
        """The violations that axe-core finds."""
        self.browser.execute_script(AXE_SCRIPT)
        found = self.browser.execute_async_script("axe.run().then(arguments[0])")
        return [f"{v['id']}: {[n['html'][:120] for n in v['nodes']]}" for v in found["violations"]]


def test_two_sentences_show_the_similarity_that_sentence_transformers_gives(browser, service, oracle):
    texts = ["The cat sits on the mat.", "A kitten rests on a rug."]
    page = Page(browser, service.url)
    page.compare(*texts)
    vectors = oracle.encode(texts, normalize_embeddings=True)
    expected = vectors @ vectors.T
    assert np.abs(page.matrix() - expected).max() <= 0.00501
    assert f"{expected[0, 1]:.2f}" in page.text("pairs")
    assert "2 texts" in page.text("timing") and "ms in the service" in page.text("timing")


def test_it_names_the_model_and_its_device(browser, service):
    page = Page(browser, service.url)
    page.wait("status", "Healthy")
    page.wait("longest", "256 tokens")
    assert page.text("model") == "sentence-transformers/all-MiniLM-L6-v2"
    assert page.text("device") == "cpu"
    assert page.text("dimension") == "384"


def test_nothing_comes_from_another_host_and_the_console_is_empty(browser, service):
    page = Page(browser, service.url)
    page.compare("one", "two")
    page.wait("longest", "tokens")
    assert page.hosts() == {urlsplit(service.url).netloc}
    assert page.console() == []


def test_the_curl_command_sends_the_same_texts(browser, service, oracle):
    require_program("curl", "curl")
    texts = ['it\'s "quoted" $HOME `id` \\n !! %s', "東京 👩‍👩‍👧 \\", "@file & ; | <tag>"]
    page = Page(browser, service.url)
    page.compare(*texts)
    command = page.text("curl")
    ran = subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=60)
    expected = oracle.encode(texts, normalize_embeddings=True)
    assert np.abs(np.array(json.loads(ran.stdout)["embeddings"]) - expected).max() < 1e-5


def test_the_curl_command_for_a_body_too_long_for_an_argument(browser, scripted):
    require_program("curl", "curl")
    page = Page(browser, scripted.url)
    page.browser.execute_script(
        "document.getElementById('texts').value = \"it's \".repeat(19000) + '\\n' + 'é '.repeat(40000)"
    )
    page["compare"].click()
    wait_until(page["curl"].is_displayed, "an answer")
    command = page["curl"].get_property("textContent")
    ran = subprocess.run(["bash"], input=command.encode(), capture_output=True, check=True, timeout=60)
    assert json.loads(ran.stdout)["count"] == 2


def test_ctrl_enter_compares_and_the_arrow_keys_read_the_cells(browser, service):
    page = Page(browser, service.url)
    page.type("red", "crimson", "tax law")
    page["texts"].send_keys(Keys.CONTROL, Keys.ENTER)
    wait_until(lambda: page.count("#matrix td[data-i]") == 9)
    page.browser.execute_script("document.querySelector(\"#matrix td[tabindex='0']\").focus()")
    page.press(Keys.ARROW_RIGHT)
    assert "“red” and “crimson”" in page.text("readout")
    page.press(Keys.ARROW_DOWN, Keys.END)
    assert "“crimson” and “tax law”" in page.text("readout")


def test_blank_lines_are_skipped_and_an_empty_box_is_an_error(browser, service):
    page = Page(browser, service.url)
    page.compare("one", "", "   ", "two")
    assert page.matrix().shape == (2, 2)
    page.type("", " ")
    page["compare"].click()
    page.wait("error", "Enter at least one text.")


def test_a_truncated_text_is_named(browser, service):
    page = Page(browser, service.url)
    page.wait("longest", "256")
    page.compare("short", "word " * 300)
    assert page.text("truncated").startswith("Text 2 is too long for the model")
    assert "256 tokens" in page.text("truncated")
    page.compare("short", "too")
    assert not page["truncated"].is_displayed()


def test_an_error_of_the_service_is_readable(browser, service):
    page = Page(browser, service.url)
    page.browser.execute_script("document.getElementById('texts').value = 'x'.repeat(100001)")
    page["compare"].click()
    page.wait("error", "Texts[0] has 100001 characters; at most 100000 are allowed")


def test_markup_in_a_text_is_shown_and_never_run(browser, scripted):
    page = Page(browser, scripted.url)
    page.compare("<img src=x onerror=alert(1)>", "<b>bold</b>")
    assert "<b>bold</b>" in page.text("pairs")
    assert page.console() == []


def test_the_states_before_and_after_healthy(browser, scripted):
    scripted.engine.current = Status(state="loading", reason="loading fake/model")
    page = Page(browser, scripted.url)
    page.wait("status", "Loading the model")
    page.wait("reason", "loading fake/model")
    scripted.engine.current = Status(state="healthy", info=INFO)
    page.wait("status", "Healthy")
    page.wait("backend", "torch, float32")
    assert page.text("model") == "fake/model"
    assert not page["reason"].is_displayed()
    scripted.engine.current = Status(state="unhealthy", reason="the cuda device failed", info=INFO)
    page.wait("status", "Unhealthy")
    page.wait("reason", "the cuda device failed")


def test_overload_and_a_service_that_is_gone(browser, scripted):
    page = Page(browser, scripted.url)
    page.wait("backend", "torch")
    scripted.engine.error = Overloaded("9000 tokens are waiting for the model", retry_after_seconds=3)
    page["compare"].click()
    page.wait("error", "9000 tokens are waiting for the model. Try again in 3 s.")
    scripted.stop()
    page["compare"].click()
    page.wait("error", "The service did not respond.")
    page.wait("status", "No answer")


def test_the_api_key_is_requested_kept_in_the_tab_and_never_shown(browser, guarded):
    page = Page(browser, guarded.url)
    wait_until(page["key-form"].is_displayed, "the key form")
    assert page.text("model") == "fake/model"  # /health shows it without a key

    page["key"].send_keys("wrong", Keys.ENTER)
    page.wait("key-error", "The service does not accept this key.")
    page["compare"].click()
    wait_until(lambda: page["key-form"].is_displayed() and page["compare"].is_enabled())

    page["key"].send_keys(KEY, Keys.ENTER)
    page.wait("backend", "torch, float32")
    assert not page["key-form"].is_displayed()
    assert not page["links"].is_displayed()  # a browser would follow these without sending the key
    page.compare("one", "two")
    assert '-H "Authorization: Bearer $API_KEY"' in page.text("curl")
    assert KEY not in page.browser.page_source

    page.browser.refresh()
    page.wait("backend", "torch, float32")
    assert page.browser.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
    page["forget"].click()
    wait_until(page["key-form"].is_displayed, "the key form")
    assert page.browser.execute_script("return sessionStorage.length") == 0


def test_the_api_reference_asks_for_the_key_too(browser, guarded):
    page = Page(browser, f"{guarded.url}/docs")
    wait_until(page["key-form"].is_displayed, "the key form")
    page["key"].send_keys("wrong", Keys.ENTER)
    page.wait("key-error", "The service does not accept this key.")
    page["key"].send_keys(KEY, Keys.ENTER)
    wait_until(lambda: "/v1/embeddings" in browser.page_source, "the reference")
    assert not page["key-form"].is_displayed()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_screen_and_axe_core_finds_no_violation(browser, service, width, dark):
    page = Page(browser, service.url)
    light = page.scheme()
    page.resize(width)
    if dark:
        page.go_dark()
        assert page.scheme() != light
    texts = [f"{word} " * 12 for word in ["Donaudampfschifffahrtsgesellschaft", "sea", "ship", "tax", "cat"]]
    page.compare(*texts)
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.accessibility_violations() == []


def test_a_hundred_texts_make_a_matrix_and_one_more_is_an_error(browser, scripted):
    page = Page(browser, scripted.url)
    page.resize(360)
    page.compare(*[f"text {i}" for i in range(100)])
    assert page.count("#matrix td[data-i]") == 10_000
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= 360
    page.type(*[f"text {i}" for i in range(101)])
    page["compare"].click()
    page.wait("error", "up to 100 texts; there are 101")


# Size of the letters, and whether they fit into their cell, for each cell that shows a number.
NUMBERS = """
return [...document.querySelectorAll("#matrix thead th, #matrix td, #matrix tbody b")]
  .filter((cell) => cell.innerText.trim())
  .map((cell) => {
    const words = document.createRange();
    words.selectNodeContents(cell);
    const fits = words.getBoundingClientRect().width <= cell.getBoundingClientRect().width;
    return [parseFloat(getComputedStyle(cell).fontSize), fits];
  });
"""


@pytest.mark.parametrize(
    ("width", "texts", "numbers"),
    [(1280, 40, 40 + 40), (360, 6, 6 + 6 + 36), (360, 12, 12 + 12 + 144)],
    ids=["desktop", "phone", "two digits"],
)
def test_the_numbers_of_the_matrix_can_be_read(browser, scripted, width, texts, numbers):
    page = Page(browser, scripted.url)
    page.resize(width)
    page.compare(*[f"text {i}" for i in range(texts)])
    found = browser.execute_script(NUMBERS)
    assert len(found) == numbers
    assert min(size for size, _ in found) >= 9
    assert all(fits for _, fits in found)


def test_the_example_is_compared_at_once(browser, service):
    page = Page(browser, service.url)
    wait_until(lambda: page.count("#matrix td[data-i]") == 36)
    assert "How do I reset my password?" in page.text("pairs")
    page.type("something else")
    page["example"].click()
    wait_until(lambda: page.count("#matrix td[data-i]") == 36)


def test_an_error_leaves_no_old_results(browser, scripted):
    page = Page(browser, scripted.url)
    page.compare("one", "two", "three")
    assert page["more"].is_displayed()
    scripted.engine.error = Overloaded("9000 tokens are waiting for the model", retry_after_seconds=3)
    page["compare"].click()
    page.wait("error", "9000 tokens")
    assert not page["more"].is_displayed()
    assert page.count("#matrix td") == 0


def test_the_python_and_javascript_code_gets_the_same_vectors(browser, service, oracle, tmp_path):
    texts = ['it\'s "quoted" $HOME `id` \\n ${1}', "東京 👩‍👩‍👧 \\"]
    page = Page(browser, service.url)
    page.compare(*texts)
    expected = oracle.encode(texts, normalize_embeddings=True)
    page["code-python"].click()
    script = tmp_path / "script.py"
    script.write_text(
        page["curl"].get_property("textContent") + "\nimport json; print(json.dumps(vectors))\n"
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, check=True, timeout=60)
    assert np.abs(np.array(json.loads(ran.stdout)) - expected).max() < 1e-5
    page["code-python"].send_keys(Keys.ARROW_RIGHT)
    code = page["curl"].get_property("textContent")
    found = page.browser.execute_async_script(
        f"const done = arguments[0]; (async () => {{ {code}\n return embeddings; }})().then(done)"
    )
    assert np.abs(np.array(found) - expected).max() < 1e-5


def test_the_vectors_can_be_saved(browser, service, oracle, tmp_path):
    page = Page(browser, service.url)
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    texts = ["one", "two", "três"]
    page.compare(*texts)
    expected = oracle.encode(texts, normalize_embeddings=True)
    for kind in ("npy", "jsonl"):
        page[f"save-{kind}"].click()
        wait_until((tmp_path / f"vectors.{kind}").exists, "the file")
    saved = np.load(tmp_path / "vectors.npy")
    assert (saved.dtype, np.abs(saved - expected).max() < 1e-5) == (np.float32, True)
    rows = [json.loads(line) for line in (tmp_path / "vectors.jsonl").read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == texts
    assert np.abs(np.array([row["embedding"] for row in rows]) - expected).max() < 1e-5


def test_the_map_shows_the_two_principal_components(browser, service, oracle):
    page = Page(browser, service.url)
    texts = ["a cat", "a kitten", "stock prices", "the market", "a password", "my login"]
    page.compare(*texts)
    moves = browser.execute_script(
        "return [...document.querySelectorAll('#map g')].map((point) => point.getAttribute('transform'))"
    )
    places = [re.findall(r"[\d.]+", move) for move in moves]
    vectors = oracle.encode(texts, normalize_embeddings=True)
    left, size, _ = np.linalg.svd(vectors - vectors.mean(axis=0))
    for axis, place in enumerate(np.array(places, float).T):
        assert abs(np.corrcoef(place, left[:, axis] * size[axis])[0, 1]) > 0.999


DOCUMENTS = ["The cat sleeps on the sofa.", "Shares fell by two percent.", "I forgot my password."]


def test_a_search_ranks_the_documents(browser, service, oracle):
    page = Page(browser, service.url)
    page["tab-search"].click()
    page["documents"].click()
    browser.execute_cdp_cmd("Input.insertText", {"text": "\n".join(DOCUMENTS)})
    assert page.text("document-count") == "3 documents"
    page["query"].send_keys("a kitten")
    scores = oracle.encode(DOCUMENTS, normalize_embeddings=True) @ oracle.encode(
        "a kitten", normalize_embeddings=True
    )
    expected = [f"{i + 1} {DOCUMENTS[i]}" for i in np.argsort(-scores)]
    # The page also searches while the query is typed, and again once the documents are embedded.
    wait_until(lambda: page.texts("#results .found") == expected, "the ranked documents")
    assert page.accessibility_violations() == []
    page.resize(360)
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= 360


FILES = {
    "documents.txt": "\n".join(DOCUMENTS),
    "documents.jsonl": "\n".join(json.dumps({"text": text}) for text in DOCUMENTS),
    "documents.csv": "id,text\n" + "\n".join(f'{i},"{text}"' for i, text in enumerate(DOCUMENTS)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_documents(browser, service, tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    page = Page(browser, service.url)
    page["tab-search"].click()
    page["file"].send_keys(str(tmp_path / name))
    wait_until(lambda: page["documents"].get_property("value") == "\n".join(DOCUMENTS), "the documents")
    page.wait("document-count", "3 documents")


def test_a_dropped_file_is_read(browser, service, tmp_path):
    (tmp_path / "documents.csv").write_text(FILES["documents.csv"])
    page = Page(browser, service.url)
    page["tab-search"].click()
    box = page["documents"].rect
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    files = {"items": [], "files": [str(tmp_path / "documents.csv")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        browser.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, **place, "data": files})
    page.wait("document-count", "3 documents")
    assert page["documents"].get_property("value") == "\n".join(DOCUMENTS)


def test_more_documents_than_the_page_searches_are_an_error(browser, scripted, tmp_path):
    (tmp_path / "documents.txt").write_text("\n".join(f"document {i}" for i in range(5001)))
    page = Page(browser, scripted.url)
    page["tab-search"].click()
    page["documents"].send_keys("one\ntwo")
    page["query"].send_keys("first")
    wait_until(lambda: page.count("#results .found") == 2, "results")
    words = "This page searches up to 5,000 documents; there are 5,001."
    page["file"].send_keys(str(tmp_path / "documents.txt"))
    page.wait("search-error", words)
    assert page.count("#results li") == 0
    browser.execute_script("document.getElementById('search-error').textContent = ''")
    page["query"].send_keys(" and second")
    page.wait("search-error", words)
    assert page.count("#results li") == 0


def test_an_error_of_the_search_leaves_no_old_results(browser, scripted):
    page = Page(browser, scripted.url)
    page["tab-search"].click()
    page["documents"].send_keys("one\ntwo")
    page["query"].send_keys("first")
    wait_until(lambda: page.count("#results .found") == 2, "results")
    scripted.engine.error = Overloaded("9000 tokens are waiting for the model", retry_after_seconds=3)
    page["query"].send_keys(" and second")
    page.wait("search-error", "9000 tokens are waiting for the model. Try again in 3 s.")
    assert (page.count("#results li"), page.text("search-status")) == (0, "")
    page["documents"].send_keys("\nthree")
    wait_until(lambda: scripted.engine.requests[-1].texts == ["three"])
    scripted.engine.error = None
    page["query"].send_keys("!")
    wait_until(lambda: page.count("#results .found") == 3, "results for all documents")
    assert not page["search-error"].is_displayed()


def test_a_document_that_is_too_long_is_named_and_the_others_are_ranked(browser, service):
    page = Page(browser, service.url)
    page["tab-search"].click()
    documents = ["a cat", "x" * 100_001, "word " * 300, "a tax"]
    browser.execute_script("document.getElementById('documents').value = arguments[0]", "\n".join(documents))
    page["query"].send_keys("a kitten")
    page["documents"].send_keys(" ")
    page.wait("search-notice", "Document 2 is left out: it has 100001 characters")
    page.wait("search-notice", "Document 3 is too long for the model, which reads only its beginning.")
    wait_until(lambda: page.count("#results li") == 3, "the other three")
    # A long hit is folded.
    assert page.count("#results details.found") == 1
    assert "The query" not in page.text("search-notice")
    browser.execute_script("document.getElementById('query').value = 'word '.repeat(300)")
    page["query"].send_keys("!")
    page.wait("search-notice", "The query is too long for the model")


def test_the_search_says_what_is_missing_and_has_an_example(browser, service):
    page = Page(browser, service.url)
    page["tab-search"].click()
    assert page.text("search-empty").startswith("Enter documents, or try the example")
    page["documents"].send_keys("one\ntwo")
    page.wait("search-empty", "Enter a query to rank the documents by it.")
    page["documents-example"].click()
    wait_until(lambda: page.count("#results li") == 8, "the example's hits")
    assert page["query"].get_property("value") == "I cannot log in"


def test_a_reload_keeps_the_tab_the_documents_and_the_query(browser, scripted):
    page = Page(browser, scripted.url)
    page["tab-search"].click()
    page["documents"].send_keys("one\ntwo")
    page["query"].send_keys("first")
    wait_until(lambda: page.count("#results .found") == 2, "results")
    browser.get("about:blank")
    browser.get(f"{scripted.url}/#search")
    wait_until(lambda: page.count("#results .found") == 2, "results after the reload")
    assert page["panel-search"].is_displayed() and page.text("document-count") == "2 documents"


@pytest.mark.parametrize("content", [b"%PDF-1.7\n...", b"PK\x03\x04\0\0"], ids=["pdf", "zip"])
def test_a_file_without_texts_is_refused(browser, scripted, tmp_path, content):
    (tmp_path / "report.txt").write_bytes(content)
    page = Page(browser, scripted.url)
    page["tab-search"].click()
    page["file"].send_keys(str(tmp_path / "report.txt"))
    page.wait("search-error", "report.txt is not a text file")
    assert page["documents"].get_property("value") == ""


def test_on_a_phone_the_query_comes_first_and_no_hint_needs_a_keyboard_or_a_mouse(browser, scripted):
    page = Page(browser, scripted.url)
    page.resize(360, 800)
    assert not page["modifier"].is_displayed()
    page["tab-search"].click()
    assert page["query"].rect["y"] < page["documents"].rect["y"]
    assert page["query"].rect["y"] < 800
    assert "drop" not in page.text("documents-help")


def test_a_matrix_larger_than_its_box_says_so(browser, scripted):
    page = Page(browser, scripted.url)
    page.resize(360)
    page.compare(*[f"text {i}" for i in range(60)])
    assert page["beyond"].is_displayed()
    page.compare("one", "two")
    assert not page["beyond"].is_displayed()


def test_no_label_of_the_map_covers_another(browser, service):
    page = Page(browser, service.url)
    page.compare(*[f"the number {i}" for i in range(30)], *["the same text"] * 3)
    script = """return [...document.querySelectorAll("#map circle:not(.dot)")].map((circle) => {
      const box = circle.getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2, box.width];
    })"""
    places = np.array(browser.execute_script(script))
    distances = np.linalg.norm(places[:, None, :2] - places[None, :, :2], axis=-1)
    np.fill_diagonal(distances, np.inf)
    # A label with its border is a little wider than its circle.
    assert len(places) == 33 and distances.min() >= 0.9 * places[:, 2].min()


def test_the_api_reference_follows_the_scheme_and_lists_no_schemas(browser, scripted):
    page = Page(browser, f"{scripted.url}/docs")
    wait_until(lambda: page.count(".opblock") > 5, "the operations")
    assert page.count("section.models") == 0
    assert page.count("main h1:not([hidden])") == 1
    light = page.scheme()
    page.go_dark()
    wait_until(lambda: page.count("html.dark-mode") == 1 and page.scheme() != light, "dark colours")


def test_a_file_that_cannot_be_read_is_named_with_its_line(browser, service, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"other": 1}\n')
    page = Page(browser, service.url)
    page["tab-search"].click()
    page["file"].send_keys(str(tmp_path / "bad.jsonl"))
    page.wait("search-error", 'Line 2 has no field "text".')


def test_the_api_reference_begins_with_embed(service):
    paths = requests.get(f"{service.url}/openapi.json", timeout=60).json()["paths"]
    assert next(iter(paths)) == "/embed"


def test_the_page_is_revalidated_and_its_files_are_cached(scripted):
    page = requests.get(scripted.url, timeout=60)
    assert page.headers["Cache-Control"] == "no-cache"
    assert "'unsafe" not in page.headers["Content-Security-Policy"]
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    path = next(part for part in page.text.split('"') if part.endswith("page.css"))
    file = requests.get(f"{scripted.url}/{path}", timeout=60)
    assert (file.status_code, file.headers["Content-Type"]) == (200, "text/css; charset=utf-8")
    assert "immutable" in file.headers["Cache-Control"]
    old = requests.get(f"{scripted.url}/static/another/page.css", timeout=60)
    assert old.headers["Cache-Control"] == "no-cache"
    assert requests.get(f"{scripted.url}/static/another/..%2fpage.py", timeout=60).status_code == 404
