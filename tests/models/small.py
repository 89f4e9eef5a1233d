"""Small networks of which only the wiring matters."""

from __future__ import annotations

from torch import Tensor, nn


def mlp(inputs: int = 4, hidden: int = 8, outputs: int = 3) -> nn.Sequential:
    """Two linear layers with a tanh between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


class Tagger(nn.Module):
    """Logits of five classes for every token: [B, T, 5], or [B, 5, T] with channels first."""

    def __init__(self, channels_first: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 5)
        self.channels_first = channels_first

    def forward(self, tokens: Tensor, scale: float | None = None) -> Tensor:
        h = self.head(self.embed(tokens).tanh())
        return h.transpose(1, 2) if self.channels_first else h
