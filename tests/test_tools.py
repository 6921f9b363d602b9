"""Tools that people put around a model: mixed precision with a scaler, inference mode, quantization."""

import pytest
import torch
from torch import nn

import fusedrnn
from models import Model, kinds

deprecated = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore::DeprecationWarning",
                                        "ignore:.*quantize_per_tensor", "ignore::FutureWarning", "ignore::UserWarning")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_autocast_with_a_scaler(kind, dtype):
    """Losses and master weights follow torch.nn's, in autocast's lower precision, with GradScaler's steps."""
    # On most processors torch.nn.LSTM cannot do this in float16: there the truth is its float32.
    stock_cannot = dtype == torch.float16 and kind == "LSTM"
    courses = []
    for home in (nn, fusedrnn):
        model = Model(kind, home)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
        torch.manual_seed(1)
        course = []
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=home is fusedrnn or not stock_cannot):
                loss = model(torch.randn(6, 2, 3)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            course.append(loss.detach())
        assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
        courses.append(torch.stack(course))
    torch.testing.assert_close(courses[1], courses[0], rtol=2e-2, atol=1e-3)


@kinds
def test_inference_mode(kind):
    model = Model(kind)
    with torch.inference_mode():
        output = model(torch.ones(6, 2, 3))
    assert output.is_inference()
    torch.testing.assert_close(output.clone(), model(torch.ones(6, 2, 3)).detach())


@deprecated
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_quantize_dynamic(kind):
    """torch's own layers with weights of 8 bits; errors up to 3 % of the largest output."""
    torch.manual_seed(0)
    options = {} if "Cell" in kind else {"num_layers": 2, "batch_first": True}
    model = nn.Sequential(getattr(fusedrnn, kind)(32, 64, **options)).eval()
    stock = nn.Sequential(getattr(nn, kind)(32, 64, **options)).eval()
    stock.load_state_dict(model.state_dict())
    input = torch.randn(20, 32) if options == {} else torch.randn(4, 20, 32)
    expected = first(model(input))
    found = first(torch.ao.quantization.quantize_dynamic(model, {getattr(fusedrnn, kind)})(input))
    assert torch.equal(found, first(torch.ao.quantization.quantize_dynamic(stock, {getattr(nn, kind)})(input)))
    assert 0 < (found - expected).abs().max() < 0.03 * expected.abs().max()
    assert torch.equal(first(model(input)), expected), "the model itself is left alone"


def first(result):
    return first(result[0]) if isinstance(result, tuple) else result
