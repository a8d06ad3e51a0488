"""torch.compile and torch.export: no break, no recompile, the same numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from shared import FULLEST, REPRESENTATIVE, Recorder, assert_same, each, gradients_for, scalar
from torch import Tensor

import chainzrule_kernels as ck
from chainzrule_kernels.testing.cases import Case

pytestmark = pytest.mark.usefixtures("target")

BATCHES = (4, 7, 10)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _by_position(case: Case, names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
    def called(*values: Tensor) -> tuple[Tensor, ...]:
        return case(dict(zip(names, values, strict=True)))

    return called


def _step(function: Callable[..., tuple[Tensor, ...]], tensors: dict[str, Tensor]) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in tensors.values()]
    for value, name in zip(leaves, tensors, strict=True):
        if name in ("x", "z"):
            torch._dynamo.mark_dynamic(value, 0)
        elif name == "z_dot":
            torch._dynamo.mark_dynamic(value, 1)
    results = function(*leaves)
    attached = [result for result in results if result.requires_grad]
    gradients = torch.autograd.grad(attached, leaves, gradients_for(attached), materialize_grads=True)
    return [*(result.detach() for result in results), *gradients]


def _assert_compiles(case: Case, compiler: str, device: str) -> None:
    """Forward and gradients as in eager, for three batch sizes, with one compilation."""
    names = list(case.arguments((2, 5)))
    eager = _by_position(case, names)
    compiled = torch.compile(eager, fullgraph=True, backend=compiler)
    for index, batch in enumerate(BATCHES):
        tensors = case.arguments((batch, 5), device=device, seed=index)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            found = _step(compiled, tensors)
        assert_same(found, _step(eager, tensors), rtol=1e-5, atol=1e-5)


@each(REPRESENTATIVE)
def test_r04_compiled_equals_eager_without_recompiling(case: Case, device: str) -> None:
    _assert_compiles(case, "aot_eager", device)


@each([case for case in FULLEST if case.op in ("polynomial_dreg", "linear_activation_dreg")])
def test_r04_inductor_equals_eager_without_recompiling(case: Case, device: str) -> None:
    _assert_compiles(case, "inductor", device)


def test_r04_a_training_step_compiles_with_its_loss(device: str) -> None:
    # The norm is an output of the forward pass, so that a loss with a Jacobian penalty needs no double backward.
    case = next(case for case in FULLEST if case.op == "linear_polynomial_dreg")

    def loss(x: Tensor, weight: Tensor, bias: Tensor, coeffs: Tensor) -> Tensor:
        y, jac_sq = ck.linear_polynomial_dreg(x, weight, bias, coeffs)
        y, again = ck.polynomial_dreg(y, coeffs)
        return y.square().mean() + 0.01 * (jac_sq.mean() + again.mean())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = list(case.arguments((6, 5), device=device, requires_grad=True).values())
    assert_same(
        torch.autograd.grad(compiled(*tensors), tensors),
        torch.autograd.grad(loss(*tensors), tensors),
        rtol=1e-5,
        atol=1e-6,
    )


def test_r04_a_whole_training_run_compiles_once(device: str) -> None:
    # Without mark_dynamic: PyTorch itself recompiles at the second size, to make it dynamic, and not at a third.
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda z, c: scalar(ck.polynomial_dreg(z, c)), fullgraph=True, backend=counter)
    coeffs = torch.randn(4, device=device, requires_grad=True)
    for batch in (4, 4, 6, 9, 12, 15):
        compiled(torch.randn(batch, 5, device=device), coeffs).backward()
    assert counter.frame_count == 2


def test_r04_a_transform_inside_a_compiled_function(device: str) -> None:
    def slopes(z: Tensor, coeffs: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda row: scalar(ck.polynomial_dreg(row, coeffs))))(z)

    z, coeffs = torch.randn(3, 5, device=device), torch.randn(4, device=device)
    compiled = torch.compile(slopes, fullgraph=True, backend="aot_eager")
    assert_same([compiled(z, coeffs)], [slopes(z, coeffs)], rtol=1e-4, atol=1e-4)


def test_r04_the_backend_is_part_of_what_is_compiled(device: str) -> None:
    compiled = torch.compile(lambda z, c: ck.polynomial(z, c), fullgraph=True, backend="aot_eager")
    z, coeffs = torch.randn(3, 5, device=device), torch.randn(4, device=device)
    expected = ck.polynomial(z, coeffs)
    assert_same([compiled(z, coeffs)], [expected])
    with ck.backend("reference"):
        assert_same([compiled(z, coeffs)], [expected])


def test_r14_a_new_shape_prepares_nothing(device: str) -> None:
    # In eager nothing is compiled, tuned or cached by shape: the only calls are the operators'.
    coeffs = torch.randn(4, device=device)
    graphs_before = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    seen = set()
    for shape in ((3, 5), (4, 5), (4, 6), (2, 3, 4), (1,)):
        with Recorder() as recorder:
            ck.polynomial_dreg(torch.randn(shape, device=device), coeffs)
        seen.add(tuple(call[0].name() for call in recorder.own_calls))
    assert len(seen) == 1
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == graphs_before


class _Layer(torch.nn.Module):
    def __init__(self, case: Case, parameters: dict[str, Tensor], data: list[str]) -> None:
        super().__init__()
        self.case = case
        self.data = data
        for name, value in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(value.detach().clone()))

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        parameters: dict[str, Any] = dict(self.named_parameters())
        return self.case({**dict(zip(self.data, values, strict=True)), **parameters})


@each(FULLEST)
def test_export_round_trip(case: Case, device: str) -> None:
    tensors = case.arguments((4, 5), device=device)
    data = [argument.name for argument in case.tensors if argument.is_data]
    layer = _Layer(case, {name: value for name, value in tensors.items() if name not in data}, data)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({1 if name == "z_dot" else 0: batch} for name in data)
    program = torch.export.export(layer, tuple(tensors[name] for name in data), dynamic_shapes=(shapes,))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    other = case.arguments((9, 5), device=device, seed=5)
    with torch.no_grad():
        assert_same(
            loaded(*(other[name] for name in data)), layer(*(other[name] for name in data)), rtol=1e-5, atol=1e-5
        )
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("chainzrule_kernels.") for target in targets)
