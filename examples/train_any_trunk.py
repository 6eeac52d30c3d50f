"""Multi-token training in a plain PyTorch loop, with somebody else's trunk.

The trunk is `torch.nn.TransformerEncoder`; each head is one more of its layers, on the trunk's
output. One call of `mtp_fast.multi_token_cross_entropy` takes the loss of all heads through the
shared unembedding, without holding the logits and without shifted copies of the labels.

    python examples/train_any_trunk.py
"""

import torch
from torch import Tensor, nn

import mtp_fast


class Model(nn.Module):
    """A causal encoder, n heads on top, one unembedding."""

    def __init__(self, vocab_size: int = 64, dim: int = 64, n_layers: int = 2, n: int = 4) -> None:
        super().__init__()

        def layer() -> nn.TransformerEncoderLayer:
            return nn.TransformerEncoderLayer(
                dim,
                nhead=4,
                dim_feedforward=2 * dim,
                dropout=0.0,
                batch_first=True,
                norm_first=True,
            )

        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(0.02 * torch.randn(128, dim))
        self.trunk = nn.TransformerEncoder(layer(), n_layers, enable_nested_tensor=False)
        self.heads = nn.ModuleList(layer() for _ in range(n))
        self.norm = nn.LayerNorm(dim)
        self.unembedding = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Head k's hidden states (B, T, dim): at position t they belong to token t + 1 + k."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embedding(tokens) + self.position[:length]
        x = self.trunk(x, mask=mask, is_causal=True)
        return [self.norm(head(x, src_mask=mask, is_causal=True)) for head in self.heads]


def batch(generator: torch.Generator, size: int = 16, length: int = 32) -> Tensor:
    """Progressions: the third token tells the rest."""
    start = torch.randint(0, 64, (size, 1), generator=generator)
    stride = torch.randint(1, 4, (size, 1), generator=generator)
    return (start + stride * torch.arange(length)) % 64


def main(steps: int = 200) -> list[mtp_fast.MultiTokenStats]:
    """Train, and return each step's statistics."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for step in range(steps):
        tokens = batch(generator)
        loss, stats = mtp_fast.multi_token_cross_entropy(
            model(tokens), model.unembedding.weight, tokens, return_stats=True
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(stats)
        if step % 20 == 0 or step == steps - 1:
            by_head = "  ".join(f"{value:.3f}" for value in stats.loss.tolist())
            print(f"step {step:3d}   loss by head  {by_head}")
    return history


if __name__ == "__main__":
    main()
