"""The kernels of BatchNorm recomputation against float64, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastswa_kernels import batch_norm, batch_stats, merge_batch_stats_, reference
from fastswa_kernels.batch_norm_kernel import MAX_TILES
from fastswa_kernels.pairs import FLOAT_DTYPES

EPS = torch.finfo(torch.float64).eps
DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def assert_stats(x: Tensor, tolerance: float = 1e-6) -> None:
    """Compare with the reference in float64.

    In float32 a lane adds up to 64 terms. Each sum is rounded by at most 2^-24 of what it has grown to, so all by at
    most 64 / 2 * 2^-24 = 2e-6; a quarter of that is left, as not all point the same way. In float64 it is 1e-15, and
    more for torch's var_mean, which adds more at a time.
    """
    tolerance = 1e-13 if x.dtype == torch.float64 else tolerance
    count, mean, m2 = batch_stats(x)
    exact_count, exact_mean, exact_m2 = reference.batch_stats(x.double())
    assert count == exact_count
    assert mean.dtype == m2.dtype == torch.float64
    assert (m2 >= 0).all()
    # The pilot of a constant channel may be beside its mean by this rounding of a tile's sum; its square is taken off.
    beside = tolerance * exact_mean.abs()
    assert (
        (mean - exact_mean).abs() <= tolerance * ((exact_m2 / count).sqrt() + beside) + EPS * exact_mean.abs()
    ).all()
    assert ((m2 - exact_m2).abs() <= tolerance * (exact_m2 + count * beside**2)).all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "channels first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "odd address": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
# All ranks; planes of 1, 7 and 49 (no width but a single element), 6 and 196 (half the width), 8; more and fewer
# channels than a program takes, and such as no width divides; one value for a channel; more values than a tile has.
SHAPES = [
    *((300, 3), (7, 129), (1, 5), (900, 1), (5, 12, 8), (3, 5, 7), (2, 9, 6), (33, 17, 1)),
    *((4, 3, 7, 7), (2, 8, 14, 14), (2, 2, 48, 48), (1, 1, 50, 50), (2, 3, 4, 5, 6), (1, 12, 2, 8, 8)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@DTYPES
def test_statistics_of_every_shape_and_layout(dtype: torch.dtype, layout: str, kernel_device: str) -> None:
    for shape in SHAPES:
        x = LAYOUTS[layout]((torch.randn(shape, device=kernel_device) * 2 + 3).to(dtype))
        before = x.clone()
        assert_stats(x)
        assert torch.equal(x, before)


def test_many_channels_of_few_values_and_few_of_many(kernel_device: str) -> None:
    for shape in ((2, 70, 3), (3, 3000), (20000, 2), (2, 1, 30001)):
        assert_stats(torch.randn(shape, device=kernel_device) + 1e4)


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x + 1e4,
    "sorted": lambda x: (x + 1e4).sort(0).values,
    "an outlier first": lambda x: torch.cat([torch.full_like(x[:1], 1e4), x[1:]]),
    "an outlier first, far from zero": lambda x: torch.cat([torch.full_like(x[:1], 2e4), x[1:] + 1e4]),
    "a pilot unlike the rest": lambda x: torch.cat([x[:2048], x[2048:] + 1000 / 3]),
}
# Of more values than the 64 tiles of a program; the second program begins within a plane.
LONG: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "planes": lambda x: x.view(20, 7000, 2).transpose(1, 2).contiguous(),
    "odd planes": lambda x: x.view(32, 4375, 2).transpose(1, 2).contiguous(),
}


@pytest.mark.parametrize("layout", LONG)
@pytest.mark.parametrize("order", ORDERS)
def test_the_variance_is_right_wherever_the_mean_is(
    order: str, layout: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Programs take as many tiles as they may, as they otherwise do for inputs of many megabytes only.
    monkeypatch.setattr(batch_norm, "PROGRAMS", 1)
    x = LONG[layout](ORDERS[order](torch.randn(140_000, 2, device=kernel_device)))
    # What cancels is at most MAX_TILES times what stays.
    assert_stats(x, MAX_TILES * 1e-6 if order == "a pilot unlike the rest" else 1e-6)


def test_constant_channels_a_negated_view_and_a_parameter(kernel_device: str) -> None:
    values = torch.tensor([0.1, -1e4 / 3, 0.0, 1e-9, 65504.0], device=kernel_device)
    many = values.expand(3000, 5).contiguous()
    for x in (many, many.t().contiguous()[None], values[None], torch._neg_view(many), torch.nn.Parameter(many)):
        assert_stats(x)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_nan_and_infinity_stay_in_their_channel(layout: str, bad: float, kernel_device: str) -> None:
    x = torch.randn(3, 5, 30, 30, device=kernel_device)
    x[2, 3, 29, 29] = bad
    _, mean, m2 = batch_stats(LAYOUTS[layout](x))
    assert mean.isfinite().tolist() == m2.isfinite().tolist() == [True, True, True, False, True]


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (4, 3, 0, 2), (4, 0), (4, 0, 2)])
def test_without_values_all_is_zero(shape: tuple[int, ...], kernel_device: str) -> None:
    count, *both = batch_stats(torch.randn(shape, device=kernel_device))
    zero = torch.zeros(shape[1], dtype=torch.float64, device=kernel_device)
    assert count == 0
    assert all(torch.equal(result, zero) for result in both)


def test_programs_share_the_values_of_a_channel_and_know_how_wide_they_load() -> None:
    for length in (1, 2047, 2048, 2049, 1 << 20, 10**8 + 1, (1 << 33) + 5):
        for tile, lanes in ((2048, 1), (256, 64), (32, 5000)):
            splits, part = batch_norm._split(length, tile, lanes)
            assert part % tile == 0
            assert part <= MAX_TILES * tile
            assert (splits - 1) * part < length <= splits * part
    assert [batch_norm._vector(torch.zeros(64), length) for length in (64, 6, 49)] == [4, 2, 1]
    assert batch_norm._vector(torch.zeros(65)[1:], 64) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, (1 << 31) // 6 + 11), ((1 << 31) // 6 + 11, 6), (1, 1, (1 << 31) + 2)])
def test_more_than_two_to_the_31_elements(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    x[-1, -1] = 1
    count, mean, m2 = batch_stats(x)
    share = x[-1, -1].numel() / count
    assert mean.tolist() == pytest.approx([0.0] * (shape[1] - 1) + [share], rel=1e-6, abs=0)
    assert m2[-1].item() == pytest.approx(count * share * (1 - share), rel=1e-6, abs=0)


# More channels than a program takes, and a layer that crosses from one program to the next.
CHANNELS = (3, 130, 64, 1)


def merge_arguments(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Random arguments in the order of `merge_batch_stats_`, as if some batches had been merged."""
    layer = torch.repeat_interleave(torch.arange(len(CHANNELS)), torch.tensor(CHANNELS)).int()
    moments = torch.rand(6, len(layer), dtype=torch.float64) + 0.5
    mean, var = torch.randn(len(layer)).to(dtype), torch.rand(len(layer)).to(dtype)
    weights = torch.rand(len(CHANNELS), dtype=torch.float64) + 0.1
    nonfinite = torch.zeros(len(CHANNELS), dtype=torch.int32)
    return [tensor.to(device) for tensor in (moments, mean, var, weights, 9 * weights, layer, nonfinite)]


@DTYPES
def test_one_merge_equals_the_reference(dtype: torch.dtype, kernel_device: str) -> None:
    moments, mean, var, *others = merge_arguments(dtype, kernel_device)
    exact = moments.clone()
    reference.merge_batch_stats_(exact, mean.double(), var.double(), *others)
    merge_batch_stats_(moments, mean, var, *others)
    assert not others[-1].any()
    # The same float64 operations, of numbers below 10. A GPU may fuse a product with the sum after it, which saves the
    # product's rounding, in the new mean and again in the sum of squares, to which the mean's goes on.
    assert ((moments - exact).abs() <= 2 * EPS * exact.abs().clamp_min(10)).all()


@DTYPES
def test_many_batches_give_the_weighted_moments_of_all(dtype: torch.dtype, kernel_device: str) -> None:
    moments, _, _, _, counts, layer, nonfinite = merge_arguments(dtype, kernel_device)
    moments.zero_()
    batches = []
    for _ in range(20):
        mean = (torch.randn(len(layer), device=kernel_device) + 3).to(dtype)
        var = torch.rand(len(layer), device=kernel_device).to(dtype)
        weights = torch.rand(len(CHANNELS), dtype=torch.float64, device=kernel_device)
        merge_batch_stats_(moments, mean, var, weights, counts, layer, nonfinite)
        batches.append((weights[layer], mean.double(), var.double()))
    w, means, variances = (torch.stack(parts) for parts in zip(*batches, strict=True))
    rows = [w.sum(0)]
    for values in (means, variances):
        rows.append((w * values).sum(0) / rows[0])
        rows.append((w * (values - rows[-1]) ** 2).sum(0))
    exact = torch.stack([*rows, ((counts[layer] - 1) * variances).sum(0)])
    # Each batch rounds four times, at the size of its largest term: a mean below 8, which also goes into squares.
    assert ((moments - exact).abs() <= 20 * 4 * EPS * (exact.abs() + 8)).all()


@pytest.mark.parametrize("equal", [False, True], ids=["weights of counts", "equal weights"])
def test_all_values_pooled_or_the_mean_of_the_variances(equal: bool, kernel_device: str) -> None:
    moments, _, _, _, _, layer, nonfinite = merge_arguments(torch.float64, kernel_device)
    moments.zero_()
    seen: list[list[Tensor]] = [[] for _ in CHANNELS]
    for _ in range(6):
        counts = torch.randint(2, 9, (len(CHANNELS),), device=kernel_device).double()
        for values, n, channels in zip(seen, counts.tolist(), CHANNELS, strict=True):
            values.append(torch.randn(int(n), channels, dtype=torch.float64, device=kernel_device) + 2)
        mean, var = (torch.cat([getattr(values[-1], name)(0) for values in seen]) for name in ("mean", "var"))
        merge_batch_stats_(moments, mean, var, counts**0 if equal else counts, counts, layer, nonfinite)
    total, mean, mean_squares, var, _, within = moments
    for index, values in enumerate(seen):
        pooled = torch.cat(values)
        exact_mean, exact = pooled.mean(0), pooled.var(0, correction=0)
        if equal:
            exact_mean, exact = (sum(getattr(value, name)(0) for value in values) / 6 for name in ("mean", "var"))
        result = var if equal else (within + mean_squares) / total
        # At most 48 values below 8, summed in another order.
        assert ((mean[layer == index] - exact_mean).abs() <= 48 * EPS * 8).all()
        assert ((result[layer == index] - exact).abs() <= 48 * EPS * 64).all()


@DTYPES
def test_layers_that_are_left_out_keep_their_bits(dtype: torch.dtype, kernel_device: str) -> None:
    moments, mean, var, weights, counts, layer, nonfinite = merge_arguments(dtype, kernel_device)
    weights[1] = weights[3] = 0
    out = weights[layer] == 0
    mean[out], var[out] = float("nan"), float("inf")
    # W is 0 where a layer has been left out of every batch so far.
    moments[:, out] = 0
    moments[1, 10], moments[5, 11], moments[2, 12] = float("nan"), float("inf"), -0.0
    before = moments.clone()
    merge_batch_stats_(moments, mean, var, weights, counts, layer, nonfinite)
    assert torch.equal(moments.view(torch.int64)[:, out], before.view(torch.int64)[:, out])
    assert (moments[:, ~out] != before[:, ~out]).all()
    assert moments[:, ~out].isfinite().all()
    assert not nonfinite.any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("argument", [1, 2], ids=["mean", "var"])
def test_the_flag_is_a_layers_own_and_stays(bad: float, argument: int, kernel_device: str) -> None:
    arguments = merge_arguments(torch.float32, kernel_device)
    moments, nonfinite = arguments[0], arguments[-1]
    nonfinite[3] = 1
    spoilt = [tensor.clone() if place == argument else tensor for place, tensor in enumerate(arguments)]
    # Two channels of layer 1, of different programs.
    spoilt[argument][5] = spoilt[argument][132] = bad
    for batch in (arguments, spoilt, arguments):
        merge_batch_stats_(*batch)
        assert nonfinite.tolist() == [0, int(not moments.isfinite().all()), 0, 1]
    assert (~moments.isfinite().all(0)).nonzero().flatten().tolist() == [5, 132]


SPOILT: dict[str, tuple[int, Callable[[Tensor], Tensor], type[Exception], str]] = {
    "five rows": (0, lambda t: t[:5], ValueError, r"moments must have shape \(6, 198\), got \(5, 198\)"),
    "transposed": (0, lambda t: t.t().contiguous().t(), ValueError, "moments must be contiguous"),
    "a channel less": (1, lambda t: t[:-1], ValueError, r"batch_mean must have shape \(198,\), got \(197,\)"),
    "two dtypes": (2, Tensor.double, TypeError, "batch_var must be torch.float32, got torch.float64"),
    "another device": (6, lambda t: t.to("meta"), ValueError, "nonfinite is on meta and moments on cpu"),
}


@pytest.mark.parametrize("implementation", [merge_batch_stats_, reference.merge_batch_stats_])
@pytest.mark.parametrize("case", SPOILT)
def test_arguments_that_are_refused_leave_all_unwritten(case: str, implementation: Callable[..., None]) -> None:
    index, spoil, error, message = SPOILT[case]
    arguments = merge_arguments(torch.float32, "cpu")
    before = [tensor.clone() for tensor in arguments]
    with pytest.raises(error, match=message):
        implementation(*(spoil(tensor) if place == index else tensor for place, tensor in enumerate(arguments)))
    assert all(map(torch.equal, arguments, before))


def test_inputs_and_devices_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for implementation in (batch_stats, reference.batch_stats):
        for shape in ((3,), (1, 1, 1, 1, 1, 1)):
            with pytest.raises(ValueError, match="x must have 2 to 5 dimensions"):
                implementation(torch.zeros(shape))
        with pytest.raises(TypeError, match=r"x must be one of .*, got torch.int64"):
            implementation(torch.zeros(3, 3, dtype=torch.int64))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="x: the kernels run on CUDA and ROCm devices, not on cpu"):
        batch_stats(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="moments: the kernels run on CUDA and ROCm devices, not on cpu"):
        merge_batch_stats_(*merge_arguments(torch.float32, "cpu"))


@pytest.mark.gpu
def test_nothing_is_read_on_the_host_and_a_graph_holds_both() -> None:
    moments, *others = merge_arguments(torch.float32, "cuda")
    x, graph = torch.randn(8, 16, 33, 33, device="cuda"), torch.cuda.CUDAGraph()
    for _ in range(2):
        batch_stats(x)
        merge_batch_stats_(moments, *others)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        _, mean, m2 = batch_stats(x)
        merge_batch_stats_(moments, *others)
    exact = moments.clone()
    x.normal_()
    graph.replay()
    reference.merge_batch_stats_(exact, *others)
    assert all(map(torch.equal, (mean, m2), batch_stats(x)[1:]))
    # One merge, as above.
    assert ((moments - exact).abs() <= 2 * EPS * exact.abs().clamp_min(10)).all()
