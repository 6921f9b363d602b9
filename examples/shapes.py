"""The shapes of every tutorial: what goes into RNN, LSTM and GRU and what comes out, for torch.nn and fusedrnn.

    python -m examples.shapes

Each row of the table is called six times, with each of the three layers, without and with first states. Shapes must be
equal, and values and gradients agree to float32's rounding: differences are fractions of a tensor's largest value.
"""

import argparse
import itertools
import sys

import torch
from torch import Tensor

from . import common

CELLS = ("RNN", "LSTM", "GRU")
LAYOUTS = ("time first", "batch first", "no batch")
TENSORS = ("input", "output", "h_0, h_n", "c_0, c_n")
TOLERANCE = 1e-5


def parse() -> argparse.ArgumentParser:
    return common.parser(__doc__, steps=5, batch=3, inputs=10, hidden=20)


def call(layer, x: Tensor, states: tuple[Tensor, ...] | None) -> list[Tensor]:
    """[output, h_n] of one call, and c_n for an LSTM, then the gradients of x and of every weight."""
    x = x.clone().requires_grad_()
    output, last = layer(x) if states is None else layer(x, states if len(states) == 2 else states[0])
    results = [output, *last] if isinstance(last, tuple) else [output, last]
    loss = sum((result * result).sum() for result in results)
    return [*results, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def compare(args, cell: str, layers: int, bidirectional: bool, layout: str) -> tuple[list[torch.Size], float]:
    """Shapes of what TENSORS names, those of c only for an LSTM, and how far the packages' values are apart."""
    options = {"bidirectional": bidirectional, "batch_first": layout == "batch first"}
    models = common.build(args, lambda package: getattr(package, cell)(args.inputs, args.hidden, layers, **options))
    batch = () if layout == "no batch" else (args.batch,)
    random = torch.Generator().manual_seed(args.seed)
    x = torch.randn((*batch, args.steps, args.inputs) if options["batch_first"] else (args.steps, *batch, args.inputs),
                    generator=random)
    rows = layers * (2 if bidirectional else 1)
    given = [torch.randn(rows, *batch, args.hidden, generator=random) for _ in range(2 if cell == "LSTM" else 1)]
    largest = 0.0
    for states in (None, tuple(given)):
        first, *others = [call(layer, x, states) for layer in models.values()]
        for other in others:
            assert [value.shape for value in other] == [value.shape for value in first], (cell, options)
            largest = max([largest] + [((one - two).abs().max() / one.abs().max()).item() for one, two in zip(first, other)])
            assert largest < TOLERANCE, (cell, options, largest)
        assert [value.shape for value in first[1 : 1 + len(given)]] == [state.shape for state in given]
    return [x.shape, *(value.shape for value in first[: 1 + len(given)])], largest


def run(args) -> str:
    """Prints the table, for batches and for single sequences, of one and two layers, one way and both."""
    both = args.module == "both"
    print(f"T={args.steps} steps, B={args.batch} sequences, I={args.inputs} inputs, H={args.hidden} hidden units, "
          f"L layers, D directions; {' and '.join(common.PACKAGES) if both else args.module}\n\n"
          "             input      output       h: one row a layer and direction   c: the LSTM's own\n"
          "time first   (T, B, I)  (T, B, D*H)  (D*L, B, H)                        (D*L, B, H)\n"
          "batch first  (B, T, I)  (B, T, D*H)  (D*L, B, H)                        (D*L, B, H)\n"
          "no batch     (T, I)     (T, D*H)     (D*L, H)                           (D*L, H)\n")
    head = f"{'layout':12}{'L':>2}{'D':>2}   " + "".join(f"{title:15}" for title in TENSORS)
    print(" " * len(head) + "  largest difference" * both)
    print(head + "".join(f"{cell:>9}" for cell in CELLS) * both)
    largest, shapes = 0.0, {}
    cases = list(itertools.product(LAYOUTS, (1, 2), (False, True)))
    for layout, layers, bidirectional in cases:
        apart = {}
        for cell in CELLS:
            shapes[cell], apart[cell] = compare(args, cell, layers, bidirectional, layout)
        assert shapes["RNN"] == shapes["GRU"] == shapes["LSTM"][:3]
        columns = "".join(f"{str(tuple(shape)):15}" for shape in shapes["LSTM"])
        numbers = "".join(f"{apart[cell]:9.0e}" for cell in CELLS) * both
        print(f"{layout:12}{layers:2}{1 + bidirectional:2}   {columns}{numbers}".rstrip())
        largest = max(largest, *apart.values())
    print()
    calls = f"{len(cases) * len(CELLS) * 2} calls in {len(cases)} layouts of RNN, LSTM and GRU"
    if not both:
        return f"{calls} with {args.module}: states come out in the shape in which they go in"
    return (f"{calls}: all shapes equal; values and gradients of torch and fusedrnn differ by at most {largest:.0e} "
            "of a tensor's largest value")


if __name__ == "__main__":
    sys.exit(common.main(parse, run))
