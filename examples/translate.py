"""Translates dates as people write them to ISO 8601, letter by letter: one LSTM reads, another writes.

    python -m examples.translate                 "Monday, the 3rd of May 2021" becomes 2021-05-03
    python -m examples.translate --forcing 1     the writer sees the true letters before (teacher forcing)

The reader takes texts of any length (packed), in both directions; its last states are the writer's first. The writer runs
over the whole date at once where it is shown the true letters, and step by step where it goes on from its own. Test dates
never occur in training, in any spelling.
"""

import argparse
import calendar
import datetime
import random
import sys

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from examples import common

FIRST, LAST = datetime.date(1969, 1, 1), datetime.date(2068, 12, 31)  # what two digits of a year stand for, as in C
LETTERS = " ',-./0123456789" + "abcdefghijklmnopqrstuvwxyz"
CODES = {letter: code for code, letter in enumerate(LETTERS, 1)}
START = 0  # is read by the writer before its first letter
LENGTH = len("2021-05-03")
SPELLINGS = [
    "{d} {month} {y}", "{d} {mon} {y}", "{month} {d}, {y}", "{mon} {nth} '{yy}", "{weekday}, the {nth} of {month} {y}",
    "{dd}/{mm}/{yy}", "{dd}/{mm}/{y}", "{d}.{m}.{y}", "{dd}-{mon}-{yy}", "{wd} {d} {mon} {y}", "{y}, {month} {nth}",
]  # fmt: skip


def spell(date: datetime.date, spelling: str) -> str:
    """The date in one of SPELLINGS; the day comes before the month where both are numbers."""
    month, weekday = calendar.month_name[date.month].lower(), calendar.day_name[date.weekday()].lower()
    ending = "th" if date.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10, "th")
    return spelling.format(
        d=date.day, dd=f"{date.day:02}", nth=f"{date.day}{ending}", m=date.month, mm=f"{date.month:02}", month=month,
        mon=month[:3], y=date.year, yy=f"{date.year % 100:02}", weekday=weekday, wd=weekday[:3])


def encode(text: str) -> Tensor:
    return torch.tensor([CODES[letter] for letter in text])


class Translator(nn.Module):
    """Texts in, scores of each letter of the date out.

    Args:
        package: torch.nn or fusedrnn, the one place in this file where the two differ.
        hidden: units of each direction of the reader; the writer has twice as many.
    """

    def __init__(self, package, hidden: int, embedding: int = 32):
        super().__init__()
        self.embed = nn.Embedding(1 + len(LETTERS), embedding)
        self.reader = package.LSTM(embedding, hidden, bidirectional=True)
        self.writer = package.LSTM(embedding, 2 * hidden)
        self.linear = nn.Linear(2 * hidden, 1 + len(LETTERS))
        for bias in (self.reader.bias_hh_l0, self.reader.bias_hh_l0_reverse, self.writer.bias_hh_l0):
            nn.init.ones_(bias.data.chunk(4)[1])  # the forget gates': to begin with, remember

    def forward(self, texts: list[Tensor], truth: Tensor | None = None) -> Tensor:
        """Scores (LENGTH, B, letters). Given `truth` (LENGTH, B), each letter is scored after the true ones before it."""
        packed = pack_sequence(texts, enforce_sorted=False)
        _, state = self.reader(packed._replace(data=self.embed(packed.data)))
        state = tuple(part.transpose(0, 1).flatten(1).unsqueeze(0) for part in state)  # both directions side by side
        letter = torch.full((1, len(texts)), START)
        if truth is not None:
            return self.linear(self.writer(self.embed(torch.cat([letter, truth[:-1]])), state)[0])
        scores = []
        for _ in range(LENGTH):
            output, state = self.writer(self.embed(letter), state)
            scores.append(self.linear(output))
            letter = scores[-1].argmax(-1)
        return torch.cat(scores)


def train_epoch(args, epoch, model, optimizer, schedule, dates, race) -> float:
    """Mean loss of an epoch; the same texts, in the same order, for each package."""
    draw = random.Random(f"{args.seed} {epoch}")
    total = 0.0
    for _ in range(args.batches):
        batch = draw.sample(dates, args.batch)
        truth = torch.stack([encode(str(date)) for date in batch], 1)
        texts = [encode(spell(date, draw.choice(SPELLINGS))) for date in batch]
        scores = model(texts, truth if draw.random() < args.forcing else None)
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), truth.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        race.step()
    return total / args.batches


@torch.no_grad()
def translate(model: Translator, texts: list[str]) -> list[str]:
    codes = model([encode(text) for text in texts]).argmax(-1).T.tolist()
    return ["".join("?" if code == START else LETTERS[code - 1] for code in row) for row in codes]


def parse() -> argparse.ArgumentParser:
    found = common.parser(__doc__, epochs=10, batches=100, batch=64, hidden=64, test=2000)
    found.add_argument("--forcing", type=float, default=0.5, help="share of batches with teacher forcing, default 0.5")
    return found


def run(args) -> str:
    if not 0 <= args.forcing <= 1:
        raise common.Refused(f"--forcing is a share of the batches, 0 to 1, got {args.forcing}")
    dates = [FIRST + datetime.timedelta(days) for days in range((LAST - FIRST).days + 1)]
    random.Random(args.seed).shuffle(dates)
    if args.test + args.batch > len(dates):
        raise common.Refused(f"--test and --batch share {len(dates):,} dates, got {args.test:,} and {args.batch:,}")
    unseen, dates = dates[: args.test], dates[args.test :]
    texts = [spell(date, SPELLINGS[i % len(SPELLINGS)]) for i, date in enumerate(unseen)]
    truth = [str(date) for date in unseen]
    print(f"{len(dates):,} dates to learn from and {len(unseen):,} unseen ones, in {len(SPELLINGS)} spellings; LSTM of "
          f"{args.hidden} units, batch {args.batch}, {torch.get_num_threads()} threads\n")
    models = common.build(args, lambda package: Translator(package, args.hidden))
    optimizers = {name: torch.optim.Adam(model.parameters()) for name, model in models.items()}
    schedules = {name: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.015, args.epochs * args.batches)
                 for name, optimizer in optimizers.items()}
    race = common.Race(models, args.epochs, args.batches)
    written, right = {}, {}
    for epoch, name, model in race:
        loss = train_epoch(args, epoch, model, optimizers[name], schedules[name], dates, race)
        race.stop()
        written[name] = translate(model, texts)
        right[name] = sum(map(str.__eq__, written[name], truth)) / len(truth)
        race.print(f"epoch {epoch:2}  {name:8}  loss {loss:.4f}  exact {right[name]:6.1%}")
    print(f"\n{'text':38}" + "".join(f"{name:12}" for name in written) + "truth")
    for text, *dates in list(zip(texts, *written.values(), truth))[:10]:
        print(f"{text:38}" + "  ".join(dates))
    print()
    return "exact on unseen dates: " + ", ".join(f"{name} {share:.1%}" for name, share in right.items()) + race.speed_up()


def main(argv=None) -> int:
    return common.main(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
