"""Small nets with max-unpooling, written as their users write them."""

import torch.nn.functional as F
from torch import nn


class PairNet(nn.Module):
    """One pooling and its unpooling on one to three axes, of the pooled values or of others."""

    def __init__(self, dims: int, ceil_mode: bool = False, others: bool = True, **pooling):
        super().__init__()
        pooling = {"kernel_size": 2, "ceil_mode": ceil_mode, "return_indices": True, **pooling}
        self.dims = dims
        self.pool = getattr(nn, f"MaxPool{dims}d")(**pooling)
        self.middle = getattr(nn, f"Conv{dims}d")(4, 4, 3, padding=1) if others else nn.Identity()
        window = {key: value for key, value in pooling.items() if key in ("kernel_size", "stride", "padding")}
        self.unpool = getattr(nn, f"MaxUnpool{dims}d")(**window)

    def forward(self, x):
        y, indices = self.pool(x)
        return self.unpool(self.middle(y), indices, output_size=x.shape[-self.dims :])


class SegNet(nn.Module):
    """Two pairs that cross, as in SegNet; one module, one functional, windows of two sizes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.third, self.head = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.dropout = nn.Dropout()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x):
        a = self.first(x).relu()
        b, outer = self.pool(a)
        b = self.dropout(self.second(b).relu())
        c, inner = F.max_pool2d(b, 3, ceil_mode=True, return_indices=True)
        d = self.third(F.max_unpool2d(c.tanh(), inner, 3, output_size=b.shape[2:])).relu()
        return self.head(self.unpool(d, outer, output_size=a.shape[2:]))
