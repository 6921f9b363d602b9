"""The tools of the tests must be able to fail: planted mistakes in a copy of torch.nn, each of which must be found."""

import pytest
import torch
from torch import nn

from fusedrnn.fuzz import random_case
from fusedrnn.testing import compare_modules, compare_tensors, run_module
from same import same


class Scaled(nn.LSTM):
    """Torch's LSTM with one number wrong by a relative `factor` in one place."""

    place, factor = "output", 1.0

    def forward(self, input, hx=None):
        if self.place == "weight":
            with torch.no_grad():
                self.weight_hh_l0[2 * self.hidden_size] *= self.factor  # gate g of unit 0
        output, (hy, cy) = super().forward(input, hx)
        if self.place == "output":
            output = output * self.factor
        if self.place == "gradient":
            output = output + (self.factor - 1) * (output - output.detach())
        if self.place == "cy":
            cy = cy.detach()
        return output, (hy, cy)


def planted(place, factor, dtype):
    stock = nn.LSTM(5, 9, dtype=dtype)
    wrong = Scaled(5, 9, dtype=dtype)
    wrong.load_state_dict(stock.state_dict())
    wrong.place, wrong.factor = place, factor
    return wrong, stock, torch.randn(7, 3, 5, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", ["output", "gradient", "weight", "cy"])
def test_compare_finds_a_planted_mistake(place, dtype):
    ulps = {"weight": 2000}.get(place, 24)  # a weight reaches an output damped
    factor = 1 + ulps * torch.finfo(dtype).eps if place != "weight" or dtype.itemsize > 2 else 3.0
    with pytest.raises(AssertionError, match="FAIL|undefined"):
        compare_modules(*planted(place, factor, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_compare_lets_torch_pass(dtype):
    rows = compare_modules(*planted("output", 1.0, dtype))
    assert [row.name for row in rows[:3]] == ["output", "hy", "cy"]
    assert {row.name for row in rows[3:]} == {
        "grad input", "grad weight_ih_l0", "grad weight_hh_l0", "grad bias_ih_l0", "grad bias_hh_l0"
    }  # fmt: skip
    assert dtype == torch.float64 or any(row.stock > 0 for row in rows)


def test_compare_shows_both_errors():
    with pytest.raises(AssertionError, match=r"FAIL output +error [19]\.\d+e-0[23]  torch \d\.\d+e-0[789]  allowed"):
        compare_modules(*planted("output", 1.02, torch.float32))


def test_nan_counts():
    truth = torch.ones(3, dtype=torch.float64)
    wrong = torch.tensor([1, float("nan"), 1])
    for ours, stock in ((wrong, torch.ones(3)), (torch.ones(3), wrong), (-1 / torch.zeros(3), 1 / torch.zeros(3))):
        with pytest.raises(AssertionError, match="NaN or infinity"):
            compare_tensors("x", ours, stock, truth)


@pytest.mark.parametrize(
    ("dtype", "scale", "least"),  # least: an error that counts beside numbers of this size, and a tenth of it does not
    [
        (torch.float32, 1e-38, 1e-37),
        (torch.float32, 1e-28, 1e-34),
        (torch.bfloat16, 1e-38, 3e-38),
        (torch.float16, 1e-5, 3e-7),
        (torch.float64, 1e-40, 4e-46),
        (torch.float64, 1e-20, 4e-35),
    ],
    ids=str,
)
def test_tiny_numbers(dtype, scale, least):
    truth = torch.full((3,), scale, dtype=torch.float64)
    for error, passes in ((least, False), (least / 10, True)):
        assert compare_tensors("x", (truth + error).to(dtype), truth.to(dtype), truth).passed == passes


def test_uses_select_the_loss():
    module = nn.LSTM(2, 3)
    input = torch.randn(4, 1, 2)
    only_cy = run_module(module, input, uses=("cy",))["grad weight_hh_l0"]
    everything = run_module(module, input)["grad weight_hh_l0"]
    assert not torch.equal(only_cy, everything)
    assert "grad weight_hh_l0" not in run_module(module, input, uses=())


def test_cases_cover_the_options():
    cases = [random_case(seed) for seed in range(600)]
    assert {case.kind for case in cases} == {"RNN", "LSTM", "GRU"}
    assert {case.dtype for case in cases} == {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    assert {case.fault for case in cases} == {
        None, "hx batch", "hx dim", "input size", "input dtype", "no time"
    }  # fmt: skip
    for wanted in (
        lambda c: c.lengths and sorted(c.lengths, reverse=True) != list(c.lengths),
        lambda c: c.options.get("proj_size") and c.options["bidirectional"] and c.options["num_layers"] > 1,
        lambda c: c.options.get("dropout") and c.training and c.lengths,
        lambda c: c.unbatched and c.hx_layout,
        lambda c: c.B == 0,
        lambda c: c.mode == "inference",
        lambda c: c.uses == ("cy",),
        lambda c: "weights" in c.frozen,
    ):
        assert any(map(wanted, cases))
    assert cases[3] == random_case(3)


@pytest.mark.parametrize(
    "call",
    [
        lambda home: home.LSTM(3, 4 if home is nn else 5),
        lambda home: home.LSTM(3, 5)(torch.randn(2, 2, 3))[0].relu_() * (1 if home is nn else 1.001),
        lambda home: home.GRU(3, 5, batch_first=True)(torch.randn(2, 2, 3))[0 if home is nn else 1],
        lambda home: torch.rand(1) if home is nn else torch.rand(2),
        lambda home: [] if home is nn else warn("so"),
        lambda home: torch.ones(2, 3) if home is nn else torch.ones(3, 2).T,
    ],
)
def test_same_finds_a_difference(call):
    with pytest.raises(AssertionError):
        same(call)


def test_same_demands_the_exception():
    with pytest.raises(AssertionError, match="did not raise"):
        same(lambda home: home.LSTM(3, 5), raises=ValueError)


def warn(text):
    import warnings

    warnings.warn(text, stacklevel=1)
    return []
