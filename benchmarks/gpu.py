"""Everything that only a GPU can show, in one call: build, the tests on CUDA, what passing a state between blocks
takes, speed against torch.nn, compute-sanitizer.

    python -m benchmarks.gpu                      at most 9 minutes; `make gpu` calls this
    python -m benchmarks.gpu --only tests,speed   some of the parts
    python -m benchmarks.gpu --small              a few small calls of every kernel, for a sanitizer to watch

Logs go to --out (default: build/gpu), one file a part, and the rows of speed to benchmarks/results/<GPU>/gpu.jsonl. The summary
comes last. Exit status: 0 if every part passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from . import machine, table
from .machine import ROOT
from .providers import CUDA_KERNELS, FusedProvider
from .rows import pairs, read

MINUTES = 9
PARTING = 15  # seconds in which a part that is out of time may say what it has


def parts(python: str, out: pathlib.Path) -> list[tuple[str, str, float]]:
    """(name, command, seconds it may take) for each part, in order. What a part leaves over goes to the next ones."""
    arch = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else "9.0"
    workers = "-n 8" if importlib.util.find_spec("xdist") else ""
    chosen = "-k 'cuda and not on_host and not test_cuda_build and not test_cuda_kernels'"
    rows = shlex.quote(str(out / "gpu.jsonl"))
    # Without torch's cache of blocks, a tensor's end is the end of an allocation, and memcheck sees what lies behind.
    uncached = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
    watch = "compute-sanitizer --error-exitcode 1 --report-api-errors no --target-processes all"
    return [
        ("build", f"FUSEDRNN_CUDA=1 TORCH_CUDA_ARCH_LIST={arch} {python} setup.py -q build_ext --inplace", 150),
        ("tests", f"{python} -m pytest -q tests {chosen} {workers} -rf --tb=short --maxfail=60 -p no:cacheprovider", 110),
        ("exchange", f"{python} -m benchmarks.exchange --out {shlex.quote(str(out / 'exchange.csv'))}", 30),
        ("speed", f"{python} -m benchmarks.run --suite gpu --quick --minutes 2 --out {rows}", 140),
        *((tool, f"{uncached} {watch} --tool {tool} {python} -m benchmarks.gpu --small", 36)
          for tool in ("memcheck", "racecheck", "synccheck")),
    ]  # fmt: skip


def run(name: str, command: str, limit: float, log: pathlib.Path) -> tuple[str, float]:
    """Runs one part with its output in a log; ("ok", "FAILED" or "out of time"; seconds)."""
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, shell=True, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            verdict = "ok" if process.wait(limit) == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            verdict = "out of time"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PARTING)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        finally:  # Ctrl-C, too
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return verdict, time.monotonic() - begin


SMALL_LAYERS = (
    ("RNN", (5, 33), {}),
    ("RNN", (5, 17), {"nonlinearity": "relu", "bidirectional": True}),
    ("GRU", (5, 33), {"bidirectional": True}),
    ("LSTM", (5, 33), {}),
    ("LSTM", (5, 40), {"proj_size": 19, "bidirectional": True}),
)


def small(device: str = "cuda") -> None:
    """Every kernel in every format, forward and backward, at shapes of several blocks that no tile divides."""
    import fusedrnn  # here, because it is not built yet when this program starts
    from fusedrnn.select import DTYPES

    formats = [(torch.float32, "ieee"), (torch.float32, "tf32"), *((dtype, "ieee") for dtype in DTYPES - {torch.float32})]
    for kernel, (dtype, precision), (kind, sizes, options) in itertools.product(CUDA_KERNELS, formats, SMALL_LAYERS):
        torch.backends.cudnn.rnn.fp32_precision = precision
        with FusedProvider(cuda=kernel).around():
            module = getattr(fusedrnn, kind)(*sizes, **options, device=device, dtype=dtype)
            for batch in (1, 21):
                input = torch.randn(3, batch, 5, device=device, dtype=dtype, requires_grad=True)
                module(input)[0].sum().backward()
                lengths = torch.arange(batch, device="cpu") % 3 + 1
                packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
                module(packed)[0].data.sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="names of parts, comma-separated")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--small", action="store_true", help="what the sanitizers watch")
    options = parser.parse_args(arguments)
    if options.small:
        small()
        return 0
    every = parts(sys.executable, options.out.resolve())
    names = [name for name, _, _ in every]
    chosen = options.only.split(",") if options.only else names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(names)}")
    options.out = options.out.resolve()  # the parts run in the project's folder
    options.out.mkdir(parents=True, exist_ok=True)

    rows, lines, bad = options.out / "gpu.jsonl", [], False
    partial = rows.with_name(rows.name + ".partial")  # where benchmarks.run leaves them if it is out of time
    for old in (rows, partial):
        old.unlink(missing_ok=True)
    end = time.monotonic() + 60 * MINUTES
    for i, (name, command, _) in enumerate(every):
        if name not in chosen:
            continue
        log = options.out / f"{name}.txt"
        later = sum(seconds for other, _, seconds in every[i + 1 :] if other in chosen)
        verdict, seconds = run(name, command, max(1.0, end - later - PARTING - time.monotonic()), log)
        bad = bad or verdict != "ok"
        text = log.read_text(errors="replace").strip().splitlines()
        lines.append(f"{name:10} {verdict:12} {seconds:5.0f} s   {text[-1][:150] if text else ''}")
        print(lines[-1], flush=True)
        if verdict != "ok":
            print("\n".join(text[-25:]), flush=True)
        if name == "build" and verdict != "ok":
            break
    if not rows.exists() and partial.exists():
        partial.rename(rows)
    if rows.exists() and read(rows):
        home = machine.RESULTS / machine.machine_name("cuda")
        home.mkdir(parents=True, exist_ok=True)
        kept = home / rows.name
        if not kept.exists() or all(row["quick"] for row in read(kept)):  # rows of a full run are worth more
            shutil.copy(rows, kept)
        measured = pairs(read(rows))
        print(f"{table.case_table(measured)}\n\n{table.summary(measured)}")
    if "exchange" in chosen and (options.out / "exchange.txt").exists():
        print((options.out / "exchange.txt").read_text())
    print("\nsummary\n" + "\n".join(lines))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
