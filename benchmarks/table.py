"""Write the tables of `docs/results/performance.md` from the JSON files in `benchmarks/results/`.

Everything between the two markers is replaced, and the page's picture drawn; the rest of the page
is left alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
TITLES = {
    "layers": "Layers of the shipped networks",
    "networks": "Whole networks",
    "heads": "Last maps: global pooling and a linear layer",
    "fully connected": "Fully connected layers from the last maps on",
    "imagenet": "Networks of ImageNet's size from their pixels on",
    "screening": "Screened runs against exact ones",
    "ops": "Native operations",
    "attributes": "Attributes of one forward pass",
    "statistics": "Statistics of a result",
    "growth": "Growth",
    "memory": "Peak memory",
    "start-up": "Start-up and whole commands",
}
COMPARED = ("layers", "networks", "heads", "fully connected", "imagenet", "screening")
Cases = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "performance.md")
    arguments = parser.parse_args()
    known = [json.loads(path.read_text()) for path in sorted(arguments.results.glob("*.json"))]
    text = "\n\n".join(of_machine(found) for found in known) or "No results here yet."
    picture = arguments.page.parent / "images" / "performance.png"
    if known and picture.parent.is_dir():
        plot(known, picture)
    arguments.page.write_text(between(arguments.page.read_text(), text))


def between(page: str, text: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """Put text between two markers of a page.

    Raises
    ------
    ValueError
        The page lacks a marker.
    """
    begin, end = markers
    if begin not in page or end not in page.split(begin, 1)[1]:
        raise ValueError(f"page: expected the markers {begin} and {end}")
    head, rest = page.split(begin, 1)
    return f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}"


def of_machine(found: dict[str, Any]) -> str:
    machine, cases = found["machine"], found["cases"]
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    dates = sorted(case["date"][:10] for case in cases.values())
    commits = ", ".join(sorted({case["commit"] for case in cases.values()}))
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    load = max(case["load"] for case in cases.values())
    about = (
        f"{machine['threads']} threads, {machine['memory_gb']} GB, torch {machine['torch']}, "
        f"Python {machine['python']}; {when}; commit {commits} (+: with changes not committed); "
        f"load average up to {load:.1f}."
    )
    if missing := {case["group"] for case in cases.values()} - TITLES.keys():
        raise ValueError(f"no table for the cases of {', '.join(sorted(missing))}: see TITLES")
    parts = [f"### {name}", about]
    for group, title in TITLES.items():
        mine = {name: case for name, case in cases.items() if case["group"] == group}
        if mine:
            parts += [f"#### {title}", TABLES.get(group, comparisons)(mine)]
    return "\n\n".join(parts)


def comparisons(cases: Cases) -> str:
    """One line per case and rival."""
    lines = []
    for name, case in sorted(cases.items()):
        for rival, found in case["rivals"].items():
            checked = found["checked"]
            lines.append(
                (
                    name,
                    f"{case['images']:,}",
                    _units(case),
                    ", ".join(case["strategy"]),
                    _seconds(median(case["seconds"])),
                    _floor(case),
                    _seconds(case["call_seconds"]),
                    f"`{rival}`: {found['note']}",
                    _seconds(median(found["seconds"])),
                    _ratio(found),
                    f"{checked['pairs']:,} ({checked['near_ties']})",
                )
            )
    head = "case|images|units|strategy|sweep|floor|call|rival|its time|ratio (spread)"
    table = _table([*head.split("|"), "equal (near ties)"], lines)
    return "\n\n".join([table, *_summary(cases)])


def _units(case: dict[str, Any]) -> str:
    in_all = f" of {case['units_in_all']:,}" if "units_in_all" in case else ""
    return f"{case['units']:,}{in_all}"


def _floor(case: dict[str, Any]) -> str:
    """Least time by the measured rates, its share of the sweep, and what a live pair costs."""
    if "floor_seconds" not in case:
        return ""
    pairs = max(1.0, case["images"] * case["units"] * case["live"])
    least = case["floor_seconds"]
    share = least / median(case["seconds"])
    flop, byte = (case[key] * 1e9 / pairs for key in ("gflop", "gbyte"))
    return f"{_seconds(least)}, {share:.0%}: {flop / 1e6:.3g} MFLOP, {byte / 1e3:.3g} kB a pair"


def _summary(cases: Cases) -> list[str]:
    """Medians over the cases, per rival and kind of layer; worst and best case named."""
    found: dict[str, list[tuple[float, str]]] = {}
    for name, case in cases.items():
        for rival, entry in case["rivals"].items():
            of = f"`{rival}`" + (f", {case['kind']}" if "kind" in case else "")
            found.setdefault(of, []).append((entry["ratio"], name))
    lines = [
        f"{of}: median {_times(median(r for r, _ in each))} over {len(each)} cases, "
        f"least {_times(min(each)[0])} ({min(each)[1]}), "
        f"most {_times(max(each)[0])} ({max(each)[1]})."
        for of, each in found.items()
        if len(each) > 2
    ]
    shares = [
        (case["peak_share"], name)
        for name, case in cases.items()
        if case.get("peak_share") and case["strategy"] == ["delta"]
    ]
    if shares:
        lines.append(
            f"Floor: all arithmetic by the plan at the measured peak of the cheapest tier would "
            f"take {median(s for s, _ in shares):.0%} of the measured time (median)."
        )
    off = [
        case["predicted_seconds"] / median(case["seconds"])
        for case in cases.values()
        if "predicted_seconds" in case
    ]
    if off:
        lines.append(
            f"Predicted over measured time: median {median(off):.2f}, from {min(off):.2f} to "
            f"{max(off):.2f}."
        )
    dense = [case["dense_share"] for case in cases.values() if "dense_share" in case]
    if dense:
        lines.append(
            f"While they run, the dense convolutions of the cheapest tier reach a median of "
            f"{median(dense):.0%} of its measured peak, from {min(dense):.0%} to {max(dense):.0%}."
        )
    return [*lines, *_decided(cases)]


def _decided(cases: Cases) -> list[str]:
    """Return how many pairs each precision decided, and what the audits found."""
    settled: dict[str, int] = {}
    for case in cases.values():
        for tier, pairs in case.get("settled", {}).items():
            settled[tier] = settled.get(tier, 0) + pairs
    audits = [case["audit"] for case in cases.values() if "audit" in case]
    lines = []
    if settled:
        by_tier = ", ".join(f"{pairs:,} in {tier}" for tier, pairs in settled.items())
        lines.append(f"Pairs decided by the dense part: {by_tier}.")
    if audits:
        lines.append(
            f"Audited in float64: {sum(a['pairs'] for a in audits):,} pairs, "
            f"{sum(a['mismatches'] for a in audits)} mismatches."
        )
    return lines


def plot(known: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the ratios of all comparisons: a row per kind of case and rival, a dot per case."""
    import matplotlib.pyplot as plt  # only whoever writes results needs it

    rows = _grouped(known)
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.42 * len(rows)), layout="constrained")
    for row, ratios in enumerate(rows.values()):
        axes.plot(ratios, [row] * len(ratios), "o", color="#0072b2", alpha=0.45, markersize=6)
        axes.plot(median(ratios), row, "|", color="black", markersize=16, markeredgewidth=2)
    axes.axvline(1, color="0.5", linewidth=1)
    axes.set(xscale="log", xlabel="times as fast as the rival (line: median)")
    axes.xaxis.set_major_formatter("{x:g}")
    labels = [f"{label} ({len(ratios)})" for label, ratios in rows.items()]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _grouped(known: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Ratios by machine (where there are several), kind of case and rival."""
    rows: dict[str, list[float]] = {}
    for machine in known:
        of = f"{machine['machine'].get('gpu') or machine['machine']['cpu']}: " * (len(known) > 1)
        cases = machine["cases"].values()
        for group in COMPARED:
            for case in (case for case in cases if case["group"] == group):
                kind = case.get("kind", TITLES[group])
                for rival, entry in case["rivals"].items():
                    label = f"{of}{kind[0].upper()}{kind[1:]}\nagainst {rival}"
                    rows.setdefault(label, []).append(entry["ratio"])
    return rows


def screening(cases: Cases) -> str:
    lines = [
        (
            name.removeprefix("screened "),
            f"{case['images']:,}",
            f"{case['units']:,}",
            _seconds(median(case["rivals"]["exact"]["seconds"])),
            _seconds(median(case["seconds"])),
            _ratio(case["rivals"]["exact"]),
            _ratio(case["rivals"]["cached"]) if "cached" in case["rivals"] else "",
            f"{case['computed']:.1%}",
            f"{case['missed']:,} of {case['flips']:,}",
            f"{case['certificate']:.2g}",
        )
        for name, case in sorted(cases.items())
    ]
    head = "case|images|units|exact|screened|ratio (spread)|`cached`|computed|missed flips"
    head += "|certificate"
    return "\n\n".join([_table(head.split("|"), lines), *_summary(cases)])


def operations(cases: Cases) -> str:
    lines = [
        (
            f"`{name.removeprefix('op ')}`",
            case["shape"],
            f"{1e3 * median(case['seconds']):.2f} ms",
            f"{1e3 * median(case['rivals']['torch']['seconds']):.2f} ms",
            _ratio(case["rivals"]["torch"]),
        )
        for name, case in sorted(cases.items())
    ]
    return _table(["operation", "size", "native", "plain torch", "ratio (spread)"], lines)


def attributes(cases: Cases) -> str:
    lines = [
        (
            name.removeprefix("attributes of "),
            f"{case['images']:,}",
            f"{case['units']:,}",
            _seconds(median(case["rivals"]["plain pass"]["seconds"])),
            _seconds(median(case["seconds"])),
            f"{case['overhead']:+.0%}",
        )
        for name, case in sorted(cases.items())
    ]
    return _table(["network", "images", "units", "plain pass", "with attributes", "added"], lines)


def statistics(cases: Cases) -> str:
    lines = []
    for name, case in sorted(cases.items()):
        rivals = case["rivals"] or {"": None}
        for rival, found in rivals.items():
            theirs = (_seconds(median(found["seconds"])), _ratio(found)) if found else ("", "")
            function = f"`{name.removeprefix('statistics ')}`"
            lines.append(
                (function, case["size"], _seconds(median(case["seconds"])), rival, *theirs)
            )
    return _table(["function", "size", "time", "rival", "its time", "ratio (spread)"], lines)


def growth(cases: Cases) -> str:
    lines = [
        (
            f"{case['axis']} ({case['case']})",
            "; ".join(
                f"{at:,}: {_seconds(seconds)}"
                for at, seconds in zip(case["at"], case["seconds"], strict=True)
            ),
            f"{case['at'][-1] / case['at'][0]:.1f} x as many, {case['growth']:.1f} x as long",
        )
        for _, case in sorted(cases.items())
    ]
    return _table(["grows", "seconds of the sweep or the predictions", "growth"], lines)


def memory(cases: Cases) -> str:
    lines = [
        (
            f"{case['case']}, {case['images']:,} images",
            f"{budget / 2**20:.0f} MiB",
            f"{grew / 2**20:.0f} MiB",
        )
        for case in cases.values()
        for budget, grew in zip(case["budget"], case["grew"], strict=True)
    ]
    return _table(["case", "`memory=`", "process grew by"], lines)


def start_up(cases: Cases) -> str:
    lines = [
        (
            name.removeprefix("start-up "),
            _seconds(min(case["seconds"])),
            _seconds(min(case["cpu_seconds"])),
            f"{case['peak'] / 2**20:.0f} MiB",
        )
        for name, case in sorted(cases.items(), key=lambda item: min(item[1]["cpu_seconds"]))
    ]
    return _table(["command", "time (best)", "of CPU (best)", "peak memory"], lines)


TABLES = {
    "screening": screening,
    "ops": operations,
    "attributes": attributes,
    "statistics": statistics,
    "growth": growth,
    "memory": memory,
    "start-up": start_up,
}


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _ratio(found: dict[str, float]) -> str:
    return f"**{_times(found['ratio'])}** ({_times(found['least'])} to {_times(found['most'])})"


def _times(value: float) -> str:
    return f"{value:.1f} x" if value >= 1 else f"{value:.2g} x"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else f"{value:,.0f} s"


if __name__ == "__main__":
    main()
