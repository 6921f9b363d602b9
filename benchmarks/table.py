"""The table on the terminal and the summary against the speeds aimed at."""

from __future__ import annotations

from .providers import WITHOUT
from .rows import Pair, mean_speedup, shape_label
from .rows import pairs as pairs_of
from .shapes import CELLS, MODES
from .suites import TARGETS
from .written import OPTIONS


def seconds_text(seconds: float | None) -> str:
    """A time in a unit that suits it."""
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def bytes_text(count: float | None) -> str:
    """A size in MiB."""
    return "-" if count is None else f"{count / 2**20:.2f}"


def percent_text(fraction: float | None) -> str:
    """A fraction in percent."""
    return "-" if fraction is None else f"{fraction:.0%}"


def grid(header: list[str], lines: list[list[str]], left: int = 1) -> str:
    """Columns as wide as their widest entry; the first `left` to the left, the others to the right."""
    every = [header, *lines]
    widths = [max(len(line[i]) for line in every) for i in range(len(header))]
    place = lambda i, text: text.ljust(widths[i]) if i < left else text.rjust(widths[i])  # noqa: E731
    return "\n".join("  ".join(place(i, text) for i, text in enumerate(line)).rstrip() for line in every)


def case_table(pairs: list[Pair]) -> str:
    """A line for each case: times, ratio with its interval, fractions of what the machine can, memory, losses."""
    header = ["shape", "cell", "mode", "kernel", "torch", "ours", "ratio", "95 %"]
    header += ["GF/s", "of GEMM", "of cache bw", "of floor", "MiB torch", "MiB ours"]
    on_gpu = any(pair.on_gpu for pair in pairs)
    header += ["graph torch", "graph ours"] * on_gpu + [""]
    several = len({pair.ours["provider"] for pair in pairs}) > 1
    lines = []
    for pair in pairs:
        theirs, ours = pair.theirs, pair.ours
        name = f"{ours['provider']}: " if several else ""
        line = [pair.label, pair.cell, pair.mode, name + (ours["kernel"] or "-")]
        if pair.speedup is None:
            line += ["-"] * (10 + 2 * on_gpu)
        else:
            line += [seconds_text(theirs["seconds"]["p50"]), seconds_text(ours["seconds"]["p50"])]
            line += [f"{pair.speedup:.2f}", f"{ours['speedup_low']:.2f}..{ours['speedup_high']:.2f}"]
            line += [f"{ours['gflops']:.1f}", percent_text(ours["fraction_of_gemm_peak"])]
            line += [percent_text(ours["fraction_of_bandwidth"]), percent_text(ours.get("fraction_of_floor"))]
            line += [bytes_text(theirs["peak_bytes"]), bytes_text(ours["peak_bytes"])]
            line += [seconds_text(row.get("graph_seconds")) for row in (theirs, ours)] * on_gpu
        notes = [pair.verdict] * bool(pair.verdict) + ["MEMORY"] * pair.more_memory
        notes += dict.fromkeys(f"({row['gate_worst']})" for row in (theirs, ours) if row["gate"] == "unable")
        lines.append([*line, " ".join(notes)])
    return grid(header, lines, left=4)


OPTION_HEADER = ["option", "layer", "shape", "mode", "in torch", "torch, ms", "fusedrnn, ms", "ratio", "95 %", "cost"]
OPTION_HEADER += ["95 %", "MiB: torch", "fusedrnn", "without"]


def option_lines(rows: list[dict]) -> list[list[str]]:
    """A line for each case with an option: times, their ratio, and the cost beside the same layer without the option."""
    without = {row["case"]: row for row in rows if row["provider"] == WITHOUT}
    lines = []
    for pair in pairs_of(rows):
        if pair.ours["provider"] != "fusedrnn":
            continue
        both, plain = (pair.theirs, pair.ours), without.get(pair.ours["case"], {})
        line = [pair.option, pair.cell.upper(), shape_label(pair.ours["shape"]), pair.mode, OPTIONS[pair.option].written]
        if pair.speedup is None:
            line += [row["gate"] for row in both] + ["-"] * 4
        else:
            line += [f"{row['seconds']['p50'] * 1e3:.3g}" for row in both]
            for name in ("speedup", "cost"):
                ratio, low, high = (pair.ours[key] for key in (name, f"{name}_low", f"{name}_high"))
                line += ["-", "-"] if ratio is None else [f"{ratio:.2f}x", f"{low:.2f} to {high:.2f}"]
        lines.append([*line, *(bytes_text(row.get("peak_bytes")) for row in (*both, plain))])
    return lines


def option_table(rows: list[dict]) -> str:
    """`option_lines` in columns."""
    return grid(OPTION_HEADER, option_lines(rows), left=5)


def target_lines(pairs: list[Pair]) -> list[tuple[str, int, float, float | None]]:
    """(what, number of cases, geometric mean, target or None) for each group, cell, mode and format that was measured."""
    targets = TARGETS if all(pair.ours["suite"] == "cpu" for pair in pairs) else {}
    formats = list(dict.fromkeys(pair.dtype for pair in pairs))
    found = []
    for dtype in formats:
        word = f" {dtype}" if len(formats) > 1 else ""
        some = [pair for pair in pairs if pair.dtype == dtype and pair.speedup]
        padded, packed = ([pair for pair in some if pair.group == group] for group in ("padded", "packed"))
        for cell in CELLS:
            for mode in MODES:
                key = ("padded", cell, mode)
                found.append((f"{cell} {mode}{word}", [p for p in padded if (p.cell, p.mode) == key[1:]], targets.get(key)))
        found.append((f"packed{word}", packed, targets.get(("packed", None, None))))
        found += [(f"  packed {cell}{word}", [pair for pair in packed if pair.cell == cell], None) for cell in CELLS]
    return [(what, len(some), mean_speedup(some), target) for what, some, target in found if some]


def overhead_lines(pairs: list[Pair]) -> list[tuple[Pair, list[str]]]:
    """Each pair that shows the cost of one call, with its line: what, torch's time, ours."""
    some = [pair for pair in pairs if pair.group == "overhead" and pair.speedup]
    times = [[seconds_text(row["seconds"]["p50"]) for row in (pair.theirs, pair.ours)] for pair in some]
    return [(pair, [f"{pair.cell.upper()} {pair.mode}", *two]) for pair, two in zip(some, times)]


def summary(pairs: list[Pair]) -> str:
    """For each provider: geometric means beside their targets, then everything that is not as promised."""
    providers = list(dict.fromkeys(pair.ours["provider"] for pair in pairs))
    parts = []
    for provider in providers:
        text = provider_summary([pair for pair in pairs if pair.ours["provider"] == provider])
        parts.append(f"{provider}:\n\n{text}" if len(providers) > 1 else text)
    return "\n\n".join(parts)


def provider_summary(pairs: list[Pair]) -> str:
    lines = []
    targets = [] if pairs[0].ours["provider"] != "fusedrnn" else target_lines(pairs)
    for what, count, mean, target in targets or [("all", len(pairs), mean_speedup(pairs), None)]:
        aim = [f"{target:.1f}", "SHORT" if mean < target else ""] if target else ["", ""]
        lines.append([what, str(count), f"{mean:.2f}", *aim])
    parts = [grid(["geometric mean of torch / ours", "cases", "measured", "target", ""], lines)]
    overhead = [line for _, line in overhead_lines(pairs)]
    if overhead:
        parts.append(grid(["one call of one step", "torch", "ours"], overhead))
    by = {verdict: [pair for pair in pairs if pair.verdict == verdict] for verdict in ("LOSS", "even", "RED", "unable")}
    parts.append(
        f"{len(pairs)} cases: {len(by['LOSS'])} losses, {len(by['even'])} within the noise of 1, "
        f"{len(by['RED'])} wrong, {sum(pair.more_memory for pair in pairs)} with more memory than torch"
        + (f", {len(by['unable'])} that cannot be run" if by["unable"] else "")
    )
    complaints = [
        f"{pair.verdict} {pair.ours['case']}: " + (f"{pair.speedup:.2f}x" if pair.speedup else pair.ours["gate_worst"])
        for pair in by["LOSS"] + by["RED"]
    ]
    return "\n\n".join(parts) + "".join(f"\n  {line}" for line in complaints)
