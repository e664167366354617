"""Random bits that depend on nothing but their element, and rounding that is exact in the mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastswa_kernels.rounding import StochasticRounding, random_bits, round_stochastically

CPU = torch.device("cpu")
COUNT = 1 << 16
# Five standard errors: a true mean is missed once in 2 million trials, and the trials are fixed by their seeds.
ERRORS = 5
HALVES = [torch.bfloat16, torch.float16]


def mixed(x: int) -> int:
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0xD35A2D97 % 2**32
    return x ^ x >> 15


def specified_bits(element: int, seed: int, step: int, average: int) -> int:
    """The formula of the module's head, word by word in Python's integers."""
    key = 0x9E3779B9
    for word in (seed, seed >> 32, step, step >> 32):
        key = mixed(key ^ word % 2**32)
    return mixed(mixed(element % 2**32 ^ key) ^ element >> 32 ^ mixed(mixed(key) ^ average))


@pytest.mark.parametrize("element", [0, 1, 2**31 - 2, 2**32 - 2, 2**40 + 5])
@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63 + 7])
@pytest.mark.parametrize(("step", "average"), [(0, 0), (1, 7), (2**35 + 3, 2)])
def test_bits_are_the_specified_ones(element: int, seed: int, step: int, average: int) -> None:
    expected = [specified_bits(number, seed, step, average) for number in range(element, element + 4)]
    for given in (step, torch.tensor(step)):
        bits = random_bits(element, 4, seed, given, average, CPU)
        assert bits.dtype == torch.int32
        assert [number % 2**32 for number in bits.tolist()] == expected


def test_bits_are_the_same_in_any_pieces_and_no_generator_is_touched() -> None:
    state = torch.get_rng_state()
    whole = random_bits(2**32 - 500, 1000, 1, 2, 3, CPU)
    pieces = [random_bits(2**32 - 500 + first, 250, 1, 2, 3, CPU) for first in range(0, 1000, 250)]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(torch.get_rng_state(), state)


STREAMS = {
    "elements": lambda number: random_bits(number, COUNT, 0, 0, 0, CPU),
    "distant elements": lambda number: random_bits(number << 32, COUNT, 0, 0, 0, CPU),
    "steps": lambda number: random_bits(0, COUNT, 0, number, 0, CPU),
    "seeds": lambda number: random_bits(0, COUNT, number, 0, 0, CPU),
    "averages": lambda number: random_bits(0, COUNT, 0, 0, number, CPU),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_uniform_and_independent(name: str) -> None:
    streams = [STREAMS[name](number) for number in (0, 1, 2, 3)]
    places = torch.arange(32)
    for stream in streams:
        ones = (stream[:, None] >> places & 1).double().mean(0)
        # The standard error of the mean of COUNT fair coins.
        assert (ones - 0.5).abs().max() < ERRORS * 0.5 / math.sqrt(COUNT)
    for first, second in itertools.combinations(streams, 2):
        agreed = ((first ^ second)[:, None] >> places & 1).double().mean(0)
        assert (agreed - 0.5).abs().max() < ERRORS * 0.5 / math.sqrt(COUNT)
        # 4 bits of one against 4 of the other: 256 cells, whose chi-square has mean 255 and variance 510. The bits that
        # round bfloat16 are the low ones, so both ends are looked at.
        for shift in (0, 12, 28):
            cells = (first >> shift & 15) * 16 + (second >> shift & 15)
            observed = torch.bincount(cells, minlength=256).double()
            expected = COUNT / 256
            assert ((observed - expected) ** 2 / expected).sum() < 255 + 6 * math.sqrt(510)
        x, y = first.double(), second.double()
        correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
        # Uncorrelated samples correlate by 1 / sqrt(COUNT) standard error.
        assert abs(correlation) < ERRORS / math.sqrt(COUNT)


def rounded(x: float, dtype: torch.dtype, bits: Tensor) -> Tensor:
    return round_stochastically(torch.full(bits.shape, x), dtype, bits)


def every_number(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_of_the_dtype_are_unchanged(dtype: torch.dtype) -> None:
    numbers = every_number(dtype)
    for bits in (random_bits(0, 1 << 16, 1, 2, 3, CPU), torch.full((1 << 16,), -1, dtype=torch.int32)):
        result = round_stochastically(numbers.float(), dtype, bits)
        nan = numbers.isnan()
        assert torch.equal(result.isnan(), nan)
        # As bits: zeros keep their sign.
        assert torch.equal(result.view(torch.int16)[~nan], numbers.view(torch.int16)[~nan])


@pytest.mark.parametrize("dtype", HALVES)
def test_between_two_neighbours_every_probability_is_exact(dtype: torch.dtype) -> None:
    dropped = 16 if dtype == torch.bfloat16 else 13
    all_bits = torch.arange(1 << dropped, dtype=torch.int32)
    spacing = torch.finfo(dtype).eps
    for fraction, sign in itertools.product((1, 77, (1 << dropped) - 1), (1, -1)):
        for scale in (2.0**-5, 1.0, 2.0**14):
            x = sign * scale * (1 + spacing * fraction / (1 << dropped))
            up = rounded(x, dtype, all_bits).double() != sign * scale
            assert int(up.sum()) == fraction
            assert rounded(x, dtype, all_bits).double().mean() == x


def test_subnormal_numbers_of_float16() -> None:
    # Each of 1024 equal steps of the 24 bits that decide there.
    bits = torch.arange(1024, dtype=torch.int32) << 22
    unit = 2.0**-24
    for whole, fraction in itertools.product((0, 1, 1022, 1023), (1, 512, 1023)):
        for sign in (1, -1):
            x = sign * (whole + fraction / 1024) * unit
            assert rounded(x, torch.float16, bits).double().mean() == x
    # Subnormal in float32 too: down to zero, with its sign, but for the one case in 2^24.
    tiny = rounded(-1e-42, torch.float16, torch.tensor([0, -1], dtype=torch.int32))
    assert tiny.tolist() == [-unit, 0.0]
    assert torch.signbit(tiny).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_ends(dtype: torch.dtype) -> None:
    bits = torch.tensor([0, -1], dtype=torch.int32)
    largest = torch.finfo(dtype).max
    for sign in (1, -1):
        beyond = sign * largest * (1 + torch.finfo(dtype).eps / 4)
        assert rounded(beyond, dtype, bits).tolist() == [sign * largest, sign * math.inf]
        assert rounded(sign * math.inf, dtype, bits).tolist() == [sign * math.inf] * 2
    # NaN whose only payload is among the bits that are cut off.
    nan = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nan, dtype, bits).isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_the_mean_over_many_steps_is_exact(dtype: torch.dtype) -> None:
    x = torch.randn(32) * torch.tensor([1.0, 1e-6]).repeat(16)
    steps = 2000
    total = torch.zeros(32, dtype=torch.float64)
    for step in range(steps):
        total += round_stochastically(x, dtype, random_bits(0, 32, 1, step, 0, CPU)).double()
    zeros, ones = torch.zeros(32, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    ends = [round_stochastically(x, dtype, bits).double() for bits in (zeros, ones)]
    # A coin with two values has a standard deviation of at most half their distance.
    error = (ends[0] - ends[1]).abs() / 2 / math.sqrt(steps)
    assert ((total / steps - x.double()).abs() <= ERRORS * error).all()


def test_what_is_refused() -> None:
    bits = torch.zeros(2, dtype=torch.int32)
    for x, dtype in ((torch.zeros(2), torch.float64), (torch.zeros(2).double(), torch.bfloat16)):
        with pytest.raises(TypeError, match="float32 is rounded to bfloat16 or float16"):
            round_stochastically(x, dtype, bits)
    for step in (torch.tensor([1]), torch.tensor(1.0), torch.tensor(1, dtype=torch.int32)):
        with pytest.raises(ValueError, match="step must be an int or a 0-dimensional int64 tensor"):
            StochasticRounding(1, step)
