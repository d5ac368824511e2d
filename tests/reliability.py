"""The fault tests record their results here, and `python -m tests.reliability` makes a table of them."""

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "build" / "reliability.jsonl"
TABLE = ROOT / "docs" / "reliability.md"

HEAD = """# Behaviour under faults

The test that injects a fault writes its row here. Most run against the real service on a real port. Overload,
soak and fuzz tests have a short form, which `make test-all` runs, and a full one. `make reliability` runs
everything and writes this table. "Lost" counts requests that got neither an answer nor a proper refusal.

| fault | what was done | times | measured | lost |
|---|---|---:|---|---|
"""


def record(fault: str, done: str, times: int, measured: str, lost: str | int = "nothing") -> None:
    """Record what a test did and measured; call this after its last assertion."""
    RECORDS.parent.mkdir(exist_ok=True)
    line = {"fault": fault, "done": done, "times": times, "measured": measured, "lost": str(lost)}
    with RECORDS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"at": time.time()}) + "\n")


def render() -> str:
    """The table, with the last record of each fault, in the order of the first ones."""
    latest: dict[str, dict[str, str]] = {}
    for line in RECORDS.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        latest[entry["fault"]] = entry
    rows = [
        f"| {e['fault']} | {e['done']} | {e['times']} | {e['measured']} | {e['lost']} |\n"
        for e in latest.values()
    ]
    date = time.strftime("%Y-%m-%d", time.gmtime(max(float(e["at"]) for e in latest.values())))
    return f"{HEAD}{''.join(rows)}\nMeasured on {date}, on {os.cpu_count()} cores.\n"


if __name__ == "__main__":
    if not RECORDS.exists():
        sys.exit(f"{RECORDS} is missing; run the tests in tests/faults first")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(render(), encoding="utf-8")
