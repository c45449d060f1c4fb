"""Hooks: present exactly while the context is open, and silent about nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from driftlens.errors import SiteError
from driftlens.recording.hooks import HookPoint, Hooks, count_hooks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x))


class Net(nn.Module):
    """Two blocks; ``mode`` makes the second misbehave, ``use_reentrant`` checkpoints both."""

    def __init__(self, mode: str = "normal", use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.mode, self.use_reentrant = mode, use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_reentrant is not None:
            x = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
            return checkpoint(self.second, x, use_reentrant=self.use_reentrant)
        x = self.first(x)
        if self.mode == "skip":
            return x
        if self.mode == "error":
            raise RuntimeError("inside the forward")
        if self.mode == "interrupt":
            raise KeyboardInterrupt
        x = self.second(x)
        return self.second(x) if self.mode == "twice" else x


def points(net: Net) -> list[HookPoint]:
    return [HookPoint("block.first", "gate", net.first.inner), HookPoint("block.second", "gate", net.second.inner)]


def watch(net: Net, seen: list[int]) -> Hooks:
    return Hooks(net, points(net), lambda index, args, output: seen.append(index))


X = torch.ones(2, 3)


def test_hooks_fire_once_per_point_and_none_is_left() -> None:
    net, seen = Net(), []
    with watch(net, seen) as hooks:
        assert count_hooks(net) == 4
        net(X)
        net(X)
    assert seen == [0, 1, 0, 1]
    assert hooks.passes == 2
    assert count_hooks(net) == 0


@pytest.mark.parametrize(("mode", "error"), [("error", RuntimeError), ("interrupt", KeyboardInterrupt)])
def test_no_hook_is_left_after_an_exception(mode: str, error: type[BaseException]) -> None:
    net = Net(mode)
    foreign = net.first.register_forward_hook(lambda *_: None)
    with pytest.raises(error), watch(net, []):
        net(X)
    assert count_hooks(net) == 1, "only the foreign hook stays"
    foreign.remove()


def test_a_pass_that_failed_does_not_disturb_the_next_one() -> None:
    net, seen = Net("error"), []
    with watch(net, seen) as hooks:
        with pytest.raises(RuntimeError):
            net(X)
        net.mode = "normal"
        net(X)
    assert hooks.passes == 1
    assert seen == [0, 0, 1]


def test_hooks_that_cannot_all_be_set_leave_none() -> None:
    net = Net()

    class Refusing(nn.Linear):
        def register_forward_hook(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
            raise RuntimeError("no hook here")

    net.second.inner = Refusing(3, 3)
    with pytest.raises(RuntimeError, match="no hook here"), watch(net, []):
        pass
    assert count_hooks(net) == 0


def test_entering_twice_and_removing_twice_change_nothing() -> None:
    net, seen = Net(), []
    hooks = watch(net, seen)
    with hooks:
        before = count_hooks(net)
        with hooks:
            assert count_hooks(net) == before
        assert count_hooks(net) == before, "the inner level removes nothing"
        net(X)
    hooks.remove()
    assert seen == [0, 1]
    assert count_hooks(net) == 0


def test_two_sets_of_hooks_remove_only_their_own() -> None:
    net, outer_seen, inner_seen = Net(), [], []
    with watch(net, outer_seen):
        with watch(net, inner_seen):
            net(X)
        net(X)
    assert len(outer_seen) == 4
    assert len(inner_seen) == 2


def test_outputs_and_gradients_are_bit_equal_with_hooks() -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 3)
    plain = net(x)
    plain.sum().backward()
    gradient = net.first.inner.weight.grad.clone()
    net.zero_grad()
    with watch(net, []):
        hooked = net(x)
        hooked.sum().backward()
    assert torch.equal(plain, hooked)
    assert torch.equal(gradient, net.first.inner.weight.grad)


def test_a_site_that_never_fires_is_named() -> None:
    net = Net("skip")
    with (
        pytest.raises(SiteError, match=r"1 of 2 observed modules did not fire.*block\.second \(gate\)"),
        watch(net, []),
    ):
        net(X)
    assert count_hooks(net) == 0


def test_a_site_that_fires_twice_is_named() -> None:
    net = Net("twice")
    with (
        pytest.raises(SiteError, match=r"more than once in one forward: block\.second \(gate, 2 times\)"),
        watch(net, []),
    ):
        net(X)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_forward_that_runs_again_counts_once(use_reentrant: bool) -> None:
    net, seen = Net(use_reentrant=use_reentrant), []
    runs = []
    net.first.inner.register_forward_hook(lambda *_: runs.append(1))
    with watch(net, seen) as hooks:
        for _ in range(2):
            net(X.clone().requires_grad_()).sum().backward()
    assert len(runs) == 4, "each forward really ran a second time"
    assert seen == [0, 1, 0, 1]
    assert hooks.passes == 2
