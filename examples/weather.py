"""Forecasts the temperature some hours ahead from the last day's weather: RNN, LSTM and GRU, one way and both ways.

    python -m examples.weather              a year of hourly observations at La Guardia airport, which lie here
    python -m examples.weather --ahead 24   the same hour tomorrow

The first three quarters of the year are learned from, the last one tests. A bidirectional layer reads a window of the past
in both directions: nothing that comes after it is ever an input, and a missing value is taken from the hours before.
"""

import argparse
import csv
import datetime
import gzip
import itertools
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from examples import common

DATA = Path(__file__).parent / "data" / "weather.csv.gz"
MEASURED = ["temp", "dewp", "wind_speed", "pressure"]


def load() -> tuple[list[datetime.datetime], Tensor]:
    """Every hour of the year, and (hours, MEASURED) in degrees Celsius, miles an hour and millibars; nan: not measured."""
    with gzip.open(DATA, "rt", newline="") as file:
        rows = {datetime.datetime.fromisoformat(row["time_hour"].rstrip("Z")): row for row in csv.DictReader(file)}
    hour = datetime.timedelta(hours=1)
    hours = [min(rows) + i * hour for i in range((max(rows) - min(rows)) // hour + 1)]
    values = torch.tensor([[float(rows.get(hour, {}).get(name) or "nan") for name in MEASURED] for hour in hours])
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


def train_epoch(model, optimizer, windows, change, batches, race) -> float:
    """Mean loss."""
    total = 0.0
    for rows in batches:
        loss = nn.functional.mse_loss(model(windows[rows]), change[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
        race.step()
    return total / len(change)


def draw(args, week, truth, forecasts, errors, seconds):
    """A week of the test: the truth and what the best layer said; and error and time of every layer."""
    with common.drawing(args.plot, columns=2, figsize=(14, 4.5), width_ratios=[1.6, 1]) as (left, right):
        left.plot(week, truth[: len(week)], color="black", label="truth")
        for (label, values), name, line in zip(forecasts.items(), seconds, ("-", "--")):
            left.plot(week, values[: len(week)], line, color=common.COLOURS[name], label=label)
        left.set_title(f"Temperature at La Guardia, forecast {args.ahead} hours ahead, degrees Celsius", loc="left")
        left.legend(frameon=False)
        for i, (name, times) in enumerate(seconds.items()):
            right.barh([row + 0.38 * i for row in range(len(times))], times.values(), 0.36, color=common.COLOURS[name])
        labels = [f"{label}: {min(each.values()):.2f}°" for label, each in errors.items()]
        right.set_yticks([row + 0.19 for row in range(len(labels))], labels)
        right.set_title("Error, and seconds to train", loc="left")


def parse() -> argparse.ArgumentParser:
    return common.parser(__doc__, plot="weather.png", epochs=4, hidden=32, batch=64, window=24, ahead=6)


def run(args) -> str:
    hours, values = load()
    inputs, mean, std = features(hours, values, split := len(hours) * 3 // 4)
    if args.ahead > 24 or args.window + args.ahead > 24 * 28:
        raise common.Refused(f"--ahead is at most 24, with --window at most 672 hours, got {args.ahead} and {args.window}")
    ends = torch.arange(max(args.window, 24) - 1, len(hours) - args.ahead)  # the last hour that a forecast knows of
    ends = ends[~values[ends + args.ahead, 0].isnan()]
    windows = inputs.unfold(0, args.window, 1)[ends - args.window + 1].transpose(1, 2).contiguous()
    now, before = [inputs[rows, 0] * std[0] + mean[0] for rows in (ends, ends + args.ahead - 24)]
    truth = values[ends + args.ahead, 0]
    train, test = ends + args.ahead < split, ends - args.window + 1 >= split
    learned, count = (windows[train], (truth - now)[train] / std[0]), int(train.sum())

    def rmse(forecast: Tensor) -> float:
        return (forecast - truth[test]).square().mean().sqrt().item()

    naive = {"same as now": rmse(now[test]), "same as a day before": rmse(before[test])}
    print(f"{count:,} windows to learn from, {test.sum():,} later ones to test; {torch.get_num_threads()} threads\n\n"
          f"RMSE in degrees, {args.ahead} hours ahead: " + ", ".join(f"{name} {error:.2f}" for name, error in naive.items()))
    errors, seconds, said = {}, {}, {}
    for kind, both in itertools.product(("RNN", "LSTM", "GRU"), (False, True)):
        label = f"{kind}, both ways" if both else kind
        models = common.build(args, lambda package: Forecaster(package, kind, both, inputs.shape[1], args.hidden))
        optimizers = {name: torch.optim.Adam(model.parameters(), 3e-3) for name, model in models.items()}
        race, losses = common.Race(models, args.epochs, -(-count // args.batch)), {name: [] for name in models}
        for epoch, name, model in race:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed + epoch))
            losses[name].append(train_epoch(model, optimizers[name], *learned, order.split(args.batch), race))
        for name, model in models.items():
            with torch.no_grad():
                said[label, name] = now[test] + model(windows[test]) * std[0]
            errors.setdefault(label, {})[name] = rmse(said[label, name])
            seconds.setdefault(name, {})[label] = sum(race.seconds[name])
            print(f"{label:16}{name:10}loss {losses[name][0]:.4f} to {losses[name][-1]:.4f}  "
                  f"error {errors[label][name]:.2f}  {seconds[name][label]:5.1f} s", flush=True)
    best = min(errors, key=lambda label: min(errors[label].values()))
    week = [hours[i + args.ahead] for i in ends[test][: 24 * 7].tolist()]
    draw(args, week, truth[test], {f"{best}, {name}": said[best, name] for name in seconds}, errors, seconds)
    scores = ", ".join(f"{error:.2f} ({name})" for name, error in errors[best].items())
    spent = ", ".join(f"{sum(times.values()):.1f} s ({name})" for name, times in seconds.items())
    return (f"{args.ahead} hours ahead, best is {best}: error {scores}, naive {min(naive.values()):.2f} degrees; "
            f"all six layers trained in {spent}")


def main(argv=None) -> int:
    return common.main(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
