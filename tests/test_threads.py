"""Threads: any count, called from several at once, after a fork, in DataLoader workers, and idle when the call is over."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest
import torch
from torch import nn

import fusedrnn
from conftest import CELLS, kind_of, make_pair, states_for
from fusedrnn.testing import compare_modules, run_module

cells = pytest.mark.parametrize("cell", CELLS)
LIMIT = 60  # seconds after which a call counts as hung


def run_script(text, **environment):
    """Run Python text in a process of its own; a hang or a crash fails the test."""
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", textwrap.dedent(text)],
                          env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(1, 1, 5), (40, 3, 17), (5, 64, 130)], ids=str)
@cells
def test_any_number_of_threads(cell, size, threads):
    B, I, H = size  # noqa: E741
    torch.set_num_threads(threads)
    for options in ({}, dict(bidirectional=True)):
        ours, stock = make_pair(cell, I, H, **options)
        compare_modules(ours, stock, torch.randn(3, B, I), states_for(stock, B))


@cells
def test_number_changed_between_forward_and_backward(cell):
    ours, _ = make_pair(cell, 8, 65, bidirectional=True)
    input = torch.randn(4, 20, 8)
    grads = []
    for before, after in ((1, 1), (1, 3), (4, 1), (2, 4)):
        torch.set_num_threads(before)
        output = ours(input)[0]
        torch.set_num_threads(after)
        grads.append(torch.autograd.grad(output.sum(), ours.weight_hh_l0)[0])
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-6, atol=32 * torch.finfo(torch.float32).eps * grads[0].abs().max().item())


@cells
def test_two_python_threads_at_once(cell):
    """Each on its own module, then both on one: the same bits as alone."""
    ours, _ = make_pair(cell, 8, 33, bidirectional=True)
    twin, _ = make_pair(cell, 8, 33, bidirectional=True)
    input = torch.randn(6, 12, 8)
    expected = {module: run_module(module, input) for module in (ours, twin)}
    wrong = []

    def work(module):
        for _ in range(15):
            got = run_module(module, input)
            wrong.extend(name for name in got if not torch.allclose(got[name], expected[module][name], rtol=1e-5, atol=1e-5))

    for modules in ((ours, twin), (ours, ours), (ours, twin, ours, twin)):
        workers = [threading.Thread(target=work, args=(module,), daemon=True) for module in modules]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(LIMIT)
            assert not worker.is_alive(), "hung"
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*torch.jit.(fork|wait).*:DeprecationWarning")
@cells
def test_inside_torchs_own_parallel_regions(cell):
    """In autograd's threads (a hook), in torch.jit.fork's, in a thread pool with a batch of modules."""
    outer, inner = make_pair(cell, 4, 33)[0], make_pair(cell, 4, 33)[0]
    input = torch.randn(3, 8, 4)
    expected = inner(input)[0]
    seen = []
    leaf = input.clone().requires_grad_()
    output = outer(leaf)[0]

    def hook(grad):
        with torch.enable_grad():
            seen.append(inner(input)[0])
            seen[0].sum().backward()

    output.register_hook(hook)
    output.sum().backward()
    futures = [torch.jit._fork(inner, input) for _ in range(4)]
    seen += [torch.jit._wait(future)[0] for future in futures]
    assert len(seen) == 5 and all(torch.equal(t, expected) for t in seen)


NESTED = """
#include <omp.h>
void everybody(void (*work)(int), int threads) {
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num());
}
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_inside_an_openmp_region(tmp_path):
    """Called by every thread of a parallel region: OpenMP grants one thread each, and no barrier may wait for a second."""
    (tmp_path / "nested.c").write_text(NESTED)
    library = tmp_path / "nested.so"
    subprocess.run(["gcc", "-fopenmp", "-shared", "-fPIC", "-o", library, tmp_path / "nested.c"], check=True)
    run_script(f"""
        import ctypes, torch, fusedrnn
        torch.set_num_threads(4)
        module = fusedrnn.LSTM(4, 130, bidirectional=True)
        input = torch.randn(4, 40, 4)
        with torch.no_grad():
            expected = module(input)[0]
        results = {{}}
        def work(thread):
            torch.set_num_threads(4)
            with torch.no_grad():
                results[thread] = [torch.equal(module(input)[0], expected) for _ in range(5)]
        everybody = ctypes.CDLL({str(library)!r}).everybody
        everybody(ctypes.CFUNCTYPE(None, ctypes.c_int)(work), 3)
        assert results == {{thread: [True] * 5 for thread in range(3)}}, results
    """)


@pytest.mark.parametrize("limit", ["1", "2", "3"])
def test_fewer_threads_granted_than_asked_for(limit):
    run_script("""
        import torch, fusedrnn
        torch.set_num_threads(4)
        for kind in (fusedrnn.RNN, fusedrnn.GRU, fusedrnn.LSTM):
            module = kind(4, 130, bidirectional=True)
            output = module(torch.randn(4, 40, 4))[0]
            output.sum().backward()
            assert output.isfinite().all()
    """, OMP_THREAD_LIMIT=limit)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# fork
# ---------------------------------------------------------------------------------------------------------------------


def in_child(work) -> None:
    """Run `work` in a forked child; it must end well within the limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks in a process with threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"the child ended with status {status}"
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the forked child hung")


@pytest.mark.parametrize("threads", [1, 4])
@cells
def test_fork_after_use(cell, threads):
    """Forward and backward in the parent, then in a forked child, then in the parent again.

    The child's OpenMP has lost its threads: with more than one, torch's own matrix products hang there (GNU OpenMP), so
    the child asks for one, as DataLoader's workers do.
    """
    torch.set_num_threads(threads)
    ours, _ = make_pair(cell, 8, 130, bidirectional=True)
    input = torch.randn(3, 40, 8)
    expected = run_forward_backward(ours, input)

    def work():
        torch.set_num_threads(1)
        got = run_forward_backward(ours, input)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, expected))

    in_child(work)
    assert all(torch.equal(a, b) for a, b in zip(run_forward_backward(ours, input), expected))


def run_forward_backward(module, input):
    """In this thread: backward's own thread would not be there after a fork."""
    output = module(input)[0]
    return [output.detach(), *torch.autograd.grad(output.sum(), list(module.parameters()))]


def test_fork_before_use():
    """A child forked before any parallel region may use several threads, torch's own and the engine's."""
    run_script("""
        import os, torch, fusedrnn
        torch.set_num_threads(2)
        module = fusedrnn.GRU(8, 130, bidirectional=True)
        input = torch.full((3, 40, 8), 0.5)
        pid = os.fork()
        output = module(input)[0]
        torch.autograd.grad(output.sum(), list(module.parameters()))
        assert output.isfinite().all()
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    """)


class Encoded(torch.utils.data.Dataset):
    """A dataset that runs a recurrent layer in the worker."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.module(torch.full((4, 8), float(index)))[0].detach()


class Collate:
    def __init__(self, module):
        self.module = module

    def __call__(self, items):
        return self.module(torch.stack(items, 1).float())[0].detach()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_data_loader_workers(kind, start):
    module = getattr(fusedrnn, kind)(8, 9, bidirectional=True)
    expected = [module(torch.full((4, 8), float(index)))[0].detach() for index in range(6)]
    loader = torch.utils.data.DataLoader(Encoded(module), num_workers=2, multiprocessing_context=start, timeout=LIMIT)
    for item, wanted in zip(loader, expected, strict=True):
        torch.testing.assert_close(item[0], wanted)
    if start == "fork":
        items = [torch.full((4, 8), float(index)) for index in range(6)]
        loader = torch.utils.data.DataLoader(items, 3, collate_fn=Collate(module), num_workers=1, timeout=LIMIT)
        for batch, first in zip(loader, (0, 3), strict=True):
            torch.testing.assert_close(batch, module(torch.stack(items[first : first + 3], 1))[0].detach())


# ---------------------------------------------------------------------------------------------------------------------
# After the call
# ---------------------------------------------------------------------------------------------------------------------


@cells
def test_no_thread_spins_after_the_call(cell):
    """A process that has made a call with all threads uses no processor time while it sleeps."""
    script = f"""
        import time, torch, fusedrnn
        torch.set_num_threads(2)
        module = fusedrnn.{kind_of(cell)}(64, 256, bidirectional=True)
        for _ in range(3):
            module(torch.randn(10, 32, 64))[0].sum().backward()
        time.sleep(0.3)  # OpenMP itself lets idle threads spin for some milliseconds
        before = time.process_time()
        time.sleep(1.0)
        print(time.process_time() - before)
    """
    assert float(run_script(script)) < 0.05


def test_interpreter_ends_while_threads_are_idle():
    run_script("""
        import threading, torch, fusedrnn
        module = fusedrnn.LSTM(8, 65, bidirectional=True)
        threading.Thread(target=lambda: module(torch.randn(5, 33, 8))).start()
        module(torch.randn(5, 33, 8))[0].sum().backward()
    """)


def test_threads_do_not_change_what_a_model_learns():
    """Twenty steps of training at 1 and at 4 threads: the same losses, to rounding."""
    losses = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = fusedrnn.LSTM(3, 33, 2, bidirectional=True)
        head = nn.Linear(66, 1)
        optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.05)
        input, target = torch.randn(8, 20, 3), torch.randn(20, 1)
        for _ in range(20):
            optimizer.zero_grad()
            loss = (head(model(input)[0][-1]) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0] < 1.2
