"""Packages of other people, as they are, train under fusedrnn.patch() as they do with torch.nn, from the same seed.

They are those of requirements-clients.txt. A test is skipped where its package is not installed, unless FUSEDRNN_CLIENTS=1.
"""

import importlib
import importlib.metadata
import os
import sys
import threading

import pytest
import torch
from torch import nn

import fusedrnn
from documents import ROOT

REQUIRED = os.environ.get("FUSEDRNN_CLIENTS") == "1"
PINNED = [line.split("==") for line in (ROOT / "requirements-clients.txt").read_text().splitlines() if line[:1] != "#"]


def client(name):
    """The module; without it the test fails if REQUIRED and is skipped if not."""
    return importlib.import_module(name) if REQUIRED else pytest.importorskip(name)


@pytest.mark.skipif(not REQUIRED, reason="only FUSEDRNN_CLIENTS=1 requires them")
@pytest.mark.parametrize("package, version", PINNED)
def test_installed_as_pinned(package, version):
    assert importlib.metadata.version(package) == version


@pytest.fixture
def both(monkeypatch):
    """`run`: train with torch.nn, then under patch, and compare."""
    cells = []
    stack, one_step = fusedrnn.functional.stack, fusedrnn.autograd.one_step

    def counted(cell, *args):
        cells.append(cell)
        return stack(cell, *args)

    def counted_step(cell, *args):
        result = one_step(cell, *args)
        if result is not None:  # else it is for the other
            cells.append(cell)
        return result

    def run(train, kinds, tolerance, modules=()):
        """
        Args:
            train: gives (model, decisions, numbers). Decisions must be the same; numbers, a list, and weights close.
            kinds: the names of the model's recurrent layers, in its order.
            tolerance: for numbers and weights, as a share of a tensor's largest.
            modules: for patch.
        """
        torch.manual_seed(0)
        stock, expected_decisions, expected = train()
        assert not cells
        with fusedrnn.patch(modules):
            torch.manual_seed(0)
            fused, decisions, numbers = train()
        assert recurrent(stock) == [getattr(nn, kind) for kind in kinds]
        assert recurrent(fused) == [getattr(fusedrnn, kind) for kind in kinds]
        assert len(cells) >= 20 * len(kinds) and set(cells) == {kind.removesuffix("Cell").lower() for kind in kinds}
        assert decisions == expected_decisions
        pairs = {f"number {i}": pair for i, pair in enumerate(zip(numbers, expected, strict=True))}
        weights = fused.state_dict()
        pairs |= {name: (weights[name], weight) for name, weight in stock.state_dict().items()}
        for name, pair in pairs.items():
            ours, theirs = (torch.as_tensor(value, dtype=torch.float64) for value in pair)
            difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
            assert difference <= tolerance * scale, f"{name}: differs by {difference:.1e}, is up to {scale:.1e}"

    monkeypatch.setattr(fusedrnn.functional, "stack", counted)
    monkeypatch.setattr(fusedrnn.autograd, "one_step", counted_step)
    return run


def recurrent(model):
    return [type(module) for module in model.modules() if isinstance(module, (nn.RNNBase, nn.RNNCellBase))]


def test_recurrent_ppo(both):
    """sb3-contrib learns to balance a pole whose speed it does not see: LSTMs, step by step and over sequences."""
    gymnasium, sb3, evaluation = map(client, ("gymnasium", "sb3_contrib", "stable_baselines3.common.evaluation"))

    class Speedless(gymnasium.ObservationWrapper):
        def __init__(self):
            super().__init__(gymnasium.make("CartPole-v1"))
            self.observation_space = gymnasium.spaces.Box(-5, 5, (2,))

        def observation(self, observation):
            return observation[::2]

    def train():
        actions, values = [], []

        def note(seen, _):
            actions.append(seen["actions"].tolist())
            values.append(seen["values"].item())
            return True

        agent = sb3.RecurrentPPO("MlpLstmPolicy", Speedless(), n_steps=64, batch_size=32, n_epochs=4, seed=0, device="cpu",
                                 policy_kwargs={"lstm_hidden_size": 32, "n_lstm_layers": 2})
        agent.learn(512, callback=note)
        assert len(actions) == 512
        scores = evaluation.evaluate_policy(agent, agent.env, 5, return_episode_rewards=True)
        return agent.policy, [actions, scores], values

    both(train, ["LSTM", "LSTM"], 1e-4)


@pytest.fixture
def geometric():
    """(torch_geometric.nn, a function that trains a model on graphs, the package's modules).

    The modules took their names from torch.nn when they were imported.
    """
    layers, loader, Data = client("torch_geometric.nn"), client("torch_geometric.loader"), client("torch_geometric.data").Data

    def fit(model):
        """The losses of a few epochs, and what the model says of the graphs then. (Adam would blow up gradients of nearly 0.)"""
        draw = torch.Generator().manual_seed(1)
        graphs = []
        for nodes in torch.randint(5, 13, (64,), generator=draw).tolist():
            ends = (torch.rand(nodes, nodes, generator=draw) < 0.4).nonzero().T
            ends = ends[:, ends[1].argsort(stable=True)]  # as an LSTM that aggregates wants them
            x, along = torch.rand(nodes, 4, generator=draw), torch.rand(ends.shape[1], 2, generator=draw)
            graphs.append(Data(x, ends, along, torch.tensor([ends.shape[1] / nodes])))
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        losses = []
        for _ in range(6):
            for batch in loader.DataLoader(graphs, batch_size=16, shuffle=True):
                optimizer.zero_grad()
                loss = (model(batch)[:, 0] - batch.y).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert sum(losses[-4:]) < sum(losses[:4]) / 4
        with torch.no_grad():
            return [*losses, model.eval()(next(iter(loader.DataLoader(graphs, batch_size=64))))]

    return layers, fit, [module for name, module in sys.modules.items() if name.split(".")[0] == "torch_geometric"]


def test_graph_network(both, geometric):
    """torch_geometric tells how dense a graph is, by the recurrent parts that it has for networks on graphs."""
    layers, fit, modules = geometric

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.sage = layers.GraphSAGE(4, 16, 2, act="tanh", jk="lstm", aggr="lstm")
            self.gated = layers.GatedGraphConv(16, 3)
            self.pool = layers.Set2Set(16, 3)
            self.gather = layers.aggr.GRUAggregation(16, 8)
            self.last = nn.Linear(40, 1)

        def forward(self, batch):
            x = self.gated(self.sage(batch.x, batch.edge_index), batch.edge_index)
            return self.last(torch.cat([self.pool(x, batch.batch), self.gather(x, batch.batch)], 1))

    def train():
        model = Network()
        return model, None, fit(model)

    both(train, ["LSTM", "LSTM", "LSTM", "GRUCell", "LSTM", "GRU"], 1e-5, modules)


def test_attentive_fingerprints(both, geometric):
    """The same by AttentiveFP, whose ReLUs ask for float64: at its kink one rounding makes another gradient."""
    layers, fit, modules = geometric
    torch.set_default_dtype(torch.float64)

    class Network(layers.AttentiveFP):
        def forward(self, batch):
            return super().forward(batch.x, batch.edge_index, batch.edge_attr, batch.batch)

    def train():
        model = Network(4, 16, 1, edge_dim=2, num_layers=3, num_timesteps=2)
        return model, None, fit(model)

    both(train, ["GRUCell", "GRUCell", "GRUCell", "GRUCell"], 1e-11, modules)


@pytest.mark.parametrize("kind", ["GRU", "AIGRU"])
def test_interest_evolution(both, monkeypatch, kind):
    """deepctr-torch learns from what people clicked what they will click: GRUs on packed sequences in any order."""
    with monkeypatch.context() as offline:
        offline.setattr(threading.Thread, "start", lambda _: None)  # at import it looks for a newer version, in a thread
        models, inputs = client("deepctr_torch.models"), client("deepctr_torch.inputs")
    people, steps = 256, 8
    lengths = torch.randint(1, steps + 1, (people,))
    items, seen = torch.randint(1, 20, (people,)), torch.randint(1, 20, (people, steps))
    seen *= torch.arange(steps) < lengths[:, None]
    clicked = (seen[torch.arange(people), lengths - 1] % 2 == items % 2).float().numpy()
    data = {"item": items.numpy(), "hist_item": seen.numpy(), "seq_length": lengths.numpy()}
    before = inputs.SparseFeat("hist_item", 20, 8, embedding_name="item")
    columns = [inputs.SparseFeat("item", 20, 8), inputs.VarLenSparseFeat(before, steps, length_name="seq_length")]

    def train():
        model = models.DIEN(columns, ["item"], gru_type=kind, dnn_hidden_units=[16], init_std=0.5, att_activation="sigmoid",
                            dnn_activation="sigmoid")
        model.compile(torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), "binary_crossentropy")
        losses = model.fit(dict(data), clicked, batch_size=32, epochs=12, verbose=0).history["loss"]
        assert losses[-1] < 0.9 * losses[0]
        odds = model.predict(data)
        return model, (odds > 0.5).tolist(), [*losses, odds]

    both(train, ["GRU", "GRU"], 1e-4)
