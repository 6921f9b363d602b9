"""Forecasts the temperature some hours ahead from the last day's weather: RNN, LSTM and GRU, one way and both ways.

    python -m examples.weather              a year of hourly observations at New York's La Guardia airport, which lie here
    python -m examples.weather --ahead 24   the same hour tomorrow

The first three quarters of the year are learned from, the last one tests. A bidirectional layer reads a window of the past in both
directions: nothing that comes after the window is ever an input, and a value that is missing is taken from the hours before.
"""

import argparse
import csv
import datetime
import gzip
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from examples import common

DATA = Path(__file__).parent / "data" / "weather.csv.gz"
MEASURED = ["temp", "dewp", "wind_speed", "pressure"]
KINDS = [(kind, both) for both in (False, True) for kind in ("RNN", "LSTM", "GRU")]


def load() -> tuple[list[datetime.datetime], Tensor]:
    """Every hour of the year, and (hours, MEASURED) in degrees Celsius, miles an hour and millibars; nan: not measured."""
    with gzip.open(DATA, "rt", newline="") as file:
        rows = {datetime.datetime.fromisoformat(row["time_hour"].rstrip("Z")): row for row in csv.DictReader(file)}
    hours = [min(rows) + datetime.timedelta(hours=i) for i in range(int((max(rows) - min(rows)).total_seconds() / 3600) + 1)]
    values = torch.tensor([[float(rows[hour][name] or "nan") if hour in rows else math.nan for name in MEASURED] for hour in hours])
    values[:, :2] = (values[:, :2] - 32) / 1.8
    return hours, values


def features(hours, values: Tensor, train: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (hours, features), scaled as the first `train` hours need; mean and standard deviation of each of MEASURED."""
    known = values.clone()
    for now, before in zip(known[1:], known):  # the last known value: one in between would look ahead
        now.copy_(torch.where(now.isnan(), before, now))
    mean, std = known[:train].mean(0), known[:train].std(0)
    angle = torch.tensor([2 * math.pi * hour.hour / 24 for hour in hours])
    return torch.cat([(known - mean) / std, torch.stack([angle.sin(), angle.cos()], 1)], 1), mean, std


class Forecaster(nn.Module):
    """How much the temperature will change, in scaled degrees, from what a layer says at both ends of a window.

    Args:
        package: torch.nn or fusedrnn, the one place in this file where the two differ.
    """

    def __init__(self, package, kind: str, both: bool, inputs: int, hidden: int):
        super().__init__()
        self.rnn = getattr(package, kind)(inputs, hidden, batch_first=True, bidirectional=both)
        self.linear = nn.Linear(hidden * (1 + both), 1)

    def forward(self, windows: Tensor) -> Tensor:
        _, state = self.rnn(windows)
        last = state[0] if isinstance(state, tuple) else state
        return self.linear(last.transpose(0, 1).flatten(1)).squeeze(1)


def train_epoch(model, optimizer, windows, change, order, batch, race) -> float:
    model.train()
    total = 0.0
    for rows in order.split(batch):
        loss = nn.functional.mse_loss(model(windows[rows]), change[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
        race.step()
    return total / len(order)


def rmse(forecast: Tensor, truth: Tensor) -> float:
    return (forecast - truth).square().mean().sqrt().item()


def draw(path, week, truth, forecasts, errors, seconds, naive, ahead):
    """A week of the test: the truth and what the best layer said; and error and time of every layer."""
    with common.drawing(path, columns=2, figsize=(14, 4.5), width_ratios=[1.6, 1]) as (left, right):
        left.plot(week, truth, color="black", label="truth")
        for name, (label, values) in forecasts.items():
            left.plot(week, values, color=common.COLOURS[name], label=f"{label}, {name}", linestyle="--" if name == "fusedrnn" else "-")
        left.set_title(f"Temperature at La Guardia, forecast {ahead} hours ahead", loc="left")
        left.set_ylabel("degrees Celsius")
        left.tick_params(axis="x", rotation=30)
        left.legend(frameon=False)
        labels = list(errors)
        for i, name in enumerate(seconds):
            right.barh([row + 0.38 * i for row in range(len(labels))], [seconds[name][label] for label in labels], 0.36,
                       color=common.COLOURS[name], label=name)
        right.set_yticks([row + 0.19 for row in range(len(labels))],
                         [f"{label}: {min(errors[label].values()):.2f}°" for label in labels])
        right.set_title(f"Seconds to train (naive error {naive:.2f}°)", loc="left")
        right.legend(frameon=False)


def parse() -> argparse.ArgumentParser:
    return common.parser(__doc__, plot="weather.png", epochs=4, hidden=32, batch=64, window=24, ahead=6)


def run(args) -> str:
    hours, values = load()
    split = len(hours) * 3 // 4
    inputs, mean, std = features(hours, values, split)
    temperature = values[:, 0]
    if args.ahead > 24 or args.window + args.ahead > 24 * 28:
        raise common.Refused(f"--ahead is at most 24 and with --window at most 672 hours, got {args.ahead} and {args.window}")
    ends = torch.arange(max(args.window, 24) - 1, len(hours) - args.ahead)  # the last hour that a forecast may know of
    ends = ends[~temperature[ends + args.ahead].isnan()]
    windows = inputs.unfold(0, args.window, 1)[ends - args.window + 1].transpose(1, 2).contiguous()
    now = inputs[ends, 0] * std[0] + mean[0]
    truth, yesterday = temperature[ends + args.ahead], (inputs[:, 0] * std[0] + mean[0])[ends + args.ahead - 24]
    train, test = ends + args.ahead < split, ends - args.window + 1 >= split
    change = (truth - now) / std[0]
    naive = {"same as now": rmse(now[test], truth[test]), "same as a day before": rmse(yesterday[test], truth[test])}
    print(f"{train.sum():,} windows of {args.window} hours to learn from, {test.sum():,} later ones to test; {args.hidden} units, "
          f"batch {args.batch}, {torch.get_num_threads()} threads\n\nerror (RMSE) of the temperature {args.ahead} hours ahead, in "
          "degrees Celsius:\n" + "".join(f"{name:22}{error:6.2f}\n" for name, error in naive.items()))
    errors, seconds, said, races = {}, {}, {}, []
    for kind, both in KINDS:
        label = f"{kind}, both ways" if both else kind
        models = common.build(args, lambda package: Forecaster(package, kind, both, inputs.shape[1], args.hidden))
        optimizers = {name: torch.optim.Adam(model.parameters(), 3e-3) for name, model in models.items()}
        race = common.Race(models, args.epochs, -(-int(train.sum()) // args.batch))
        losses: dict[str, list[float]] = {name: [] for name in models}
        for epoch, name, model in race:
            order = torch.randperm(int(train.sum()), generator=torch.Generator().manual_seed(args.seed + epoch))
            losses[name].append(train_epoch(model, optimizers[name], windows[train], change[train], order, args.batch, race))
        errors[label] = {}
        for name, model in models.items():
            with torch.no_grad():
                said[label, name] = now[test] + model.eval()(windows[test]) * std[0]
            errors[label][name] = rmse(said[label, name], truth[test])
            seconds.setdefault(name, {})[label] = sum(race.seconds[name])
            print(f"{label:16}{name:10}loss {losses[name][0]:.4f} to {losses[name][-1]:.4f}  error {errors[label][name]:.2f}  "
                  f"{seconds[name][label]:5.1f} s", flush=True)
    best = min(errors, key=lambda label: min(errors[label].values()))
    week = slice(0, 24 * 7)
    times = [hours[i + args.ahead] for i in ends[test].tolist()][week]
    draw(args.plot, times, truth[test][week], {name: (best, said[best, name][week]) for name in seconds}, errors, seconds,
         min(naive.values()), args.ahead)
    spent = ", ".join(f"{name} {sum(times.values()):.1f} s" for name, times in seconds.items())
    return (f"{args.ahead} hours ahead, best is {best}: error " + ", ".join(f"{e:.2f} ({n})" for n, e in errors[best].items())
            + f", naive {min(naive.values()):.2f} degrees; all six layers trained in {spent}")


def main(argv=None) -> int:
    return common.main(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
