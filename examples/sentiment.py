"""Tells good reviews of movies from bad ones: embedding, bidirectional LSTM of two layers with dropout, packed texts.

    python -m examples.sentiment                   10,605 snippets of reviews, which lie here
    python -m examples.sentiment --data FOLDER     the IMDB reviews: FOLDER/{train,test}/{pos,neg}/*.txt

Texts of any length share a batch (pack_padded_sequence). Both packages draw the same dropout from the same seed.
"""

import argparse
import collections
import gzip
import random
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from examples import common

DATA = Path(__file__).parent / "data" / "movie_reviews.tsv.gz"
PADDING, UNKNOWN = 0, 1  # codes of no word and of a word that is not in the vocabulary
Reviews = list[tuple[str, int]]  # text, and 1 if it is good


def load_snippets() -> tuple[Reviews, Reviews]:
    """Four fifths to learn from, the rest to test. The sign of the raters' mean is the label; those rated 0 are left out."""
    with gzip.open(DATA, "rt", encoding="utf-8", newline="\n") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    reviews = [(text, int(float(rating) > 0)) for _, rating, text in rows if float(rating)]
    random.Random(0).shuffle(reviews)
    split = len(reviews) * 4 // 5
    return reviews[:split], reviews[split:]


def load_imdb(folder: Path) -> tuple[Reviews, Reviews]:
    """As load_snippets, from the folder that IMDB's archive unpacks to."""
    if not folder.is_dir():
        raise common.Refused(f"--data: {folder} is not a folder")
    found = []
    for part in ("train", "test"):
        reviews = []
        for label, name in enumerate(("neg", "pos")):
            files = sorted((folder / part / name).glob("*.txt"))
            if not files:
                raise common.Refused(f"--data: {folder / part / name} has no .txt files")
            for file in files:
                try:
                    reviews.append((file.read_text(encoding="utf-8").replace("<br />", " "), label))
                except (OSError, UnicodeDecodeError) as error:
                    raise common.Refused(f"--data: {file} cannot be read: {error}") from None
        random.Random(0).shuffle(reviews)
        found.append(reviews)
    return found[0], found[1]


def split_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|'[a-z]+|[!?]", text.lower()) or ["?"]


class Critic(nn.Module):
    """Scores (B,) of texts: above 0 where the review is taken to be good.

    Args:
        package: torch.nn or fusedrnn, the one place in this file where the two differ.
    """

    def __init__(self, package, words: int, embedding: int, hidden: int, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(words, embedding, PADDING)
        self.dropout = nn.Dropout(dropout)
        self.lstm = package.LSTM(embedding, hidden, num_layers=2, dropout=dropout, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, 1)

    def forward(self, texts: list[Tensor]) -> Tensor:
        padded, lengths = pad_sequence(texts), torch.tensor([len(text) for text in texts])
        packed = pack_padded_sequence(self.dropout(self.embed(padded)), lengths, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.lstm(packed)[0], padding_value=-1.0)  # what no output of an LSTM falls below
        return self.linear(self.dropout(outputs.amax(0))).squeeze(1)


def train_epoch(args, epoch, model, optimizer, texts, labels, race) -> tuple[float, float]:
    """Mean loss and accuracy; the same order and the same dropout for each package."""
    torch.manual_seed(args.seed + epoch)
    model.train()
    total = right = 0.0
    for rows in torch.randperm(len(texts)).split(args.batch):
        scores = model([texts[row] for row in rows.tolist()])
        loss = nn.functional.binary_cross_entropy_with_logits(scores, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(rows)
        right += ((scores > 0) == (labels[rows] > 0)).sum().item()
        race.step()
    return total / len(texts), right / len(texts)


@torch.no_grad()
def test(model, texts, labels, batch) -> tuple[float, float, Tensor]:
    """Mean loss, accuracy and scores."""
    model.eval()
    scores = torch.cat([model(texts[start : start + batch]) for start in range(0, len(texts), batch)])
    loss = nn.functional.binary_cross_entropy_with_logits(scores, labels).item()
    return loss, ((scores > 0) == (labels > 0)).float().mean().item(), scores


def parse() -> argparse.ArgumentParser:
    found = common.parser(__doc__, epochs=5, batch=64, hidden=32, embedding=64, length=400)
    found.add_argument("--data", type=Path, metavar="FOLDER", help="IMDB's reviews, unpacked")
    return found


def run(args) -> str:
    parts = load_imdb(args.data) if args.data else load_snippets()
    words = [[split_words(text)[: args.length] for text, _ in part] for part in parts]
    counts = collections.Counter(word for text in words[0] for word in text)
    codes = {word: code for code, (word, count) in enumerate(counts.most_common(30_000), 2) if count > 1}
    (train, unseen) = [[torch.tensor([codes.get(word, UNKNOWN) for word in text]) for text in part] for part in words]
    truth, unseen_truth = [torch.tensor([float(label) for _, label in part]) for part in parts]
    print(f"{len(train):,} reviews to learn from, {len(unseen):,} to test, {len(codes):,} words; bidirectional LSTM of "
          f"{args.hidden} units x 2, batch {args.batch}, {torch.get_num_threads()} threads\n")
    models = common.build(args, lambda package: Critic(package, 2 + len(codes), args.embedding, args.hidden, 0.5))
    optimizers = {name: torch.optim.Adam(model.parameters(), 5e-3) for name, model in models.items()}
    race = common.Race(models, args.epochs, -(-len(train) // args.batch))
    accuracy, scores = {}, {}
    for epoch, name, model in race:
        loss, right = train_epoch(args, epoch, model, optimizers[name], train, truth, race)
        race.stop()
        unseen_loss, accuracy[name], scores[name] = test(model, unseen, unseen_truth, args.batch)
        race.print(f"epoch {epoch:2}  {name:8}  training: loss {loss:.4f}, accuracy {right:.1%}   "
                   f"test: loss {unseen_loss:.4f}, accuracy {accuracy[name]:.1%}")
    print("\n" + "".join(f"{name:10}" for name in models) + "truth")
    for row, (text, label) in enumerate(parts[1][:8]):
        verdicts = [values[row] > 0 for values in scores.values()] + [label]
        print("".join(f"{'good' if verdict else 'bad':10}" for verdict in verdicts) + text[:90])
    print()
    return "test accuracy: " + ", ".join(f"{name} {share:.1%}" for name, share in accuracy.items()) + race.speed_up()


def main(argv=None) -> int:
    return common.main(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
