"""What csrc/module.cpp exports."""

from typing import Literal, TypedDict

class _BuildRecord(TypedDict):
    version: str
    compiler: str
    isas: dict[str, str]
    flags: str
    torch: str
    cuda: bool
    cuda_archs: str
    cuda_why_not: str

class _Traits(TypedDict):
    gates: int
    pre: int
    states: int
    saved: int
    unit: int
    norms: int
    late: int
    chooses: bool
    multiplies: bool
    x_pre: list[int]
    h_pre: list[int]

class _ProductPlan(TypedDict):
    blocks: int
    threads: int
    shared_bytes: int
    unit_tiles: int
    sharers: int
    batch_tiles: int
    block_rows: int
    depth_blocks: int
    tiles: int
    split: int
    groups: int
    slots: int
    regime: Literal["step", "block", "cluster", "grid", "alone"]

class _Plan(TypedDict):
    cell: _ProductPlan
    projection: _ProductPlan
    dh: _ProductPlan
    dunprojected: _ProductPlan

def build_record() -> _BuildRecord: ...
def cell_traits() -> dict[str, _Traits]: ...
def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def cuda_plan(cell: str, dtype: str, *, T: int, B: int, H: int, P: int, D: int, N: int = 1, multiprocessors: int,
              shared_bytes: int, major: int = 9, tf32: bool = False, kernel: str = "") -> _Plan: ...
def cuda_stack(cell: str, dtype: str, *, T: int, B: int, H: int, layers: int, multiprocessors: int, shared_bytes: int, major: int = 9,
               tf32: bool = False, wanted: bool = False) -> tuple[int, _ProductPlan, _ProductPlan]: ...
def cuda_kernels(dtype: str = "float32") -> dict[str, list[str]]: ...
def want_large_pages(data: int, bytes: int) -> None: ...
