"""What tests/test_distributed.py runs in two processes, and writes to the file that is named on the command line.

Each scenario trains on a half of the batch in each process, or with a part of the model in each, and compares penalty
and gradients with those of one process that has everything.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import chainzrule_kernels as ck

STRENGTH = 0.7
VARIANTS = ({"variant": "layer"}, {"variant": "activation"}, {"variant": "accumulated", "probes": "exact"})
SCENARIOS: dict[str, Callable[[], None]] = {}


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[function.__name__] = function
    return function


# ---- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with an activation module and one that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.activation, self.dropout = nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.0)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.down(self.activation(self.dropout(self.up(x)))))


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(6, 3)).double()


def polynomial_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        ck.nn.PolynomialLinear(6, 8, noise=0.3), nn.Linear(8, 8), ck.nn.Polynomial(8, noise=0.3), nn.Linear(8, 3)
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, dtype=torch.float64, generator=numbers), torch.arange(8) % 3


def own_half() -> tuple[Tensor, Tensor]:
    x, target = batch()
    return x.chunk(2)[dist.get_rank()], target.chunk(2)[dist.get_rank()]


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


# ---- the comparison --------------------------------------------------------------------------------------------------


def assert_as_one_process(
    build: Callable[[], nn.Module],
    distribute: Callable[[nn.Module], nn.Module],
    halves: bool,
    tolerance: float = 1e-12,
    **options: object,
) -> None:
    """Penalty and gradients of the distributed model, and those of one process."""
    alone = build()
    reg = ck.DREG(alone, STRENGTH, **options)
    x, target = batch()
    (F.cross_entropy(alone(x), target) + reg.penalty()).backward()

    model = build()
    running = distribute(model)
    reg_distributed = ck.DREG(model, STRENGTH, **options)
    x, target = own_half() if halves else (x, target)
    penalty = trained_penalty(running, reg_distributed, x, target)
    if halves:
        dist.all_reduce(penalty)
        penalty /= dist.get_world_size()
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(penalty, reg.penalty().detach(), **close)
    for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        message = f"the gradient of {name}"
        torch.testing.assert_close(whole(parameter.grad), expected.grad, msg=lambda m, n=message: f"{n}: {m}", **close)


def trained_penalty(running: nn.Module, reg: ck.DREG, x: Tensor, target: Tensor) -> Tensor:
    """One backward pass; the penalty."""
    loss = F.cross_entropy(running(x).double(), target)
    penalty = reg.penalty()
    (loss + penalty).backward()
    return penalty.detach().clone()


def assert_refused(message: str, work: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        work()


# ---- data parallelism ------------------------------------------------------------------------------------------------


@scenario
def ddp() -> None:
    for build in (plain_net, polynomial_net):
        for options in VARIANTS:
            assert_as_one_process(build, DistributedDataParallel, halves=True, **options)


@scenario
def ddp_of_a_swapped_model() -> None:
    def distribute(model: nn.Module) -> nn.Module:
        assert sum(row.swapped for row in ck.swap(model)) == 1
        return DistributedDataParallel(model)

    assert_as_one_process(polynomial_net, distribute, halves=True)


@scenario
def ddp_with_accumulated_gradients() -> None:
    alone = plain_net()
    reg = ck.DREG(alone, STRENGTH)
    x, target = batch()
    (F.cross_entropy(alone(x), target) + reg.penalty()).backward()
    model = plain_net()
    reg = ck.DREG(model, STRENGTH)
    running = DistributedDataParallel(model)
    (x_first, x_second), (target_first, target_second) = (values.chunk(2) for values in own_half())
    with running.no_sync():
        ((F.cross_entropy(running(x_first), target_first) + reg.penalty()) / 2).backward()
    ((F.cross_entropy(running(x_second), target_second) + reg.penalty()) / 2).backward()
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def shard_whole(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def shard_linears(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, reshard_after_forward=True)
    return fully_shard(model, reshard_after_forward=True)


def shard_blocks(model: nn.Module) -> nn.Module:
    for child in model:
        fully_shard(child)
    return fully_shard(model)


@scenario
def fsdp_of_the_whole_model() -> None:
    for build in (plain_net, polynomial_net):
        for options in VARIANTS:
            assert_as_one_process(build, shard_whole, halves=True, **options)


@scenario
def fsdp_of_each_block() -> None:
    for variant in ("layer", "activation"):
        assert_as_one_process(plain_net, shard_blocks, halves=True, variant=variant)
    # A layer with a weight of its own may be sharded alone.
    assert_as_one_process(lambda: polynomial_net()[:1], shard_blocks, halves=True)


@scenario
def fsdp_after_the_regulariser() -> None:
    alone, model = plain_net(), plain_net()
    reg_alone, reg = ck.DREG(alone, STRENGTH), ck.DREG(model, STRENGTH)
    shard_blocks(model)
    (F.cross_entropy(alone(batch()[0]), batch()[1]) + reg_alone.penalty()).backward()
    trained_penalty(model, reg, *own_half())
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), expected.grad)


@scenario
def fsdp_of_the_penalty_alone() -> None:
    """FSDP2 by itself brings weights back for gradients of the modules' outputs, of which the last gets none here."""
    for distribute in (shard_whole, shard_blocks, shard_linears):
        for compiled in (False, True):
            alone, model = plain_net(), plain_net()
            reg_alone, reg = ck.DREG(alone, STRENGTH), ck.DREG(model, STRENGTH)
            distribute(model)
            run = torch.compile(model, backend="aot_eager") if compiled else model
            for _ in range(2):  # the second backward adds up
                alone(batch()[0])
                reg_alone.penalty().backward()
                run(own_half()[0])
                reg.penalty().backward()
            for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
                if expected.grad is None:
                    assert parameter.grad is None, name
                else:
                    torch.testing.assert_close(whole(parameter.grad), expected.grad, msg=lambda m, n=name: f"{n}: {m}")


@scenario
def fsdp_in_bfloat16() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def distribute(model: nn.Module) -> nn.Module:
        for child in model:
            fully_shard(child, mp_policy=policy)
        return fully_shard(model, mp_policy=policy)

    model = plain_net().float()
    reg = ck.DREG(distribute(model), STRENGTH)
    x, target = own_half()
    penalty = trained_penalty(model, reg, x.bfloat16(), target)
    assert penalty.dtype == torch.float32
    alone = plain_net()
    exact = ck.DREG(alone, STRENGTH)
    alone(own_half()[0])
    torch.testing.assert_close(penalty.double(), exact.penalty().detach(), rtol=0.02, atol=0.0)
    assert all(whole(parameter.grad).isfinite().all() for parameter in model.parameters())


@scenario
def fsdp_of_a_linear_layer_alone() -> None:
    for variant in ("layer", "activation"):
        assert_as_one_process(plain_net, shard_linears, halves=True, variant=variant)


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def split(model: nn.Module, up: object = None, down: object = None) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    plan = {"up": up or ColwiseParallel(), "down": down or RowwiseParallel()}
    for block in model[:2]:
        parallelize_module(block, mesh, plan)
    return model


@scenario
def tensor_parallel_by_rows_and_columns() -> None:
    for options in (
        {"variant": "layer"},
        {"variant": "activation"},
        {"reduction": ck.Reduction(units="mean", layers="mean")},
    ):
        assert_as_one_process(plain_net, split, halves=False, **options)


@scenario
def tensor_parallel_with_gathered_outputs() -> None:
    def distribute(model: nn.Module) -> nn.Module:
        return split(model, *(ColwiseParallel(output_layouts=Replicate()) for _ in range(2)))

    for variant in ("layer", "activation"):
        assert_as_one_process(plain_net, distribute, halves=False, variant=variant)


@scenario
def tensor_parallel_under_compile() -> None:
    def distribute(model: nn.Module) -> nn.Module:
        return torch.compile(split(model), backend="aot_eager", fullgraph=True)

    assert_as_one_process(plain_net, distribute, halves=False)


@scenario
def penalty_in_a_compiled_step() -> None:
    model = split(plain_net())
    reg = ck.DREG(model, STRENGTH)
    x, target = batch()

    def step(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), target) + reg.penalty()

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))


@scenario
def tensor_parallel_reports_the_whole_layer() -> None:
    alone, model = plain_net(), split(plain_net())
    rows = [ck.DREG(net).report(batch()[0]) for net in (alone, model)]
    for one, other in zip(*rows, strict=True):
        assert one.name == other.name
        torch.testing.assert_close([one.mean, one.p99], [other.mean, other.p99])


@scenario
def tensor_parallel_in_an_order_that_cannot_work() -> None:
    model = plain_net()
    ck.DREG(model)
    split(model)
    assert_refused("Attach it after parallelize_module", lambda: model(batch()[0]))
    model = split(plain_net(), up=ColwiseParallel(use_local_output=False))
    ck.DREG(model)
    assert_refused("Leave use_local_output=True", lambda: model(batch()[0]))
    model, mesh = plain_net(), init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model[0], mesh["tensor"], {"up": ColwiseParallel()})
    fully_shard(model[0].up, mesh=mesh["data"])
    ck.DREG(model)
    assert_refused("fully_shard was applied to a Linear alone", lambda: model(batch()[0]))


# ---- the monitor -----------------------------------------------------------------------------------------------------


@scenario
def the_monitor_writes_once() -> None:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    path = Path(str(folder[0])) / "jacobians.csv"
    model = plain_net()
    reg = ck.DREG(shard_blocks(model))
    monitor = ck.JacobianMonitor(reg, every=1, csv=path, tensorboard=None, console=False)
    rows = monitor.step(own_half()[0])
    assert rows is not None
    dist.barrier()
    assert len(path.read_text().splitlines()) == 1 + len(rows)


def main(path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, work in SCENARIOS.items():
        try:
            work()
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        failures = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        results[name] = next((text for text in failures if text), "")
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(results))
    dist.destroy_process_group()
    # Without the end of the interpreter, in which a thread of gloo that still lets go of tensors would be an abort.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
