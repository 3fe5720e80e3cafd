"""Forwards whose calls wait: they give what the originals give, whatever stands between the calls."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import convoxel


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.flag = True

    log: list[torch.Tensor] = []


class Straight(Base):
    def forward(self, x):
        x = self.conv(x)
        x = self.norm(x)
        return self.act(x)


class Nested(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """With a docstring, annotations and a default argument of its own."""
        y: torch.Tensor = self.act(self.norm(self.conv(x)))
        return y


class ReadBetween(Base):
    def forward(self, x):
        y = self.norm(x)
        z = y
        y = F.relu(y)
        return y + z


class ChangedBetween(Base):
    def forward(self, x):
        x = x.clone()
        y = F.relu(x)
        x += 1
        y = self.norm(y)
        return y + x


class AddedToItself(Base):
    def forward(self, x):
        x = self.norm(x)
        x += x
        return F.leaky_relu(x, 0.2)


class Added(Base):
    def forward(self, x):
        y = self.norm(x)
        y += x
        return F.leaky_relu(y, negative_slope=0.2)


class AddedBroadcast(Base):
    def forward(self, x):
        y = self.norm(x)
        y += x[:, :1]
        return self.act(y)


class Asked(Base):
    def forward(self, x):
        y = self.norm(x)
        if self.flag and not hasattr(self, "nothing"):
            y = y * 2
        elif self.flag is None:
            return y
        if hasattr(self, "nothing"):
            y = -y
        return self.act(y)


class Beside(Base):
    """As MONAI's residual block: what is added goes through layers of its own, if it has any."""

    def forward(self, x):
        y = self.norm(x)
        if self.flag:
            x = self.conv(x)
        if self.flag is not None:
            z = self.conv(x)
        y += x
        y = self.act(y)
        return y * z


class BesideItself(Base):
    """Each of these sees what the one before it did: statistics, an input changed in place."""

    def change(self, x):
        return x * (1 + self.norm.running_mean.sum())

    def forward(self, x):
        y = self.norm(x)
        if self.flag:
            z = self.norm(x)
        y = self.act(y)
        x = x.clone()
        w = self.act(x)
        if self.flag:
            v = self.conv(x)
        w = w + v
        u = self.norm(x)
        if self.flag:
            x = self.change(x)
        u += x
        return self.act(u) + y + z + w


class Renamed(Base):
    """As MONAI's blocks have it; the second time the old name is read again."""

    def forward(self, inp):
        a = self.conv(inp)
        b = self.norm(a)
        c = self.act(b)
        d = self.norm(c)
        e = self.act(d)
        return e + d


class RenamedAndRead(Base):
    def forward(self, x):
        y = self.norm(x)
        z = self.conv(y)
        for _ in range(2):
            y = y * 2
        return z + y


class Looped(Base):
    def forward(self, x, times=2):
        for i in range(times):
            x = self.norm(x)
            if i == 1:
                continue
            x = self.act(x)
        while x.max() > 10:
            x = x / 2
        return x


class Early(Base):
    def forward(self, x):
        x = self.norm(x)
        if x.mean() > 100:
            return x
        try:
            x = self.act(x)
        finally:
            self.flag = not self.flag
        with torch.enable_grad():
            x = self.norm(x)
        return x


class ReturnsInLoop(Base):
    def forward(self, x):
        for layer in (self.norm, self.act)[: 2 * self.training]:
            y = layer(x)
            return y
        z = self.conv(x)
        return z


class Unused(Base):
    """Nobody reads what the norm returns, but it counts the batch."""

    def forward(self, x):
        y = self.norm(x)
        y = self.conv(x)
        self.norm(y)
        return self.act(y)


class Tuples(Base):
    def forward(self, x):
        a, b = self.norm(x), self.conv(x)
        a = self.act(a)
        return torch.relu(b) + a, [a, {"b": b}]


class Private(Base):
    def __hidden(self, x):
        return self.norm(x)

    def forward(self, x):
        x = self.__hidden(x)
        return self.act(x)


class Super(Straight):
    def forward(self, x):
        x = super().forward(x)
        x = self.norm(x)
        return self.act(x)


class Keywords(Base):
    def forward(self, x, *rest, scale=3.0, **more):
        x = self.norm(input=x)
        x = self.act(x)
        return x * scale


FORWARDS = [Straight, Nested, ReadBetween, ChangedBetween, AddedToItself, Added, AddedBroadcast, Asked, Beside,
            BesideItself, Renamed, RenamedAndRead, Looped, Early, ReturnsInLoop, Unused, Tuples,
            Private, Super, Keywords]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward", FORWARDS)
def test_a_rewritten_forward_gives_what_the_original_gives(forward, training):
    ours = forward().double().train(training)
    theirs = copy.deepcopy(ours)
    convoxel.accelerate(ours, inplace=True)
    assert "not" not in str(convoxel.report(ours).entries[0].why)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = (torch.utils._pytree.tree_leaves(net(t)) for net, t in ((ours, x1), (theirs, x2)))
    for a, b in zip(y1, y2, strict=True):
        torch.testing.assert_close(a, b)
    sum(t.square().sum() for t in y1).backward()
    sum(t.square().sum() for t in y2).backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    assert ours.flag == theirs.flag


@pytest.mark.parametrize("forward,fused", [(Straight, "norm + relu"), (Nested, "norm + relu"), (Looped, "norm + relu"),
                                           (Added, "norm + residual"), (Beside, "norm + residual + relu"), (Asked, ""),
                                           (ReadBetween, ""),
                                           (ChangedBetween, ""), (AddedBroadcast, ""), (Private, "")])  # fmt: skip
def test_what_goes_together_runs_as_one_and_nothing_else(forward, fused):
    net = convoxel.accelerate(forward())
    net(torch.randn(2, 4, 6, 5))
    (norm,) = (e for e in convoxel.report(net).entries if e.name == "norm")
    assert norm.state == ("fused" if fused else "converted") and fused in norm.why


class Lambda(Base):
    def forward(self, x):
        return (lambda t: self.act(self.norm(t)))(x)


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x):
        return self.act(self.norm(x))


def test_what_cannot_be_read_is_left_and_named():
    made: dict = {"Base": Base}
    exec("class Typed(Base):\n    def forward(self, x):\n        return self.act(self.norm(x))", made)
    for forward, why in ((Lambda, "lambda"), (Decorated, "no plain function"), (made["Typed"], "source")):
        net = convoxel.accelerate(forward())
        assert why in convoxel.report(net).entries[0].why, forward
        y = net(torch.randn(2, 4, 6, 5))
        assert y.min() == 0 and not convoxel.report(net).of("fused")
