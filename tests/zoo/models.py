"""Small models of eight architectures in double precision, each with its data and loss."""

import torch
import torch.nn.functional as F
from torch import nn

TASKS = 2


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions, with batch statistics and pooling."""

    def __init__(self, widths=(1, 1, 2, 1), classes=3):
        super().__init__()
        self.blocks = nn.ModuleList()
        channels = 1
        for width in widths:
            layers = []
            for i in range(3):
                layers += [
                    nn.Conv2d(channels if i == 0 else width, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width, track_running_stats=False),
                ]
                if i < 2:
                    layers.append(nn.LeakyReLU(0.1))
            shortcut = nn.Conv2d(channels, width, 1, bias=False)
            self.blocks.append(nn.ModuleList([nn.Sequential(*layers), shortcut]))
            channels = width
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for number, (body, shortcut) in enumerate(self.blocks):
            x = F.leaky_relu(body(x) + shortcut(x), 0.1)
            if number < 2:
                x = F.max_pool2d(x, 2)
        return self.head(x.mean(dim=(2, 3)))


class ViT(nn.Module):
    """Patches, a class token, positions and one encoder layer."""

    def __init__(self, width=4, classes=3):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.encoder = nn.TransformerEncoderLayer(
            width, nhead=2, dim_feedforward=8, dropout=0.0, activation="gelu", batch_first=True
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class GPT(nn.Module):
    """One causal block with the embedding tied to the output."""

    def __init__(self, width=4, words=6):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.randn(5, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))

    def forward(self, words):
        x = self.embedding(words) + self.positions[: words.shape[1]]
        q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mlp(self.norms[1](x))
        return (x @ self.embedding.weight.T).transpose(1, 2)  # [N, words, length]


class Tagger(nn.Module):
    """A recurrent layer over padded words, with a tag for each of them."""

    def __init__(self, kind, width=3, words=6, tags=3):
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.recurrent = getattr(nn, kind)(width, width, batch_first=True)
        self.head = nn.Linear(width, tags)

    def forward(self, words):
        states, _ = self.recurrent(self.embedding(words))
        return self.head(states).transpose(1, 2)


class TCN(nn.Module):
    """Dilated causal convolutions with weight-normalised filters."""

    def __init__(self, width=3):
        super().__init__()
        self.convs = nn.ModuleList()
        for number, dilation in enumerate((1, 2)):
            conv = nn.Conv1d(1 if number == 0 else width, width, 3, dilation=dilation)
            self.convs.append(nn.utils.parametrizations.weight_norm(conv))
        self.head = nn.Conv1d(width, 1, 1)

    def forward(self, x):
        for conv in self.convs:
            (dilation,) = conv.dilation
            x = torch.tanh(conv(F.pad(x, (2 * dilation, 0))))
        return self.head(x)


class UNet(nn.Module):
    """One level down and up with a skip connection and group normalisation."""

    def __init__(self, width=2):
        super().__init__()
        self.down = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.GroupNorm(1, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.head = nn.Conv2d(2 * width, 2, 1)

    def forward(self, x):
        skip = F.silu(self.norm(self.down(x)))
        x = self.up(F.silu(self.middle(F.avg_pool2d(skip, 2))))
        return self.head(torch.cat([skip, x], dim=1))


class DeepSets(nn.Module):
    """A sum of embeddings of the members, and a network of that sum."""

    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, width), nn.ELU(), nn.Linear(width, width))
        self.outer = nn.Sequential(nn.Linear(width, width), nn.ELU(), nn.Linear(width, 1))

    def forward(self, members):
        return self.outer(self.inner(members).sum(dim=1))


def images(size):
    labels = torch.stack([torch.randperm(3) for _ in range(TASKS)])
    return torch.randn(TASKS, 3, 1, size, size), labels


def words(tags):
    inputs = torch.randint(1, 6, (TASKS, 4, 5))
    inputs[:, 1, 3:] = 0  # padding
    return inputs, torch.randint(tags, (TASKS, 4, 5))


def series():
    return torch.randn(TASKS, 4, 1, 6), torch.randn(TASKS, 4, 1, 6)


def masks():
    return torch.randn(TASKS, 3, 1, 4, 4), torch.randint(2, (TASKS, 3, 4, 4))


def sets():
    return torch.randn(TASKS, 5, 3, 2), torch.randn(TASKS, 5, 1)


ZOO = {  # a model, its data, and its loss
    "resnet-12": (ResNet12, lambda: images(4), F.cross_entropy),
    "vit": (ViT, lambda: images(8), F.cross_entropy),
    "gpt": (GPT, lambda: words(6), F.cross_entropy),
    "lstm tagger": (lambda: Tagger("LSTM"), lambda: words(3), F.cross_entropy),
    "gru tagger": (lambda: Tagger("GRU"), lambda: words(3), F.cross_entropy),
    "tcn": (TCN, series, F.mse_loss),
    "u-net": (UNet, masks, F.cross_entropy),
    "deep sets": (DeepSets, sets, F.mse_loss),
}
