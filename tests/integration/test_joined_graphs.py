"""Graphs whose nodes are joined: refused as such, measured where the forward joins padded graphs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fimprobe
from tests.support.single_samples import assert_first_order, assert_second_order

SIZE, NODES, EDGES = 4, 4, 3


class GraphNet(nn.Module):
    """One output for each graph; ``graph`` holds the number of each node's graph."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, nodes, edges, graph):
        hidden = self.layer(nodes)
        hidden = torch.tanh(hidden.index_add(0, edges[1], hidden[edges[0]]))
        pooled = hidden.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, hidden)
        return self.out(pooled)


class JoinsPadded(nn.Module):
    """Nodes [B, N, F] and edges [B, 2, E] with their numbers [B], joined for the network."""

    def __init__(self):
        super().__init__()
        self.net = GraphNet()

    def forward(self, nodes, edges, num_nodes, num_edges):
        first = num_nodes.cumsum(0) - num_nodes
        shifted = (edges + first[:, None, None]).transpose(1, 2)
        joined_nodes = nodes[torch.arange(nodes.shape[1]) < num_nodes[:, None]]
        joined_edges = shifted[torch.arange(edges.shape[2]) < num_edges[:, None]].T
        graph = torch.arange(len(nodes)).repeat_interleave(num_nodes)
        return self.net(joined_nodes, joined_edges, graph)


def graphs(even):
    """Padded graphs; of one size if ``even``."""
    num_nodes = torch.full((SIZE,), NODES) if even else torch.tensor([2, 4, 3, 2])
    num_edges = torch.full((SIZE,), EDGES) if even else torch.tensor([3, 1, 2, 1])
    edges = torch.stack([torch.randint(0, int(n), (2, EDGES)) for n in num_nodes])
    return torch.randn(SIZE, NODES, 3), edges, num_nodes, num_edges


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("even", [True, False])
def test_graphs_that_the_forward_joins(even):
    model = JoinsPadded()
    assert_first_order(model, graphs(even))
    assert_second_order(model, graphs(even))


@pytest.mark.parametrize("batch", [4, 1000])
def test_joined_inputs_end_probing_with_the_cause(batch, caplog):
    """Whether some of the nodes are selected or all, the first dimension does not hold samples."""
    model = GraphNet()
    nodes = torch.randn(SIZE * NODES, 3)
    edges = torch.cat([torch.randint(0, NODES, (2, 5)) + i * NODES for i in range(SIZE)], 1)
    graph = torch.arange(SIZE).repeat_interleave(NODES)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    probe = fimprobe.attach(model, schedule={"every": 1}, tensorboard=False, batch=batch)
    F.cross_entropy(model(nodes, edges, graph), torch.arange(SIZE) % 3).backward()
    optimizer.step()
    probe.detach()
    assert not probe.history and "first dimension" in caplog.text
