"""Everything that only a GPU can show, in one call: build, the tests on CUDA, compute-sanitizer, speed against torch.nn.

    python -m benchmarks.gpu                      at most 9 minutes; `make gpu` calls this
    python -m benchmarks.gpu --only tests,speed   some of the parts
    python -m benchmarks.gpu --small              a few small calls of every kernel, for a sanitizer to watch

Logs go to --out (default: build/gpu), one file a part, and the rows of speed to benchmarks/results/<GPU>/gpu.jsonl. The summary
comes last. Exit status: 0 if every part passed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from . import machine, table
from .machine import ROOT
from .rows import pairs, read

MINUTES = 9


def parts(python: str, out: pathlib.Path) -> list[tuple[str, str, float]]:
    """(name, command, seconds it may take) for each part, in order. What a part leaves over goes to the next ones."""
    watched = f"{python} -m benchmarks.gpu --small"
    sanitizers = [
        (tool, f"compute-sanitizer --tool {tool} --error-exitcode 1 --target-processes all {watched}", 70)
        for tool in ("memcheck", "racecheck", "synccheck")
    ]
    return [
        ("build", f"FUSEDRNN_CUDA=1 {python} setup.py -q build_ext --inplace", 150),
        ("tests", f"{python} -m pytest -q tests -k 'cuda and not on_host and not test_cuda_build and not test_cuda_kernels' -p no:cacheprovider", 150),
        *sanitizers,
        ("speed", f"{python} -m benchmarks.run --suite gpu --quick --out {out}/gpu.jsonl", 240),
    ]


def run(name: str, command: str, limit: float, log: pathlib.Path) -> tuple[str, float]:
    """Runs one part with its output in a log; ("ok", "FAILED" or "out of time"; seconds)."""
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, shell=True, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            verdict = "ok" if process.wait(limit) == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            verdict = "out of time"
    return verdict, time.monotonic() - begin


def small(device: str = "cuda") -> None:
    """Every kernel in every format, forward and backward, at shapes of several blocks that no tile divides."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence

    import fusedrnn

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            torch.backends.cudnn.rnn.fp32_precision = "tf32" if tf32 else "ieee"
            for kind, sizes, options in (
                ("RNN", (5, 33), {}),
                ("RNN", (5, 17), {"nonlinearity": "relu", "bidirectional": True}),
                ("GRU", (5, 33), {"bidirectional": True}),
                ("LSTM", (5, 33), {}),
                ("LSTM", (5, 40), {"proj_size": 19, "bidirectional": True}),
            ):
                module = getattr(fusedrnn, kind)(*sizes, **options, device=device, dtype=dtype)
                for batch in (1, 21, 70):
                    input = torch.randn(4, batch, 5, device=device, dtype=dtype, requires_grad=True)
                    module(input)[0].sum().backward()
                    lengths = torch.arange(batch) % 4 + 1
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
    every = parts(sys.executable, options.out)
    names = [name for name, _, _ in every]
    chosen = options.only.split(",") if options.only else names
    unknown = [name for name in chosen if name not in names]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(names)}")
    options.out.mkdir(parents=True, exist_ok=True)

    end, lines, bad = time.monotonic() + 60 * MINUTES, [], False
    for name, command, limit in every:
        if name not in chosen:
            continue
        log = options.out / f"{name}.txt"
        verdict, seconds = run(name, command, max(1.0, min(limit, end - time.monotonic())), log)
        bad = bad or verdict != "ok"
        text = log.read_text(errors="replace").strip().splitlines()
        lines.append(f"{name:10} {verdict:12} {seconds:5.0f} s   {text[-1][:150] if text else ''}")
        print(lines[-1], flush=True)
        if verdict != "ok":
            print("\n".join(text[-25:]), flush=True)
        if name == "build" and verdict != "ok":
            break
    rows = options.out / "gpu.jsonl"
    if "speed" in chosen and rows.exists():
        home = machine.RESULTS / machine.machine_name("cuda")
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(rows, home)
        print(table.case_table(pairs(read(rows))))
    print("\nsummary\n" + "\n".join(lines))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
