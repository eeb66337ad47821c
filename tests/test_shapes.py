"""The closed forms of ``graph.shapes`` are what the meta kernels give, and they leave every odd case to these."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import build, example
from espalier.graph import shapes
from espalier.graph.tracing import private_copy
from espalier.graph.watch import tensors_of

aten = torch.ops.aten


class Compare(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.known, self.wrong = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        closed = shapes.output(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        if closed is not None:
            self.known += 1
            first = (
                1 if func is aten.native_batch_norm.default else None
            )  # what is saved for backward, CPU leaves empty
            for a, b in list(zip(tensors_of(closed), tensors_of(out), strict=True))[:first]:
                if (a.shape, a.stride(), a.dtype, a.device) != (b.shape, b.stride(), b.dtype, b.device):
                    self.wrong.append((str(func), a.shape, a.stride(), b.shape, b.stride()))
        return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["cifar:resnet20a", "mobilenet_v3_small", "shufflenet_v2_x1_0", "densenet121", "convnext_tiny", "timm:dla34"],
)
def test_closed_forms_agree_with_the_meta_kernels(name):
    model, compare = private_copy(build(name), "meta").eval(), Compare()
    with torch.no_grad(), compare:
        model(example(name).to("meta"))
    assert not compare.wrong
    assert compare.known > 20


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def turned(*shape):
    """What lies in memory as if its second dimension were the last one."""
    first, channels, *rest = shape
    return meta(first, *rest, channels).movedim(-1, 1)


@pytest.mark.parametrize("shape", [(1, 4, 2, 3), (2, 4, 1, 1), (2, 1, 3, 3), (1, 4, 3, 1)])
def test_closed_forms_have_the_strides_of_the_first_operand(shape):
    with Compare() as compare:
        for one, other in ((meta, turned), (turned, meta)):
            aten.add.Tensor(one(*shape), other(*shape))
        aten.native_group_norm.default(meta(*shape), meta(shape[1]), None, *shape[:2], shape[2] * shape[3], 1, 1e-5)
    assert not compare.wrong
    assert compare.known > 0


ELEMENTWISE = [f for f, shape in shapes.OVERLOADS.items() if shape in (shapes.unary, shapes.binary, shapes.softmax)]


@pytest.mark.parametrize("func", ELEMENTWISE)
@pytest.mark.parametrize("make", [meta, turned])
def test_closed_forms_of_one_element_each_agree_with_the_kernels(func, make):
    x = make(2, 4, 3, 5)
    more = {aten.lerp.Scalar: (x, 0.5), aten.pow.Tensor_Scalar: (2,), aten._safe_softmax.default: (1,)}
    more |= {aten.clamp.default: (-1.0, 1.0), aten.mul.Scalar: (2.0,)}
    rest = more.get(func, (x,) if shapes.OVERLOADS[func] is shapes.binary else ())
    with Compare() as compare:
        func(x, *rest)
    assert not compare.wrong
    assert compare.known == (make is meta or shapes.OVERLOADS[func] is not shapes.softmax)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.mm.default, (meta(2, 3), meta(4, 5))),
        (aten.native_group_norm.default, (meta(1, 4, 3, 3), meta(4), None, 1, 4, 9, 3, 1e-5)),
        (aten.native_group_norm.default, (meta(1, 4, 3, 3), meta(3), None, 1, 4, 9, 2, 1e-5)),
        (
            aten.convolution.default,
            (meta(1, 3, 8, 8), meta(4, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        ),
        (
            aten.convolution.default,
            (meta(1, 4, 2, 2), meta(4, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        ),
        (aten.addmm.default, (meta(5), meta(1, 3), meta(4, 5))),
        (aten.bmm.default, (meta(2, 1, 3), meta(3, 3, 5))),
        (aten.add.Tensor, (meta(1, 3, 4), meta(1, 2, 4))),
        (aten.add_.Tensor, (meta(1, 3), meta(2, 3))),
        (aten.cat.default, ([meta(1, 3, 4), meta(1, 3, 5)], 1)),
        (aten.native_layer_norm.default, (meta(2, 5), [4], meta(4), meta(4), 1e-5)),
    ],
)
def test_what_does_not_fit_is_left_to_the_kernel_which_refuses_it(func, args):
    assert shapes.output(func, args, {}) is None
    with pytest.raises(RuntimeError):
        func(*args)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.relu.default, (meta(3, dtype=torch.int64),)),
        (aten.relu.default, (meta(1, 3).expand(4, 3),)),
        (aten.add.Tensor, (meta(3), meta(3, dtype=torch.float64))),
        (aten.mean.dim, (meta(3, 4).t(), [0])),
    ],
)
def test_types_and_strides_that_are_not_plain_are_left_to_the_kernel(func, args):
    assert shapes.output(func, args, {}) is None


@pytest.mark.parametrize(
    "func", [aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.maximum.default]
)
def test_what_has_fewer_dimensions_is_stretched_as_the_kernels_do(func):
    draw = random.Random(0)
    with Compare() as compare:
        for _ in range(60):
            shape = [draw.choice([1, 2, 3]) for _ in range(draw.randint(1, 4))]
            other = [draw.choice([1, n]) for n in shape[draw.randint(0, len(shape) - 1) :]]
            for operands in ((meta(*shape), meta(*other)), (meta(*other), meta(*shape))):
                func(*operands)
    assert not compare.wrong
    assert compare.known >= 120


def test_a_product_of_batches_has_the_shape_that_its_kernel_gives():
    with Compare() as compare:
        aten.bmm.default(meta(4, 2, 3), meta(4, 3, 5))
        aten.bmm.default(meta(4, 3, 2).transpose(1, 2), meta(4, 5, 3).transpose(1, 2))
        aten.bmm.default(meta(1, 3).expand(4, 1, 3), meta(4, 3, 1))
    assert not compare.wrong
    assert compare.known >= 3


@pytest.mark.parametrize("shape", [(1, 3, 6, 8), (2, 4, 5, 5), (2, 1, 7, 3)])
def test_closed_forms_of_resampling_agree_with_the_kernels(shape):
    x, grid = meta(*shape), meta(shape[0], 9, 11, 2)
    for func, args in (
        (aten.grid_sampler_2d.default, (x, grid, 0, 0, False)),
        (aten.upsample_bilinear2d.default, (x, [12, 10], True)),
        (aten.upsample_nearest2d.default, (x, [12, 10])),
    ):
        for values in (args, (x.contiguous(memory_format=torch.channels_last), *args[1:])):
            closed, out = shapes.output(func, values, {}), func(*values)
            assert closed is None or (closed.shape, closed.stride()) == (out.shape, out.stride()), func
        assert shapes.output(func, args, {}) is not None


def test_a_batch_norm_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match="batch norm of 3 channels has 4 parameters"):
        shapes.output(
            aten.native_batch_norm.default, (meta(1, 3, 2, 2), meta(4), meta(4), meta(4), meta(4), False, 0.1, 1e-5), {}
        )
