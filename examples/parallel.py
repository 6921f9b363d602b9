"""Trains on two processes (DistributedDataParallel); one process on the joined batches must end with the same weights.

    python -m examples.parallel                                        starts the two processes itself
    torchrun --nproc-per-node 2 -m examples.parallel                   or torchrun does, any number of them

The layer learns to forecast the next hour's temperature on the weeks of examples/weather.py. Every process takes a share of
each batch; gloo, or NCCL where each has a GPU of its own, averages the gradients. A process that dies ends the others.
"""

import argparse
import datetime
import gc
import logging
import os
import sys
import tempfile
import threading
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from examples import common, weather
from examples.streaming import WEEK, Forecaster

PROCESSES = 2  # unless torchrun says otherwise
PATIENCE = datetime.timedelta(seconds=60)  # a process that hears nothing from the others for so long gives up
SAME = 1e-4  # of a weight; rounding alone stays far below


def train(models, args, inputs: Tensor, target: Tensor, rank: int, share: int, quiet: bool) -> common.Race:
    """Trains each model on part `rank` of `share` equal parts of every batch; prints the loss of its part unless `quiet`."""
    starts = torch.arange(0, len(target) - WEEK, 8)
    steps = len(starts) // args.batch  # of whole batches, so that the mean over parts is the mean over the batch
    optimizers = {name: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for name, model in models.items()}
    race = common.Race(models, args.epochs, steps, quiet)
    for epoch, name, model in race:
        order = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(args.seed + epoch))]
        total = 0.0
        for rows in order[: steps * args.batch].split(args.batch):
            weeks = rows.chunk(share)[rank] + torch.arange(WEEK)[:, None]
            loss = nn.functional.mse_loss(model(inputs[weeks])[0], target[weeks])
            optimizers[name].zero_grad()
            loss.backward()
            optimizers[name].step()
            total += loss.item()
            race.step()
        if not quiet:
            race.print(f"epoch {epoch:2}  {name:8}  loss {total / steps:.5f}")
    return race


def work(rank: int, world: int, args, device: str) -> str:
    """What each process does, in a group that stands. The first one then trains alone, compares, and tells."""
    hours, values = weather.load()
    split = len(hours) * 3 // 4
    inputs, mean, std = weather.features(hours, values, split)
    change = (inputs[1:split, 0] - inputs[: split - 1, 0]).to(device)
    inputs = inputs[: split - 1].to(device)

    def make(package):
        return Forecaster(package, args.kind, inputs.shape[1], args.hidden, args.layers).to(device)

    models = {name: DistributedDataParallel(model) for name, model in common.build(args, make).items()}
    if rank == 0:
        print(f"{world} processes ({dist.get_backend()}), each {args.batch // world} of {args.batch} weeks a step, "
              f"{torch.get_num_threads()} threads each\n", flush=True)
    together = train(models, args, inputs, change, rank, world, quiet=rank > 0)
    if rank > 0:
        return ""
    print("\none process, the joined batches\n")
    alone = common.build(args, make)
    race = train(alone, args, inputs, change, 0, 1, quiet=False)
    print()
    worst, first = 0.0, common.build(args, make)
    for name, model in alone.items():
        pairs = list(zip(models[name].module.parameters(), model.parameters(), strict=True))
        gap = max((a - b).abs().max().item() for a, b in pairs)
        way = max((a - b).abs().max().item() for a, b in zip(first[name].parameters(), model.parameters(), strict=True))
        print(f"{name:9} training moved the weights by up to {way:.2f}; the two ways of it differ by at most {gap:.1e}; "
              f"{sum(together.seconds[name]):.1f} s on {world} processes, {sum(race.seconds[name]):.1f} s on one")
        worst = max(worst, gap)
    print()
    if not worst < SAME:
        raise AssertionError(f"the weights differ by {worst:.1e}, more than rounding explains")
    return f"{world} processes and one end with the same weights, to {worst:.0e}" + together.speed_up()


def join_group(rank: int, world: int, args, **rendezvous) -> str:
    """Runs `work` within a process group of gloo, or NCCL if there is a GPU for each."""
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= world
    device = f"cuda:{rank}" if gpus else "cpu"
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", rank=rank, world_size=world, timeout=PATIENCE, **rendezvous)
    try:
        return work(rank, world, args, device)
    finally:
        gc.collect()  # of the models that are in circles: they hold the group, whose threads must end before Python does
        dist.destroy_process_group()


def spawned(rank: int, args, folder: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // PROCESSES))
    tqdm.set_lock(threading.RLock())  # its own is one between processes, and complains when one of them is killed
    result = join_group(rank, PROCESSES, args, init_method=f"file://{folder}/meeting")
    if rank == 0:
        Path(folder, "result").write_text(result)


def parse() -> argparse.ArgumentParser:
    found = common.parser(__doc__, epochs=3, hidden=64, layers=1, batch=32)
    found.add_argument("--kind", choices=["RNN", "LSTM", "GRU"], default="GRU", type=str.upper, help="default GRU")
    return found


def run(args) -> str:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", PROCESSES))
    if args.batch % world:
        raise common.Refused(f"--batch is shared by {world} processes, so a multiple of {world}, got {args.batch}")
    if "RANK" in os.environ:  # torchrun's
        result = join_group(rank, world, args)
        if rank > 0:
            sys.exit(0)  # the first one tells
        return result
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine, whatever name it goes by
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # one line, below, is enough
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(spawned, (args, folder), PROCESSES, daemon=True)  # daemons: none outlives this process
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            sys.exit(f"parallel: {str(error).strip().splitlines()[-1]}")
        return Path(folder, "result").read_text()


def main(argv=None) -> int:
    return common.main(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
