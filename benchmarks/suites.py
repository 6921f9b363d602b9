"""Which shapes are measured, and why: suites, and the speeds aimed at.

A new suite is one more entry of SUITES; nothing else knows the shapes.
"""

from __future__ import annotations

import dataclasses
import re

from .shapes import CELLS, USUAL_MODES, Case, Shape
from .written import OPTIONS

USUAL_PROVIDERS = "torch,fusedrnn"
PACKED_PROVIDERS = "torch-dynamic,frozen-float32,frozen-bfloat16,frozen-int8"  # for inference alone
DEEPBENCH = "DeepBench, rnn_problems.h"

CPU_SHAPES = (
    Shape(
        *(100, 1, 64, 64),
        why="One stream through a small model: the cost of a step is all there is.",
        source="keyword spotting and control policies; cf. DeepBench's device set",
    ),
    Shape(
        *(100, 1, 256, 256),
        why="One stream whose weights just leave the innermost cache.",
        source="DeepBench's device set has LSTM 256, batch 1",
    ),
    Shape(
        *(28, 100, 28, 128),
        why="Handwritten digits, a row a step: the layer most people meet first.",
        source="the MNIST tutorials for recurrent layers",
    ),
    Shape(
        *(100, 16, 256, 256),
        why="Training at a small batch: between latency and arithmetic.",
        source="DeepBench, LSTM 256, batch 16, shortened to 100 steps",
    ),
    Shape(
        *(50, 64, 512, 512),
        why="Bound by arithmetic: oneDNN runs its LSTM near the GEMM peak here.",
        source="sequence-to-sequence encoders, batch 64, sentences of 50",
    ),
    Shape(
        *(25, 32, 1024, 1024),
        why="Large weights that must come through the cache at every step.",
        source=f"{DEEPBENCH}: LSTM 1024, batch 32, 25 steps",
    ),
    Shape(
        *(25, 1, 1024, 1024),
        why="Answering one request: bound by reading the weights.",
        source=f"{DEEPBENCH}: LSTM 1024, batch 1, 25 steps (server inference)",
    ),
    Shape(
        *(37, 7, 19, 45),
        why="Odd and prime sizes: no vector and no tile divides them.",
        source="made up, against kernels that suit round sizes only",
    ),
    Shape(
        *(60, 32, 128, 256),
        why="A tagger or speech encoder: two layers, both directions.",
        source="BiLSTM encoders",
        layers=2,
        bidirectional=True,
    ),
    Shape(
        *(100, 32, 128, 256),
        why="Sentences of 1 to 100 words, packed.",
        source="text classifiers on PackedSequence",
        packed=True,
        group="packed",
    ),
    Shape(
        *(1, 1, 64, 64),
        why="One call of one step: everything but the arithmetic.",
        source="step-by-step decoding and control",
        group="overhead",
    ),
)

GPU_SHAPES = (
    Shape(
        *(1024, 16, 768, 768),
        why="A language model's layer at the batch that a GPU is left idle by.",
        source="FlashRNN's grid: batch 16, 1024 steps",
    ),
    Shape(
        *(256, 2048, 128, 128),
        why="Many environments, a small memory each: no step fills the chip by its depth.",
        source="reinforcement learning, cf. TorchRL's LSTM benchmark",
    ),
    Shape(
        *(500, 32, 512, 512),
        why="A speech encoder: two layers, both directions.",
        source="BiLSTM acoustic models",
        layers=2,
        bidirectional=True,
    ),
    Shape(
        *(1500, 32, 1024, 1024),
        why="Speech at full length: weights of 8 to 16 MiB, read at every step.",
        source="DeepBench, speech recognition, hidden 1024, batch 32",
    ),
    Shape(
        *(1000, 1, 64, 64),
        why="One stream through a small model: the cost of a step is all there is.",
        source="keyword spotting and control policies",
    ),
    Shape(
        *(500, 32, 512, 512),
        why="Sentences of 1 to 500 steps, packed.",
        source="the speech encoder's layer on PackedSequence",
        packed=True,
        group="packed",
    ),
)


def family(why: str, source: str, sizes, **options) -> tuple[Shape, ...]:
    """A shape for each (T, B, I, H) of `sizes`, or (T, B, H) where the input is as wide as the state."""
    return tuple(Shape(T, B, *(2 * rest if len(rest) == 1 else rest), why, source, **options) for T, B, *rest in sizes)


def product(steps, batches, units):
    """(T, B, H) for each combination."""
    return [(T, B, H) for H in units for B in batches for T in steps]


# DeepBench's own rules: one layer, one direction, ReLU for its plain RNN. It leaves the product of the input out, which
# torch.nn cannot do; here the input is as wide as the state, and its product is inside.
VANILLA = {"cells": ("rnn",), "nonlinearity": "relu"}
BATCHES = (16, 32, 64, 128)
FEW = (1, 2, 4)
SPEECH_STEPS = (1500, 750, 375, 187)
SPEECH_UNITS = (2816, 2048, 1536, 2560)
DEEPBENCH_TRAIN = (
    *family("Speech recognition, plain RNN.", DEEPBENCH, product((50,), BATCHES, (1760, 2048, 2560)), **VANILLA),
    *family("Machine translation.", DEEPBENCH, product((25,), BATCHES, (512, 1024, 2048, 4096)), cells=("lstm",)),
    *family("Language modelling.", DEEPBENCH, product((50,), (8, 16, 32), (1536,)), cells=("lstm",)),
    *family("Characters.", DEEPBENCH, product((150,), (16, 32, 64), (256,)), cells=("lstm",)),
    *family("Speech recognition, full sentences.", DEEPBENCH, product(SPEECH_STEPS, (32,), SPEECH_UNITS), cells=("gru",)),
    *family("Speaker identification.", DEEPBENCH, [(1, 32, 512), (1500, 32, 1024), (1500, 64, 1024)], cells=("gru",)),
)
# LSTM 256, batch 1, 150 steps stands in DeepBench's list for servers and in that for devices: of 72 configurations 71 differ.
DEEPBENCH_INFERENCE = (
    *family("Machine translation, served.", DEEPBENCH, product((25,), FEW, (512, 1024, 2048)), cells=("lstm",)),
    *family("Language modelling, served.", DEEPBENCH, product((50,), FEW, (1536,)), cells=("lstm",)),
    *family("Characters, served, and for one stream on a device.", DEEPBENCH, product((150,), FEW, (256,)), cells=("lstm",)),
    *family("Speech recognition, served.", DEEPBENCH, product(SPEECH_STEPS, FEW, SPEECH_UNITS), cells=("gru",)),
    *family("Speaker identification, one step.", DEEPBENCH, product((1,), FEW, (512,)), cells=("gru",)),
    *family("Speaker identification, served.", DEEPBENCH, product((1500,), FEW, (1024,)), cells=("gru",)),
    *family("A plain RNN on a device.", DEEPBENCH, [(672, 1, 32), (96, 1, 64)], **VANILLA),
)

FLASHRNN = "FlashRNN's grid (Poeppel et al., ICLR 2025): 768 units, by batch and by steps"
FLASHRNN_SHAPES = family(
    "A language model's layer: the middle of the grid, and each size varied alone.", FLASHRNN,
    [(1024, B, 768) for B in (16, 2, 8, 32, 64, 128, 256)] + [(T, 16, 768) for T in (256, 512, 2048)],
)  # fmt: skip

RL = "TorchRL's benchmark of recurrent policies (pytorch/rl, pull request 3738)"
RL_SHAPES = (
    *family("Many environments, a small memory each.", RL, [(256, 2048, 128)], cells=("gru", "lstm")),
    *family("A collector's step: every environment once.", RL, [(1, 2048, 128)], cells=("gru", "lstm")),
)

RAGGED = "pytorch/pytorch issue 149194: packed sequences 5 to 114 times slower than padded ones"
PACKED_SHAPES = tuple(
    dataclasses.replace(shape, packed=packed, group="packed" if packed else "padded")
    for shape in family("The same batch packed and padded, ever longer.", RAGGED, product((10, 100, 300, 1000), (32,), (128,)))
    for packed in (True, False)
)

SPEECH = ("An acoustic model: frames of 80 mel bands, both directions.", "BiLSTM acoustic models and CTC taggers")
SPEECH_SHAPES = tuple(
    Shape(500, 32, 80, H, *SPEECH, layers=layers, bidirectional=True) for H in (256, 512, 1024) for layers in (2, 4)
)

STREAMED = (64, 256, 512, 1024)
STREAM_SHAPES = (
    *family("One step a call: latency, and nothing but.", "streaming recognisers and control", product((1,), (1,), STREAMED)),
    *family("One stream in chunks of 16 steps.", "streaming recognisers", product((16,), (1,), STREAMED)),
    *family("One long stream.", "offline recognition of one recording", product((1000,), (1,), STREAMED)),
)

FROZEN = "keyword spotting, streaming recognisers, control policies and audio plug-ins"
CARRIED = {"cells": ("lstm", "gru"), "states": True}
FROZEN_SHAPES = (
    *family("One step a call, states carried along.", FROZEN, product((1,), (1,), STREAMED), **CARRIED),
    *family("A cell, states carried along.", FROZEN, product((1,), (1,), STREAMED), step=True, **CARRIED),
    *family("A second of sound in one call.", FROZEN, product((100,), (1,), STREAMED), **CARRIED),
)

MEMORY_SHAPES = family(
    "What a training step holds at its peak, by steps and by units.", "the limit that a batch or a model is cut to",
    [(T, 32, 256) for T in (64, 256, 1024)] + [(256, 32, H) for H in (64, 128, 512)],
)  # fmt: skip

SCALING_BASE = (64, 16, 256)  # T, B, H from which one at a time is varied
SCALING = "a size doubled should cost at most twice; the table and the picture show where it does not"
SCALING_SHAPES = family(
    "How the cost grows with steps, batch, units and threads.", SCALING,
    [SCALING_BASE]
    + [(T, *SCALING_BASE[1:]) for T in (1, 8, 256)]
    + [(SCALING_BASE[0], B, SCALING_BASE[2]) for B in (1, 4, 64, 256)]
    + [(*SCALING_BASE[:2], H) for H in (16, 64, 128, 512, 1024)],
)  # fmt: skip


OPTION_SHAPES = family(
    "A plain layer of medium size: options are to cost next to nothing beside it.", "the middle of suite cpu, and a larger batch",
    [(100, 16, 256), (50, 64, 256)],
)  # fmt: skip


def scaling_shapes(threads: int) -> tuple[Shape, ...]:
    """SCALING_SHAPES, and the base on every count of threads below the run's own that halving it gives."""
    fewer = [threads >> k for k in range(1, threads.bit_length())]
    return SCALING_SHAPES + tuple(dataclasses.replace(SCALING_SHAPES[0], threads=count) for count in fewer)


@dataclasses.dataclass(frozen=True)
class Suite:
    """Shapes, each measured for its cells in every mode; float32 on a CPU, every one of `dtypes` on a GPU."""

    why: str
    shapes: tuple[Shape, ...]
    modes: tuple[str, ...] = USUAL_MODES
    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu", "cuda")
    options: tuple[str | None, ...] = (None,)  # of written.py
    providers: str = USUAL_PROVIDERS  # the baseline first


FORMATS = ("float32", "tf32", "bfloat16", "float16")
SUITES = {
    "cpu": Suite("what people run on a processor, with the speeds aimed at", CPU_SHAPES, devices=("cpu",)),
    "gpu": Suite("what people run on a GPU", GPU_SHAPES, dtypes=FORMATS, devices=("cuda",)),
    "deepbench-train": Suite("DeepBench's 53 training configurations", DEEPBENCH_TRAIN, ("training",), FORMATS),
    "deepbench-inference": Suite("DeepBench's 72 inference configurations", DEEPBENCH_INFERENCE, ("inference",), FORMATS),
    "flashrnn": Suite("FlashRNN's own grid", FLASHRNN_SHAPES, dtypes=FORMATS, devices=("cuda",)),
    "rl": Suite("reinforcement learning: many short memories", RL_SHAPES),
    "packed": Suite("packed sequences beside the same batch padded", PACKED_SHAPES),
    "speech": Suite("deep bidirectional encoders", SPEECH_SHAPES, dtypes=FORMATS),
    "stream": Suite("one stream, served", STREAM_SHAPES, ("inference",), FORMATS),
    "frozen": Suite("weights packed once, for one stream", FROZEN_SHAPES, ("inference",), devices=("cpu",),
                    providers=f"{USUAL_PROVIDERS},{PACKED_PROVIDERS}"),
    "memory": Suite("peak memory of a training step", MEMORY_SHAPES, ("training",)),
    "scaling": Suite("how the cost grows with T, B, H and threads", SCALING_SHAPES),
    "options": Suite("what torch.nn's layers cannot do, beside what one writes for it in torch", OPTION_SHAPES,
                     options=tuple(OPTIONS), providers="torch,fusedrnn,fusedrnn-without"),
}


# Geometric mean of torch time / fusedrnn time to reach; the packed group has one target for all cells and modes.
TARGETS = {
    ("padded", "rnn", "inference"): 2.5,
    ("padded", "rnn", "training"): 3.5,
    ("padded", "gru", "inference"): 3.0,
    ("padded", "gru", "training"): 4.0,
    ("padded", "lstm", "inference"): 1.7,
    ("padded", "lstm", "training"): 2.0,
    ("packed", None, None): 3.0,
}


def suites_of(device: str) -> list[str]:
    """Names of the suites that can be measured on "cpu" or "cuda"."""
    return [name for name, suite in SUITES.items() if device in suite.devices]


def cases(
    suite: str,
    only: str | None = None,
    *,
    device: str | None = None,
    modes: tuple[str, ...] | None = None,
    steps: int | None = None,
    threads: int = 1,
) -> list[Case]:
    """Every case of a suite, or those whose name (``lstm/training/T100-B1-I64-H64``) matches the pattern `only`.

    Args:
        device: default: the suite's first.
        modes: default: the suite's own.
        steps: cuts longer sequences to this many; what is then the same is measured once.
        threads: the run's, for the suite that varies them.
    """
    chosen = SUITES[suite]
    device = device or chosen.devices[0]
    shapes = scaling_shapes(threads) if suite == "scaling" and device == "cpu" else chosen.shapes
    every = {
        (case := Case(shape, cell, mode, dtype, device, option).cut(steps)).name: case
        for option in chosen.options
        for shape in shapes
        for dtype in (chosen.dtypes if device == "cuda" else ("float32",))
        for cell in shape.cells
        for mode in modes or chosen.modes
        if option is None or (cell in OPTIONS[option].cells and mode in OPTIONS[option].modes)
    }
    return [case for name, case in every.items() if only is None or re.search(only, name)]


def case_named(name: str, device: str | None = None) -> Case:
    """The case of this name, from whichever suite has it, on `device` or where a suite runs first. KeyError if none has."""
    names = suites_of(device) if device else SUITES
    return {case.name: case for suite in names for case in cases(suite, device=device)}[name]
