"""The post-norm transformer layer of Vaswani et al., arXiv 1706.03762, under the names of AudioTagging Done Right."""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from settings import UserError

HEADS = 8


class EncoderLayer(nn.Module):
    """(B, T, D) -> (B, T, D): self-attention, then an MLP of `inner` channels, each with a residual, then a LayerNorm.

    It computes what nn.TransformerEncoderLayer does, but for its dropout, in training: of the attention's weights and
    of both residual branches, not between ReLU and w_2. Raises UserError for a dim that 8 heads do not divide.
    """

    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.slf_attn = SelfAttention(dim, dropout)
        self.pos_ffn = FeedForward(dim, inner, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.pos_ffn(self.slf_attn(x))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        if dim < 1 or dim % HEADS:
            raise UserError(f"encoder_options: dim = {dim} must be a multiple of {HEADS}, the attention heads.")
        self.w_qs, self.w_ks, self.w_vs, self.fc = (nn.Linear(dim, dim) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            rearrange(each(x), "b t (h d) -> b h t d", h=HEADS) for each in (self.w_qs, self.w_ks, self.w_vs)
        )
        dropped = self.dropout.p if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=dropped)
        return self.layer_norm(x + self.dropout(self.fc(rearrange(found, "b h t d -> b t (h d)"))))


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x + self.dropout(self.w_2(self.w_1(x).relu())))
