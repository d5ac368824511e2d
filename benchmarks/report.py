"""Turns results into a markdown table and a plot: `python -m benchmarks.report results/FILE.json`."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

LABELS = {
    "raw": "raw engine",
    "service": "this service",
    "before": "before",
    "peer": "peer",
    "infinity": "infinity (torch)",
    "baseline": "plain Flask",
}
# What the others are compared with: the first of these that a run has.
REFERENCES = ("raw", "peer", "before", "infinity", "baseline")
RATE = "texts_per_second"
# The targets: a load, another system, a figure, and the service's share of the other's: for a rate the lowest
# acceptable one, otherwise the highest.
BARS = [
    ("one-32", "raw", RATE, 0.88),
    ("one-32", "infinity", RATE, 2.7),
    ("one-32", "baseline", RATE, 6.0),
    ("64-tokens", "raw", RATE, 0.93),
    ("mix", "raw", RATE, 0.93),
    ("32-4", "raw", RATE, 0.97),
    ("2048", "raw", RATE, 0.97),
    ("one", "peer", "p50_ms", 1.35),
    ("one-8", "peer", RATE, 0.95),
    ("one-32", "peer", RATE, 1.15),
    ("32-4", "peer", RATE, 1.2),
    ("mix", "peer", RATE, 2.2),
    ("beside-bulk", "peer", RATE, 40),
    ("paused", "before", "p50_ms", 0.75),
    ("one-32", "before", RATE, 1.15),
    ("one-32", "before", "p99_ms", 0.85),
    ("one-32", "before", "web_us", 0.75),
]
# The faster the engine, the larger the share of everything around it.
FAST_RAW, FAST_BAR = 1000, {"one-32": 0.82}
# No load may be slower than before by more than this.
WORST_SHARE = 0.98
# A single sentence may take this much longer than in the raw engine: the first, plus this share of its time.
ALONE_MS, ALONE_SHARE = 0.17, 0.114
MOST_PADDING = 0.10

COLORS = {
    "raw": "#9aa0a6",
    "service": "#1a73e8",
    "before": "#80868b",
    "peer": "#188038",
    "infinity": "#f29900",
    "baseline": "#d93025",
}


def markdown(results: dict[str, Any]) -> str:
    """Two tables: texts per second, the ratio to the reference, and p50/p99; the CPU time of a request."""
    present, reference = _systems(results)
    lines = [
        "| load | " + " | ".join(LABELS[s] for s in present) + " | load generator |",
        "|---|" + "---:|" * (len(present) + 1),
    ]
    for row in results["scenarios"]:
        systems = row["systems"]
        rate = systems.get(reference, {}).get(RATE)
        cells = [_cell(systems.get(system), rate if system != reference else None) for system in present]
        share = systems.get("service", {}).get("generator_share")
        cells.append(f"{share:.1%}" if share is not None else "")
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_costs(results, present), _footnotes(results, reference)])


def _systems(results: dict[str, Any]) -> tuple[list[str], str]:
    """The systems of a run, and the one that the others are compared with."""
    present = [s for s in LABELS if any(s in row["systems"] for row in results["scenarios"])]
    return present, next((s for s in REFERENCES if s in present), present[0])


def _costs(results: dict[str, Any], present: list[str]) -> list[str]:
    """A table of the CPU time of a request, by process, of the systems and loads that have it."""
    present = [s for s in present if any(_cost(row["systems"].get(s)) for row in results["scenarios"])]
    if not present:
        return []
    lines = [
        "| CPU of a request, µs | " + " | ".join(LABELS[s] for s in present) + " |",
        "|---|" + "---:|" * len(present),
    ]
    for row in results["scenarios"]:
        cells = [_cost(row["systems"].get(system)) for system in present]
        if any(cells):
            lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cost(result: dict[str, float] | None) -> str:
    costs = {key[:-3]: value for key, value in (result or {}).items() if key.endswith("_us")}
    return " + ".join(
        f"{value:.0f}" if role == "all" else f"{role} {value:.0f}" for role, value in costs.items()
    )


def verdicts(results: dict[str, Any]) -> str:
    """Each target with the measured figure."""
    rows = {row["name"]: row["systems"] for row in results["scenarios"]}
    titles = {row["name"]: row["title"] for row in results["scenarios"]}
    lines = []
    if {"service", "raw"} <= rows.get("one", {}).keys():
        mine, most = (
            rows["one"]["service"]["p50_ms"],
            rows["one"]["raw"]["p50_ms"] * (1 + ALONE_SHARE) + ALONE_MS,
        )
        lines.append((mine <= most, f"one sentence alone, p50: {mine:.2f} ms, bar {most:.2f}"))
    for name, other, figure, bar in [*BARS, *((name, "before", RATE, WORST_SHARE) for name in rows)]:
        if {"service", other} <= rows.get(name, {}).keys():
            mine, theirs = (rows[name][system][figure] for system in ("service", other))
            is_fast = other == "raw" and theirs > FAST_RAW
            limit = FAST_BAR.get(name, bar) if is_fast else bar
            share = mine / theirs if theirs else math.inf
            reached = share >= limit if figure == RATE else share <= limit
            lines.append(
                (reached, f"{titles[name]}: {figure} {share:.2f} x {LABELS[other]}, bar {limit:.2f}")
            )
    padding = results["padding_of_mix"]
    if padding is not None:
        lines.append((padding <= MOST_PADDING, f"padding of the mix: {padding:.1%}, bar {MOST_PADDING:.0%}"))
    return "\n".join(f"{'reached' if reached else 'NOT REACHED':>11}  {line}" for reached, line in lines)


def _cell(result: dict[str, float] | None, reference: float | None) -> str:
    if result is None:
        return "–"
    rate = _number(result[RATE])
    if reference:
        rate += f" ({result[RATE] / reference:.2f}×)"
    if "p50_ms" not in result:
        return rate
    cell = f"{rate}<br>{_number(result['p50_ms'])} / {_number(result['p99_ms'])} ms"
    if refused := result.get("refused"):
        cell += f", {refused:.0f} refused"
    if bulk := result.get("bulk_texts_per_second"):
        cell += f"<br>bulk {_number(bulk)}"
    if refused := result.get("bulk_refused"):
        cell += f", {refused:.0f} refused"
    return cell


def _footnotes(results: dict[str, Any], reference: str) -> str:
    machine, settings = results["machine"], results["settings"]
    one = next((row for row in results["scenarios"] if row["name"] == "one"), None)
    parts = [
        f"Texts per second, its ratio to {_the(reference)}, and p50 / p99 of a request. "
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])})"
        + (f", {machine['gpu']}" if machine["gpu"] else "")
        + f"; {results['backend'] or 'auto'}, dtype {settings['dtype']}; median of {settings['turns']} "
        f"alternating turns of {settings['seconds_a_turn']:g} s; commit {results['commit']}, "
        f"{results['date']}."
    ]
    if one and "raw" in one["systems"]:
        parts.append(
            f"The raw engine's p50 for one sentence alone: {one['systems']['raw']['p50_ms']:.2f} ms."
        )
    if results["padding_of_mix"] is not None:
        parts.append(f"Padding in the service's batches of the mix: {results['padding_of_mix']:.1%}.")
    ready = ", ".join(f"{LABELS[name]} {seconds:.1f} s" for name, seconds in results["ready_seconds"].items())
    parts.append(f"Ready after: {ready}." if ready else "")
    return " ".join(part for part in parts if part)


def _the(system: str) -> str:
    return "the raw engine" if system == "raw" else f"“{LABELS[system]}”"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def plotter() -> Any:
    """matplotlib's pyplot, whose files are the same for the same figures."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    from matplotlib import pyplot

    return pyplot


def plot(results: dict[str, Any], path: Path) -> None:
    """A bar chart of each system's rate as a share of the reference's."""
    pyplot = plotter()
    present, reference = _systems(results)
    rows = [row for row in results["scenarios"][::-1] if reference in row["systems"]]
    systems = [system for system in present if system != reference]
    height = 0.8 / len(systems)
    figure, axes = pyplot.subplots(figsize=(8, 0.55 * len(rows) + 1.2))
    for offset, system in enumerate(reversed(systems)):
        places, shares = [], []
        for place, row in enumerate(rows):
            if system in row["systems"]:
                places.append(place + (offset - (len(systems) - 1) / 2) * height)
                whole = row["systems"][reference][RATE]
                shares.append(row["systems"][system][RATE] / whole)
        bars = axes.barh(places, shares, height, color=COLORS[system], label=LABELS[system])
        axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=2, fontsize=7)
    axes.axvline(1, color=COLORS[reference], linewidth=1)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    axes.set_xlabel(f"texts per second, as a share of {_the(reference)}", fontsize=8)
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
    print(f"Written: {folder / label}.json, .md and .svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    write(json.loads(arguments.file.read_text()), arguments.file.parent, arguments.file.stem)


if __name__ == "__main__":
    main()
