"""Rows of results: JSON lines, one for each case and provider, and the pairs that tables and plots are made of.

A row says: suite, case, option, shape, cell, mode, dtype, provider, kernel that ran; gate ("green" or "red", with errors, or
"unable" where the provider cannot run the case; gate_worst says why); seconds (p20, p50, p80 of a call), gflops and
fraction_of_gemm_peak; for one stream weight_gbs and fraction_of_bandwidth; floor_seconds and fraction_of_floor
(limits.py) and step_latency; on a GPU eager_seconds and graph_seconds, with and without the host; for training
peak_bytes and resident_peak_bytes; against, speedup, speedup_low, speedup_high (95 %); cost, cost_low, cost_high
(time of an option over that of the layer without it); machine, cpu, cores, isa,
clock_mhz, threads, versions, commit, date. What was not measured is null.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib

from .timing import geometric_mean


# Meters of peak memory (memory.py) and the bytes below which a difference means nothing: alignment, stray pages.
METERS = {"peak_bytes": 4096, "resident_peak_bytes": 2**20}


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same case by the baseline (`theirs`, torch) and by the provider held against it (`ours`)."""

    theirs: dict
    ours: dict

    @property
    def key(self) -> tuple[str, str]:
        return self.ours["case"], self.ours["provider"]

    @property
    def group(self) -> str:
        return self.ours["shape"]["group"]

    @property
    def label(self) -> str:
        option = self.option
        return shape_label(self.ours["shape"]) + f", {self.dtype}" * (self.dtype != "float32") + f", {option}" * bool(option)

    @property
    def option(self) -> str | None:
        return self.ours.get("option")

    @property
    def cell(self) -> str:
        return self.ours["cell"]

    @property
    def mode(self) -> str:
        return self.ours["mode"]

    @property
    def dtype(self) -> str:
        return self.ours["dtype"]

    @property
    def on_gpu(self) -> bool:
        return self.ours.get("device") == "cuda"

    @property
    def speedup(self) -> float | None:
        return self.ours["speedup"]

    @property
    def verdict(self) -> str:
        """"unable", "RED" (wrong result), "LOSS" (slower beyond the noise), "even" (below 1, within the noise) or ""."""
        gates = self.ours["gate"], self.theirs["gate"]
        if "unable" in gates:
            return "unable"
        if "red" in gates:
            return "RED"
        if self.speedup is None or self.speedup >= 1:
            return ""
        return "LOSS" if self.ours["speedup_high"] < 1 else "even"

    @property
    def more_memory(self) -> bool:
        """True if ours needs more than the baseline, by either meter and beyond what that meter cannot tell."""
        return any(
            self.ours[field] is not None
            and self.theirs[field] is not None
            and self.ours[field] > self.theirs[field] + unsure
            for field, unsure in METERS.items()
        )


def shape_label(shape: dict) -> str:
    """A shape for people: ``T100 B16 I256 H256, 2 layers, bidirectional``."""
    sizes = " ".join(f"{letter}{shape[letter]}" for letter in "TBIH")
    extras = [f"{shape['layers']} layers"] * (shape["layers"] > 1)
    extras += ["bidirectional"] * shape["bidirectional"] + ["packed"] * shape["packed"]
    extras += ["cell"] * bool(shape.get("step"))
    extras += ["ReLU"] * (shape.get("nonlinearity") == "relu")
    extras += [f"{shape['threads']} thread" + "s" * (shape["threads"] > 1)] if shape.get("threads") else []
    return ", ".join([sizes, *extras])


def read(path: str | pathlib.Path) -> list[dict]:
    """The rows of a file. ValueError that names the line if one is no row."""
    rows = []
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row["case"], row["provider"], row["gate"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a benchmark row ({type(error).__name__}: {error})") from None
        rows.append(row)
    return rows


def digest(path: str | pathlib.Path) -> str:
    """A short fingerprint of a row file, by which a picture says what it was drawn from."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16]


def pairs(rows: list[dict]) -> list[Pair]:
    """Every row that was held against another, with that other."""
    found = {(row["case"], row["provider"]): row for row in rows}
    return [
        Pair(found[row["case"], row["against"]], row)
        for row in rows
        if row["against"] and (row["case"], row["against"]) in found
    ]


def measured_pairs(path: str | pathlib.Path) -> list[Pair]:
    """The pairs of torch and fusedrnn in a row file. ValueError if there is none."""
    found = [pair for pair in pairs(read(path)) if pair.ours["provider"] == "fusedrnn"]
    if not found:
        raise ValueError(f"{path} holds no pair of torch and fusedrnn")
    return found


def mean_speedup(some: list[Pair]) -> float:
    """Geometric mean of the speed-ups measured; NaN if there are none."""
    return geometric_mean([pair.speedup for pair in some if pair.speedup is not None])
