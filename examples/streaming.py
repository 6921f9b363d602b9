"""Forecasts hour by hour, as observations come in: one step a call, the state carried, beside one call for all of them.

    python -m examples.streaming                a LSTM of two layers, on the weather of examples/weather.py
    python -m examples.streaming --kind gru --hidden 128

The layer learns on weeks to say the next hour's temperature. Then the last quarter of the year comes in three ways: as one
sequence, as sequences of one step, and through cells (LSTMCell) of the same weights. Forecasts must be equal to rounding.
"""

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples import common, weather

WEEK = 24 * 7
SAME = 1e-4  # of a standard deviation of the temperature; rounding alone stays far below


class Forecaster(nn.Module):
    """How much the temperature will change in the next hour, after each hour of (T, B, inputs).

    Args:
        package: torch.nn or fusedrnn, the one place in this file where the two differ.
    """

    def __init__(self, package, kind: str, inputs: int, hidden: int, layers: int):
        super().__init__()
        self.package, self.kind = package, kind
        self.rnn = getattr(package, kind)(inputs, hidden, layers)
        self.linear = nn.Linear(hidden, 1)

    def forward(self, hours: Tensor, state=None) -> tuple:
        """The changes (T, B) and the state after the last hour, from which the next call goes on."""
        output, state = self.rnn(hours, state)
        return self.linear(output).squeeze(-1), state

    def cells(self) -> nn.ModuleList:
        """A cell for each layer, with that layer's very weights."""
        cells = nn.ModuleList()
        for k in range(self.rnn.num_layers):
            _, inputs = getattr(self.rnn, f"weight_ih_l{k}").shape
            cells.append(getattr(self.package, f"{self.kind}Cell")(inputs, self.rnn.hidden_size))
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cells[k], name, getattr(self.rnn, f"{name}_l{k}"))
        return cells


def train_epoch(model, optimizer, inputs, starts, batch, race) -> float:
    """Mean loss over weeks that begin at `starts`."""
    losses = []
    for weeks in (torch.arange(WEEK)[:, None] + starts).split(batch, 1):
        loss = nn.functional.mse_loss(model(inputs[weeks])[0], (inputs[weeks + 1] - inputs[weeks])[..., 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        race.step()
    return statistics.fmean(losses)


def one_step_calls(model: Forecaster):
    """A function that takes an hour's inputs and gives the forecast, through the layer with T = 1."""
    state = None

    def step(hour):
        nonlocal state
        change, state = model(hour.view(1, 1, -1), state)
        return change

    return step


def cell_calls(model: Forecaster):
    """As one_step_calls, through cells."""
    cells, states = model.cells(), [None] * model.rnn.num_layers

    def step(hour: Tensor) -> Tensor:
        x = hour.view(1, -1)
        for k, cell in enumerate(cells):
            states[k] = cell(x, states[k])
            x = states[k][0] if isinstance(states[k], tuple) else states[k]
        return model.linear(x)

    return step


def stream(step, hours: Tensor) -> tuple[Tensor, float]:
    """The forecasts and the median time of a step, in microseconds."""
    said, seconds = [], []
    for hour in tqdm(hours, leave=False, disable=None):
        start = time.perf_counter()
        said.append(step(hour))
        seconds.append(time.perf_counter() - start)
    return torch.cat(said).flatten(), 1e6 * statistics.median(seconds)


def parse() -> argparse.ArgumentParser:
    found = common.parser(__doc__, epochs=6, hidden=64, layers=2, batch=32)
    found.add_argument("--kind", choices=["RNN", "LSTM", "GRU"], default="LSTM", type=str.upper, help="default LSTM")
    return found


def run(args) -> str:
    hours, values = weather.load()
    split = len(hours) * 3 // 4
    inputs, mean, std = weather.features(hours, values, split)
    starts = torch.arange(0, split - WEEK - 1, 8)
    models = common.build(args, lambda package: Forecaster(package, args.kind, inputs.shape[1], args.hidden, args.layers))
    optimizers = {name: torch.optim.Adam(model.parameters(), 3e-3) for name, model in models.items()}
    race = common.Race(models, args.epochs, -(-len(starts) // args.batch))
    print(f"{args.kind} of {args.hidden} units x {args.layers}, {torch.get_num_threads()} threads; {split:,} hours\n")
    for epoch, name, model in race:
        order = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(args.seed + epoch))]
        loss = train_epoch(model, optimizers[name], inputs, order, args.batch, race)
        race.print(f"epoch {epoch:2}  {name:8}  loss {loss:.5f}")
    live, truth = inputs[split:-1], values[split + 1 :, 0]

    def error(change: Tensor) -> float:
        """Root mean square of the measured hours."""
        return ((live[:, 0] + change) * std[0] + mean[0] - truth).square().nanmean().sqrt().item()

    print(f"\n{len(live):,} more hours come in one by one; no change at all: error {error(torch.zeros(())):.2f} degrees")
    times, worst = {}, 0.0
    for name, model in models.items():
        with torch.inference_mode():
            whole = model.eval()(live[:, None])[0][:, 0]
            for way, step in (("layer", one_step_calls(model)), ("cells", cell_calls(model))):
                said, times[name, way] = stream(step, live)
                gap = (said - whole).abs().max().item()
                assert gap < SAME, f"{name}, {way}: differs from the whole sequence by {gap:.1e}"
                worst = max(worst, gap)
                print(f"{name:9} {way:6} {times[name, way]:6.0f} us a step, error {error(said):.2f} degrees, "
                      f"differs from one call for all by at most {gap:.1e}")
    took = ", ".join(f"{time:.0f} us ({name}, {way})" for (name, way), time in times.items())
    return f"streamed and whole differ by at most {worst:.0e}, error {error(said):.2f} degrees; a step takes {took}"


def main(argv=None) -> int:
    return common.main(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
