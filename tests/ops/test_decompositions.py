"""Every decomposition against its op on the CPU. Traced as in an exported program, no op of this package remains."""

import pytest
import torch
from checks import INF, NAN, assert_close, spread, strided, tied
from torch.fx.experimental.proxy_tensor import make_fx

from vmoe_routers.decompositions import DECOMPOSITIONS

OPS = torch.ops.vmoe_routers
pytestmark = pytest.mark.cpu_kernels  # a decomposition depends on no kernel
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


# The graphs by op and signature. A graph must be right for every value of its tensors, so the tests with other values
# run the same graph. To trace a graph takes far longer than to run it.
GRAPHS = {}


def signature(argument):
    return (argument.dtype, argument.shape, argument.stride()) if isinstance(argument, torch.Tensor) else argument


def decomposed(op, *arguments, **options):
    """Returns the results of the decomposition, which uses plain torch only."""
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    key = (op, *map(signature, arguments), *options.items())
    if key not in GRAPHS:
        GRAPHS[key] = traced(op, arguments, options, tensors)
    return GRAPHS[key](*tensors)


def traced(op, arguments, options, tensors):
    def call(*tensors):
        rest = iter(tensors)
        return op(*(next(rest) if isinstance(x, torch.Tensor) else x for x in arguments), **options)

    graph = make_fx(call, decomposition_table=DECOMPOSITIONS)(*tensors)
    targets = {node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert not any("vmoe_routers" in str(target) for target in targets)
    assert torch.ops.aten.sort.stable not in targets
    assert not any(target._schema.is_mutable for target in targets)
    return graph


def check(op, *arguments, read=None, slack=1.0):
    """Compare the decomposition with the op; `read`: the results that callers read, not only the op's gradient."""
    wanted, found = op.default(*arguments), decomposed(op.default, *arguments)
    if isinstance(wanted, torch.Tensor):
        wanted, found = (wanted,), (found,)
    for i, (w, f) in enumerate(zip(wanted, found, strict=True)):
        assert (f.dtype, f.shape) == (w.dtype, w.shape)
        assert f.is_contiguous()
        if read is not None and i not in read:
            assert f.isnan().all()
        elif w.is_floating_point():
            assert_close(f, w, slack=slack, dtype=arguments[0].dtype)
        else:
            assert torch.equal(f, w)


def specials(dtype):
    """Returns rows with all orders of NaN, infinities, zeros of both signs and other numbers."""
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, 1.0], dtype=dtype)
    return torch.stack([values[torch.randperm(7)] for _ in range(50)])


def slots_of(G, T, E, C):
    """Returns token, offsets and slots, with empty slots and repeated tokens."""
    token = torch.randint(-2, T + 2, (G, E, C), dtype=torch.int32)
    return token, *OPS.invert_slots(token, T)[:2]


def test_every_forward_op_has_a_decomposition():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vmoe_routers::")}
    ours = {op._schema.name for op in DECOMPOSITIONS if op.namespace == "vmoe_routers"}
    assert ours == {name for name in names if not name.endswith("_backward")}


@both_dtypes
@pytest.mark.parametrize("descending", [False, True])
def test_stable_sort(dtype, descending):
    for x, dim in ((specials(dtype), 1), (tied(4, 30, 3).to(dtype), 1), (tied(4, 30).int(), -1), (tied(3, 0), 1)):
        wanted = x.sort(dim=dim, descending=descending, stable=True)
        found = decomposed(torch.ops.aten.sort.stable, x, stable=True, dim=dim, descending=descending)
        assert torch.equal(found[1], wanted.indices)
        assert torch.equal(found[0].nan_to_num(9), wanted.values.nan_to_num(9))


@both_dtypes
@pytest.mark.parametrize(("k", "dim"), [(1, 2), (4, 2), (9, 2), (1, 1), (30, 1), (50, 0)])
def test_topk(dtype, k, dim):
    for x in (spread(50, 30, 9), tied(50, 30, 9), strided(spread(50, 30, 9))):
        check(OPS.topk, x.to(dtype), k, dim)


@both_dtypes
@pytest.mark.parametrize("k", range(1, 8))
def test_topk_of_special_values(dtype, k):
    check(OPS.topk, specials(dtype), k, 1)
    check(OPS.topk, specials(dtype).T.contiguous(), k, 0)
    check(OPS.topk, torch.empty(3, 0, dtype=dtype), 0, 1)


@both_dtypes
@pytest.mark.parametrize(("k", "dim"), [(1, 2), (3, 2), (9, 2), (1, 1), (7, 1), (40, 1)])
def test_softmax_topk(dtype, k, dim):
    logits = spread(3, 40, 9).to(dtype)
    check(OPS.softmax_topk, logits, k, dim, read=(0, 1))
    logits[0, 5] = -INF  # absent
    logits[0, 6, :4] = -INF
    logits[1] = -INF
    logits[2, 7, 2], logits[2, 8, 3], logits[2, 9] = NAN, INF, logits[2, 10]
    check(OPS.softmax_topk, logits, k, dim, read=(0, 1))
    check(OPS.softmax_topk, torch.zeros(2, 40, 9, dtype=dtype), k, dim, read=(0, 1))


@both_dtypes
@pytest.mark.parametrize("dim", [1, 2])
def test_softmax_gather(dtype, dim):
    logits = spread(3, 20, 9).to(dtype)
    logits[0, 5], logits[1, 3, 2], logits[2, 4, 1] = -INF, NAN, INF
    size = logits.shape[dim]
    indices = torch.randint(-2, size + 2, (3, logits.shape[3 - dim], 5), dtype=torch.int32)
    check(OPS.softmax_gather, logits, indices, dim, read=(0,))


@pytest.mark.parametrize("priority", [None, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("T", "K", "E", "C"), [(30, 2, 5, 8), (30, 1, 40, 1), (9, 3, 2, 50), (0, 2, 3, 4), (5, 1, 2, 0)]
)
def test_assign_slots(priority, T, K, E, C):
    expert = torch.randint(-1, E + 1, (3, T, K), dtype=torch.int32)
    check(OPS.assign_slots, expert, None if priority is None else tied(3, T).to(priority), E, C)


@pytest.mark.parametrize(("G", "T", "E", "C"), [(3, 20, 4, 7), (1, 1, 1, 1), (2, 0, 3, 2), (2, 5, 3, 0), (0, 5, 3, 2)])
def test_slots(G, T, E, C):
    token, offsets, slots = slots_of(G, T, E, C)
    check(OPS.invert_slots, token, T)
    for dtype in (torch.float16, torch.float32, torch.float64):
        x, y = torch.randn(G, T, 6).to(dtype), torch.randn(E, G, C, 6).to(dtype)
        gate = torch.rand(G, E, C).to(torch.promote_types(dtype, torch.float32))
        check(OPS.dispatch, x, token, offsets, slots)
        check(OPS.combine, y, gate, token, offsets, slots)
        check(OPS.combine, y, None, token, offsets, slots)


def test_empty_slots_do_not_affect_the_result():
    token, offsets, slots = slots_of(2, 6, 3, 4)
    y, gate = torch.randn(3, 2, 4, 5), torch.rand(2, 3, 4)
    y.transpose(0, 1)[(token < 0) | (token > 5)] = NAN
    check(OPS.combine, y, gate, token, offsets, slots)


@both_dtypes
@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
@pytest.mark.parametrize(("scale", "epsilon"), [(1.0, 1.0), (3.0, 0.2), (1e4, 1.0)])
def test_sinkhorn(dtype, tolerance, scale, epsilon):
    logits = spread(4, 40, 9, scale=scale).to(dtype)
    logits[1, :5], logits[2, 3:9, 4], logits[3] = -INF, -INF, -INF
    # The op iterates in float32 if that is exact enough, the decomposition in float64.
    check(OPS.sinkhorn, logits, epsilon, 4, tolerance, False, read=(0, 2, 3), slack=3.0)


@pytest.mark.parametrize("iterations", [1, 5])
def test_sinkhorn_keeps_nan(iterations):
    logits = spread(3, 10, 4)
    logits[0, 2, 1], logits[1, 3, 2] = NAN, INF
    plan = decomposed(OPS.sinkhorn.default, logits, 1.0, iterations, 0.0, True)[0]
    assert plan[:2].isnan().all()
    assert plan[2].isfinite().all()


@both_dtypes
@pytest.mark.parametrize("k", [1, 3, 12])
def test_ksparse_projection(dtype, k):
    for x in (spread(20, 12), tied(20, 12), spread(20, 12, scale=1e4)):
        check(OPS.ksparse_projection, x.to(dtype), k)
    rows = spread(5, 12).to(dtype)
    rows[0, 3], rows[1, 4], rows[2, 5], rows[3] = NAN, INF, -INF, -INF
    check(OPS.ksparse_projection, rows, k)


@both_dtypes
@pytest.mark.parametrize(("k", "tolerance"), [(1, 1e-3), (5, 1e-3), (5, 2.0), (30, 0.0)])
def test_ksparse_transport(dtype, k, tolerance):
    similarity = spread(8, 30, 6).softmax(-1).to(dtype)
    similarity[1, :4], similarity[2], similarity[3] = -INF, -INF, 0.25
    similarity[4, 10:20] = similarity[4, 0]
    similarity[5:, :, 2] = -INF  # an expert that no token may take
    similarity[6, 3, 1], similarity[7, 3, 1] = NAN, INF
    # If a row sums to 1, Adam's step depends on the rounding of the other rows.
    check(OPS.ksparse_transport, similarity, k, 3, "adam", 0.01, tolerance, 1.0, slack=10.0)


def test_lbfgs_has_no_decomposition():
    with pytest.raises(NotImplementedError, match="ksparse_transport: solver 'lbfgs'"):
        decomposed(OPS.ksparse_transport.default, torch.rand(1, 4, 2), 2, 20, "lbfgs", 0.01, 1e-3, 1.0)


@both_dtypes
def test_soft_logits(dtype):
    check(OPS.soft_logits, spread(2, 7, 5).to(dtype), spread(5, 12).to(dtype))
    check(OPS.soft_logits, 1e30 * torch.randn(2, 7, 5).to(dtype), spread(5, 12).to(dtype))  # the squares overflow


@both_dtypes
@pytest.mark.parametrize("num_experts", [1, 3])
def test_soft_mix(dtype, num_experts):
    logits = spread(2, 7, 12).to(dtype)
    logits[0, 3], logits[1, :, 5], logits[1, 2, 3] = -INF, -INF, -INF
    check(OPS.soft_mix, logits, spread(2, 7, 4).to(dtype), 1, num_experts)
    check(OPS.soft_mix, logits, spread(num_experts, 2, 12 // num_experts, 4).to(dtype), 2, num_experts)


@both_dtypes
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("save", [False, True])
def test_grouped_mlp(dtype, act, bias, save):
    x, w1, w2 = (spread(*shape, scale=1.0).to(dtype) for shape in ((3, 8, 5), (3, 5, 7), (3, 7, 4)))
    b1, b2 = (spread(3, size).to(dtype) if bias else None for size in (7, 4))
    for filled in (None, torch.tensor([[4, 1], [0, 2], [3, 4]], dtype=torch.int32)):
        check(OPS.grouped_mlp, x, w1, b1, w2, b2, filled, act, save, read=(0,), slack=5.0)
