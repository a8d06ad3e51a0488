"""The demo's three trainings: one net on one data set from one seed, as plain PyTorch, compiled, and fused."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chainzrule_kernels as ck

SIZES = (64, 256, 256, 10)
BATCH = 256
LEARNING_RATE = 3e-3
STRENGTH = 10**-2.5
TEST_SHARE = 0.2
WARM_UP_STEPS = 3

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """scikit-learn's digits, pixels scaled to [-1, 1], split by class into a part to train on and a part to test on."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, seed: int) -> Data:
        """The split that belongs to ``seed``."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(
            torch.tensor(digits.data / 8 - 1, dtype=torch.float32),
            torch.tensor(digits.target),
            test_size=TEST_SHARE,
            random_state=seed,
            stratify=digits.target,
        )
        return cls(parts[0], parts[2], parts[1], parts[3])

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of full batches in random order; the rest of the permutation is left out."""
        order = torch.randperm(len(self.train_y), generator=generator)
        for chosen in order.split(BATCH):
            if len(chosen) == BATCH:
                yield self.train_x[chosen], self.train_y[chosen]

    @property
    def steps_per_epoch(self) -> int:
        """The number of full batches."""
        return len(self.train_y) // BATCH


class PlainPolynomialLinear(nn.Module):
    """A cubic layer and its Jacobian norm as one writes them in PyTorch, with nothing of this package in it."""

    def __init__(self, layer: ck.nn.PolynomialLinear) -> None:
        """With a copy of the parameters of ``layer``."""
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        assert layer.bias is not None
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.coeffs = nn.Parameter(layer.coeffs.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``p(x Wᵀ + b)`` and, for each sample, ``Σ_j p'(z_j)² ‖W_j‖²``."""
        z = F.linear(x, self.weight, self.bias)
        c0, c1, c2, c3 = self.coeffs
        y = c0 + c1 * z + c2 * z**2 + c3 * z**3
        slope = c1 + 2 * c2 * z + 3 * c3 * z**2
        jac_sq = (slope**2 * (self.weight**2).sum(1)).sum(1)
        return y, jac_sq


class PlainNet(nn.Module):
    """The net of a :class:`chainzrule_kernels.nn.ChainzRuleNet`, whose forward returns the norms of its layers too."""

    def __init__(self, net: ck.nn.ChainzRuleNet) -> None:
        """With a copy of the parameters of ``net``."""
        super().__init__()
        *hidden, last = net
        self.hidden = nn.ModuleList(
            PlainPolynomialLinear(layer) for layer in hidden if isinstance(layer, ck.nn.PolynomialLinear)
        )
        assert isinstance(last, nn.Linear)
        self.last = nn.Linear(last.in_features, last.out_features)
        self.last.load_state_dict(last.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The logits, and ``jac_sq`` of each hidden layer."""
        norms = []
        for layer in self.hidden:
            x, jac_sq = layer(x)
            norms.append(jac_sq)
        return self.last(x), norms


@dataclass
class Training:
    """One of the three runs: how it computes, and what came out.

    ``loss`` is the whole loss of a batch, penalty included; ``examine`` gives the logits and, for each sample,
    ``Σ_layers jac_sq``. ``failure`` says in one line why there are no results.
    """

    name: str
    loss: LossFunction
    examine: Callable[[Tensor], tuple[Tensor, Tensor]]
    parameters: list[nn.Parameter]
    failure: str | None = None
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    saved_bytes: int = 0

    def __post_init__(self) -> None:
        """Make the optimizer."""
        self.optimizer = torch.optim.Adam(self.parameters, LEARNING_RATE, fused=True)

    def warm_up(self, x: Tensor, y: Tensor) -> None:
        """Compile what is to be compiled, and measure the memory, without changing a parameter."""
        try:
            for _ in range(WARM_UP_STEPS):
                self.loss(x, y).backward()
            self.saved_bytes = saved_bytes(lambda: self.loss(x, y), self.parameters)
        except Exception as error:  # torch.compile needs a C++ compiler and fails in as many ways as compilers do
            if self.name != "torch.compile":
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.failure = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        self.optimizer.zero_grad()

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step of training, timed in its three parts."""
        start = time.perf_counter()
        loss = self.loss(x, y)
        after_forward = time.perf_counter()
        loss.backward()
        after_backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        self.losses.append(loss.item())
        self.forward_ms.append(1e3 * (after_forward - start))
        self.backward_ms.append(1e3 * (after_backward - after_forward))
        self.optimizer_ms.append(1e3 * (end - after_backward))

    def test(self, data: Data) -> None:
        """Note the accuracy on the test part."""
        with torch.no_grad():
            logits, _ = self.examine(data.test_x)
        self.accuracies.append((logits.argmax(1) == data.test_y).double().mean().item())


@dataclass(frozen=True)
class Result:
    """What the table shows of one training; None where it failed."""

    name: str
    test_accuracy: float | None = None
    final_loss: float | None = None
    largest_parameter_difference: float | None = None
    ms_per_step: float | None = None
    ms_per_step_quartiles: tuple[float, float] | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    optimizer_ms: float | None = None
    saved_activation_bytes: int | None = None
    tail_ratio: float | None = None
    failure: str | None = None


def trainings(net: ck.nn.ChainzRuleNet) -> tuple[list[Training], ck.DREG]:
    """The three runs, each with its own copy of the parameters of ``net``, and the regulariser of the fused one."""
    reg = ck.DREG(net, STRENGTH)

    def fused_loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(net(x), y) + reg.penalty()

    def fused_examine(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(x)
        return logits, torch.stack([jac_sq for calls in reg.jac_sq().values() for jac_sq in calls]).sum(0)

    def plain(name: str, compiled: bool) -> Training:
        model = PlainNet(net)

        def loss(x: Tensor, y: Tensor) -> Tensor:
            logits, norms = model(x)
            penalty = STRENGTH * sum(jac_sq.mean() for jac_sq in norms)
            return F.cross_entropy(logits, y) + penalty

        def examine(x: Tensor) -> tuple[Tensor, Tensor]:
            logits, norms = model(x)
            return logits, torch.stack(norms).sum(0)

        own_loss = torch.compile(loss, fullgraph=True) if compiled else loss
        return Training(name, own_loss, examine, list(model.parameters()))

    return [
        plain("plain PyTorch", compiled=False),
        plain("torch.compile", compiled=True),
        Training("fused", fused_loss, fused_examine, list(net.parameters())),
    ], reg


def train(runs: Sequence[Training], data: Data, epochs: int, seed: int, advance: Callable[[], None]) -> None:
    """Train all runs on the same batches. They take turns step by step, so that a busy machine slows all alike.

    ``advance`` is called after each step of all.
    """
    running = [run for run in runs if run.failure is None]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for x, y in data.batches(generator):
            for run in running:
                run.step(x, y)
            advance()
        for run in running:
            run.test(data)


def results(runs: Sequence[Training], data: Data) -> list[Result]:
    """The table's rows, the first of them what the others are compared with."""
    return [_result(run, runs[0], data) for run in runs]


def _result(run: Training, first: Training, data: Data) -> Result:
    if run.failure is not None:
        return Result(run.name, failure=run.failure)
    with torch.no_grad():
        _, squared_norms = run.examine(data.test_x)
    differences = [
        (mine - theirs).abs().max().item() for mine, theirs in zip(run.parameters, first.parameters, strict=True)
    ]
    steps = [sum(parts) for parts in zip(run.forward_ms, run.backward_ms, run.optimizer_ms, strict=True)]
    low, _, high = statistics.quantiles(steps, n=4)
    return Result(
        run.name,
        test_accuracy=run.accuracies[-1],
        final_loss=statistics.fmean(run.losses[-data.steps_per_epoch :]),
        largest_parameter_difference=max(differences),
        ms_per_step=statistics.median(steps),
        ms_per_step_quartiles=(low, high),
        forward_ms=statistics.median(run.forward_ms),
        backward_ms=statistics.median(run.backward_ms),
        optimizer_ms=statistics.median(run.optimizer_ms),
        saved_activation_bytes=run.saved_bytes,
        tail_ratio=ck.tail_ratio(squared_norms.sqrt()),
    )


def saved_bytes(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """The bytes that autograd keeps between the forward and the backward pass of ``loss``.

    Each storage counts once and whole, those of the parameters not at all.
    """
    excluded = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []  # keeps the storages alive, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return sum(storages.values())


def as_dict(result: Result) -> dict[str, object]:
    """For JSON."""
    return dataclasses.asdict(result)
