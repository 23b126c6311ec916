"""SwiGLU in Triton against its reference in fp64.

In Triton's interpreter; run by `tests/kernels/triton/test_in_interpreter.py`, in a process of its own.
"""

import os
from functools import partial

import pytest
import torch
from megabagel_kernels.swiglu import swiglu

from tests.kernels.case import CPU
from tests.kernels.exactness import assert_exact, every_type, guarded_memory
from tests.kernels.swiglu import cases
from tests.kernels.triton import bf16_shim

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
bf16_shim.install()
pytestmark = pytest.mark.usefixtures(guarded_memory.__name__)


@every_type
@pytest.mark.parametrize("rows, width", [(1, 7), (17, 1100), (129, 64)])
def test_equals_the_reference(rows: int, width: int, dtype: torch.dtype):
    case = cases.mlp(CPU, rows, width, dtype)
    assert_exact(case.ours, case.reference, case.leaves)


def test_no_rows():
    assert swiglu(torch.zeros(0, 6), engine="triton").shape == (0, 3)


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_arguments_that_do_not_fit(engine: str):
    x, run = torch.zeros(5, 64), partial(swiglu, engine=engine)
    with pytest.raises(ValueError, match=r"gate_up has shape \(5, 63\), expected \[T, 2 F\]"):
        run(x[:, :63])
    with pytest.raises(ValueError, match=r"gate_up has dtype torch.int32, expected torch.float32 or"):
        run(x.int())
    if engine == "triton":
        with pytest.raises(ValueError, match=r"gate_up has stride 2 along axis 1, expected 1"):
            run(x[:, ::2])


def test_meta_tensors_and_compilers_see_through():
    (x,) = cases.mlp(CPU, 5, 33, torch.float32).leaves
    run = partial(swiglu, engine="triton")
    assert run(x.to("meta")).shape == (5, 33)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    assert torch.equal(compiled(x), run(x))
    found, expected = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, run))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
