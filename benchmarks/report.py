"""Turns results into a markdown table and a plot: `python -m benchmarks.report results/FILE.json`."""

import argparse
import json
from pathlib import Path
from typing import Any

LABELS = {
    "raw": "raw engine",
    "service": "this service",
    "infinity": "infinity (torch)",
    "baseline": "plain Flask",
}
# The targets: a load, and the lowest acceptable ratio of the service's rate to another system's.
BARS = [
    ("one-32", "raw", 0.88),
    ("one-32", "infinity", 2.7),
    ("one-32", "baseline", 6.0),
    ("64-tokens", "raw", 0.93),
    ("mix", "raw", 0.93),
    ("32-4", "raw", 0.97),
    ("2048", "raw", 0.97),
]
# The faster the engine, the larger the share of everything around it.
FAST_RAW, FAST_BAR = 1000, {"one-32": 0.82}
# A single sentence may take this much longer than in the raw engine.
ALONE_MS = 0.8
MOST_PADDING = 0.10

COLORS = {"raw": "#9aa0a6", "service": "#1a73e8", "infinity": "#f29900", "baseline": "#d93025"}


def markdown(results: dict[str, Any]) -> str:
    """The table of the README: texts per second, the ratio to the raw engine, and p50/p99."""
    present = [s for s in LABELS if any(s in row["systems"] for row in results["scenarios"])]
    lines = [
        "| load | " + " | ".join(LABELS[s] for s in present) + " | load generator |",
        "|---|" + "---:|" * (len(present) + 1),
    ]
    for row in results["scenarios"]:
        raw = row["systems"]["raw"]["texts_per_second"]
        cells = [_cell(row["systems"].get(system), raw, system) for system in present]
        share = row["systems"].get("service", {}).get("generator_share")
        cells.append(f"{share:.1%}" if share is not None else "")
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _footnotes(results)])


def verdicts(results: dict[str, Any]) -> str:
    """Each target with the measured figure."""
    rows = {row["name"]: row["systems"] for row in results["scenarios"]}
    titles = {row["name"]: row["title"] for row in results["scenarios"]}
    lines = []
    if "service" in rows.get("one", {}):
        mine, most = rows["one"]["service"]["p50_ms"], rows["one"]["raw"]["p50_ms"] + ALONE_MS
        lines.append((mine <= most, f"one sentence alone, p50: {mine:.2f} ms, bar {most:.2f}"))
    for name, other, bar in BARS:
        if {"service", other} <= rows.get(name, {}).keys():
            systems = rows[name]
            rate = systems[other]["texts_per_second"]
            is_fast = other == "raw" and rate > FAST_RAW
            least = FAST_BAR.get(name, bar) if is_fast else bar
            ratio = systems["service"]["texts_per_second"] / rate
            lines.append((ratio >= least, f"{titles[name]}: {ratio:.2f} x {LABELS[other]}, bar {least:.2f}"))
    padding = results["padding_of_mix"]
    if padding is not None:
        lines.append((padding <= MOST_PADDING, f"padding of the mix: {padding:.1%}, bar {MOST_PADDING:.0%}"))
    return "\n".join(f"{'reached' if reached else 'NOT REACHED':>11}  {line}" for reached, line in lines)


def _cell(result: dict[str, float] | None, raw: float, system: str) -> str:
    if result is None:
        return "–"
    rate = _number(result["texts_per_second"])
    if system == "raw":
        return rate
    ratio = result["texts_per_second"] / raw
    return f"{rate} ({ratio:.2f}×)<br>{_number(result['p50_ms'])} / {_number(result['p99_ms'])} ms"


def _footnotes(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    one = next((row for row in results["scenarios"] if row["name"] == "one"), None)
    parts = [
        "Texts per second, its ratio to the raw engine, and p50 / p99 of a request. "
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])})"
        + (f", {machine['gpu']}" if machine["gpu"] else "")
        + f"; {results['backend']}, dtype {settings['dtype']}; median of {settings['turns']} "
        f"alternating turns of {settings['seconds_a_turn']:g} s; commit {results['commit']}, "
        f"{results['date']}."
    ]
    if one:
        parts.append(
            f"The raw engine's p50 for one sentence alone: {one['systems']['raw']['p50_ms']:.2f} ms."
        )
    if results["padding_of_mix"] is not None:
        parts.append(f"Padding in the service's batches of the mix: {results['padding_of_mix']:.1%}.")
    ready = ", ".join(f"{LABELS[name]} {seconds:.1f} s" for name, seconds in results["ready_seconds"].items())
    parts.append(f"Ready after: {ready}." if ready else "")
    return " ".join(part for part in parts if part)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plot(results: dict[str, Any], path: Path) -> None:
    """A bar chart of each system's rate as a share of the raw engine's."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    from matplotlib import pyplot

    rows = results["scenarios"][::-1]
    systems = [s for s in LABELS if s != "raw" and any(s in row["systems"] for row in rows)]
    height = 0.8 / len(systems)
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(rows) + 1.2))
    for offset, system in enumerate(reversed(systems)):
        places, shares = [], []
        for place, row in enumerate(rows):
            if system in row["systems"]:
                places.append(place + (offset - (len(systems) - 1) / 2) * height)
                raw = row["systems"]["raw"]["texts_per_second"]
                shares.append(row["systems"][system]["texts_per_second"] / raw)
        bars = axes.barh(places, shares, height, color=COLORS[system], label=LABELS[system])
        axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=2, fontsize=7)
    axes.axvline(1, color=COLORS["raw"], linewidth=1)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    axes.set_xlabel("texts per second, as a share of the raw engine without HTTP", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize=8, loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write(results: dict[str, Any], folder: Path, label: str) -> None:
    """Write the results as JSON, a table and a plot."""
    folder.mkdir(exist_ok=True)
    (folder / f"{label}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{label}.md").write_text(markdown(results) + "\n")
    plot(results, folder / f"{label}.svg")
    print(f"Written: benchmarks/results/{label}.json, .md and .svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    write(json.loads(arguments.file.read_text()), arguments.file.parent, arguments.file.stem)


if __name__ == "__main__":
    main()
