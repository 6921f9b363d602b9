"""Several processes, replicas, and long sequences in parts: weights and gradients are those of one process, one module, one call.

Two processes are started once for all tests that need them. They train with both packages, each on its half of every batch, and
leave the weights in files; the tests compare them with what one process finds on the whole batches.
"""

import datetime
import faulthandler
import os
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedrnn
from conftest import CELLS, make_pair, states_for
from same import same

WORLD = 2
LIMIT = 60  # seconds; no process works longer, or waits longer for another
HOMES = {"torch": nn, "fusedrnn": fusedrnn}
KINDS = ["RNN", "LSTM", "GRU", "LSTMCell"]
EDITED = ["GRUCell"]  # torch.nn.RNNCell does not allow it, and torch.nn.LSTMCell loses the gradients, in two processes
WAYS = ["ddp", "fsdp"]
STEPS = 3  # of each optimizer
close = partial(torch.testing.assert_close, rtol=0, atol=1e-11)  # of float64: the order of sums alone


class Tagger(nn.Module):
    """Scores of 3 tags for each token, by two layers in both directions or by a cell; also the last states."""

    def __init__(self, home, kind):
        super().__init__()
        cell = kind.endswith("Cell")
        self.embedding = nn.Embedding(11, 6)
        self.rnn = getattr(home, kind)(6, 5, **({} if cell else {"num_layers": 2, "bidirectional": True}))
        self.head = nn.Linear(5 if cell else 10, 3)

    def forward(self, tokens):
        output, hx = self.embedding(tokens), None
        if isinstance(self.rnn, nn.RNNBase):
            output, hx = self.rnn(output)
        else:
            steps = []
            for step in output:
                hx = self.rnn(step, hx)
                steps.append(hx[0] if isinstance(hx, tuple) else hx)
            output = torch.stack(steps)
        return self.head(output), *(hx if isinstance(hx, tuple) else (hx,))


def tagger(home, kind, seed=0):
    torch.manual_seed(seed)
    return Tagger(home, kind).double()


def loss_of(model, rank=0, share=1, step=0):
    """On part `rank` of `share` equal parts of a batch, so that the mean over the parts is the loss on the batch."""
    tokens = torch.randint(11, (5, 8), generator=torch.Generator().manual_seed(step)).chunk(share, 1)[rank]
    scores, *states = model(tokens)
    return nn.functional.cross_entropy(scores.flatten(0, 1), tokens.flatten() % 3) + sum(h.square().mean() for h in states)


def train(model, weights_of, rank=0, share=1):
    """[weights after some steps of SGD, weights after as many more of Adam]"""
    found = []
    for optimizer in (torch.optim.SGD(model.parameters(), 0.3, momentum=0.9), torch.optim.Adam(model.parameters(), 0.02)):
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, rank, share, step).backward()
            optimizer.step()
        found.append({name: weight.detach().clone() for name, weight in weights_of(model).items()})
    return found


def shard(model, mesh, **options):
    """The recurrent layer alone, which frees its weights between forward and backward, and the rest."""
    fully_shard(model.rnn, mesh=mesh, reshard_after_forward=True, **options)
    return fully_shard(model, mesh=mesh, **options)


def sharded(home, kind, mesh):
    """A model that never was whole in any process: without memory first, then with the weights of process 0."""
    full = tagger(home, kind).state_dict() if dist.get_rank() == 0 else {}
    with torch.device("meta"):
        model = shard(tagger(home, kind), mesh)
    model.to_empty(device="cpu")
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def gathered(model):
    assert all(type(weight.data) is DTensor for weight in model.parameters())
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def in_bfloat16(home, kind, mesh):
    """(results, gradients, dtype of the sharded weights) of float32 weights that are bfloat16 in the model's calls."""
    torch.manual_seed(0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(Tagger(home, kind), mesh, mp_policy=policy)
    results = model(torch.arange(20).view(5, 4) % 11)
    sum(result.float().square().sum() for result in results).backward()
    grads = {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}
    return [result.detach() for result in results], grads, model.rnn.weight_hh_l0.dtype


def edited_in_place(home, kind, mesh):
    """Gradients of a cell whose result is edited in place: fully_shard hangs its hook on the result."""
    torch.manual_seed(0)
    cell = fully_shard(getattr(home, kind)(6, 5).double(), mesh=mesh, reshard_after_forward=True)
    result = cell(torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6))
    result = result[0] if kind == "LSTMCell" else result
    result += 1
    result.square().sum().backward()
    return {name: weight.grad.full_tensor() for name, weight in cell.named_parameters()}


def work(rank, folder):
    """What a process does. It leaves a file."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    warnings.filterwarnings("error", ".*not on the fused engine")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on this machine, whatever name it goes by
    patience = datetime.timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", f"file://{folder}/meeting", patience, rank=rank, world_size=WORLD)
    try:
        mesh, found = init_device_mesh("cpu", (WORLD,)), {}
        for package, home in HOMES.items():
            for kind in KINDS:
                model = DistributedDataParallel(tagger(home, kind, seed=rank), gradient_as_bucket_view=True)  # starts as 0's
                found["ddp", package, kind] = train(model, lambda model: model.module.state_dict(), rank, WORLD)
                found["fsdp", package, kind] = train(sharded(home, kind, mesh), gathered, rank, WORLD)
            for kind in EDITED:
                found["edited", package, kind] = edited_in_place(home, kind, mesh)
            found["bfloat16", package] = in_bfloat16(home, "LSTM", mesh)
        torch.save(found, Path(folder, f"found{rank}"))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each process found: {(way, package, kind): weights}, and more. An exception of theirs is raised here."""
    folder = tmp_path_factory.mktemp("group")
    group = mp.spawn(work, (str(folder),), WORLD, join=False, daemon=True)
    deadline = time.monotonic() + 2 * LIMIT  # it takes them a while to start
    try:
        while not group.join(timeout=1):
            assert time.monotonic() < deadline, "the processes do not end"
    finally:
        for process in group.processes:
            process.kill()
    return [torch.load(folder / f"found{rank}") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(together, way, kind):
    """DistributedDataParallel and fully_shard, SGD and Adam: the weights of one process on the whole batches, and torch.nn's."""
    alone = {package: train(tagger(home, kind), nn.Module.state_dict) for package, home in HOMES.items()}
    before = tagger(fusedrnn, kind).state_dict()
    for step, expected in enumerate(alone["torch"]):
        close(alone["fusedrnn"][step], expected)
        assert all((expected[name] - before[name]).abs().max() > 1e-3 for name in before)
        for found in together:
            for package in HOMES:
                assert list(found[way, package, kind][step]) == list(before)
                close(found[way, package, kind][step], dict(expected))


@pytest.mark.parametrize("kind", EDITED)
def test_result_of_a_sharded_cell_is_edited(together, kind):
    for found in together:
        close(found["edited", "fusedrnn", kind], found["edited", "torch", kind])


def test_sharded_in_bfloat16(together):
    """Under a policy of mixed precision, results and gradients have the dtypes of torch.nn's, and its values."""
    for found in together:
        (ours, our_grads, ours_kept), (stock, grads, kept) = found["bfloat16", "fusedrnn"], found["bfloat16", "torch"]
        assert [result.dtype for result in ours] == [result.dtype for result in stock] == [torch.bfloat16] * 3
        assert ours_kept == kept == torch.float32 and {grad.dtype for grad in our_grads.values()} == {torch.float32}
        for one, other in [*zip(ours, stock), *((our_grads[name], grads[name]) for name in grads)]:
            torch.testing.assert_close(one, other, rtol=0, atol=0.03 * other.abs().max().item())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it wants the module there")
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_data_parallel_without_gpus(kind):
    """It calls the module."""
    def use(home):
        model = nn.DataParallel(getattr(home, kind)(4, 5, 2, batch_first=True))
        output, _ = model(torch.randn(3, 6, 4))
        output.square().sum().backward()
        return output, model.state_dict(), [weight.grad for weight in model.parameters()]

    same(use)


@pytest.mark.parametrize("cell", CELLS)
def test_replicas_share_a_batch(cell):
    """As DataParallel does it: each replica gets copies that know where they come from, and a part of the batch."""
    ours, stock = make_pair(cell, 4, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    input = torch.randn(7, 6, 4, dtype=torch.float64)
    replicas = [ours._replicate_for_data_parallel() for _ in range(3)]
    for replica in replicas:
        for name, weight in ours.named_parameters():
            setattr(replica, name, weight.clone())
        assert not list(replica.parameters())
    output = torch.cat([replica(part)[0] for replica, part in zip(replicas, input.chunk(3, 1))], 1)
    close(output, stock(input)[0])
    output.square().sum().backward()
    stock(input)[0].square().sum().backward()
    close({name: w.grad for name, w in ours.named_parameters()}, {name: w.grad for name, w in stock.named_parameters()})


def each(states, change):
    return tuple(map(change, states)) if isinstance(states, tuple) else change(states)


PARTS = [5, 1, 8, 5, 3]  # steps of each part of a long sequence


@pytest.mark.parametrize("cell", CELLS)
def test_truncated_backpropagation(isa, cell):
    """A step of training after each part, from the states where the last one ended: torch.nn's weights."""
    pair = make_pair(cell, 4, 5, num_layers=2, dtype=torch.float64)
    input, target = torch.randn(sum(PARTS), 3, 4, dtype=torch.float64), torch.randn(sum(PARTS), 3, 5, dtype=torch.float64)

    def train_in_parts(module, carry):
        optimizer = torch.optim.SGD(module.parameters(), 0.2, momentum=0.9)
        for _ in range(3):
            hx = None
            for part, wanted in zip(input.split(PARTS), target.split(PARTS)):
                output, hx = module(part, hx)
                optimizer.zero_grad()
                nn.functional.mse_loss(output, wanted).backward()
                optimizer.step()
                hx = each(hx, torch.Tensor.detach) if carry else None
        return {name: weight.detach().clone() for name, weight in module.named_parameters()}

    start = {name: weight.clone() for name, weight in pair[0].state_dict().items()}
    ours, stock = (train_in_parts(module, carry=True) for module in pair)
    close(ours, stock)
    pair[0].load_state_dict(start)
    forgetful = train_in_parts(pair[0], carry=False)
    assert all((forgetful[name] - stock[name]).abs().max() > 1e-6 for name in stock), "the states make no difference"


@pytest.mark.parametrize("cell", CELLS)
def test_parts_equal_the_whole(isa, cell):
    """States that are not detached carry the gradients back, through all parts to the first states."""
    ours, stock = make_pair(cell, 4, 5, num_layers=2, dtype=torch.float64)
    input, first = torch.randn(sum(PARTS), 3, 4, dtype=torch.float64), states_for(ours, 3)
    out = torch.randn(sum(PARTS), 3, 5, dtype=torch.float64)

    def call(module, parts):
        x, start = input.clone().requires_grad_(), each(first, lambda state: state.clone().requires_grad_())
        outputs, hx = [], start
        for part in x.split(parts):
            output, hx = module(part, hx)
            outputs.append(output)
        output, start, hx = torch.cat(outputs), *(s if isinstance(s, tuple) else (s,) for s in (start, hx))
        loss = (output * out).sum() + sum(state.square().sum() for state in hx)
        return output, hx, torch.autograd.grad(loss, [x, *start, *module.parameters()])

    found = call(ours, PARTS)
    close(found, call(ours, sum(PARTS)))
    close(found, call(stock, sum(PARTS)))
    close(found, call(stock, PARTS))
