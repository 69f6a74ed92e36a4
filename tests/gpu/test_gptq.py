"""Columns rounded by a kernel: the bits of the loop over torch's operators."""

import importlib

import pytest
import torch

from quantempo.core import GroupFormat
from quantempo.kernels.gpu import gptq as kernel
from tests.gpu import harness

# The package has a function of that name.
rounding = importlib.import_module("quantempo.rounding.gptq")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize(("outs", "width", "block"), [(5, 7, 128), (70, 100, 32), (33, 1, 1)])
def test_codes_and_errors_are_those_of_torch(outs, width, block, group, device) -> None:
    g = torch.Generator().manual_seed(outs)
    weight, scale = torch.randn(outs, width, generator=g), 0.01 + torch.rand(outs, generator=g)
    grid = (1.0, -7.0, 7.0)
    if group:
        spec, shape = GroupFormat(4, group=group), (outs, width)
        groups = torch.randint(0, 128, spec.group_shape(shape), generator=g, dtype=torch.uint8)
        found = spec.grid(shape, groups)
        grid = tuple(v.flatten(1) for v in (found.step, found.low, found.high))
        scale /= 8
    half = torch.randn(width, width, generator=g)
    factor = torch.linalg.cholesky(half @ half.t() + torch.eye(width), upper=True)
    factor[0, 0] = 3.0
    rest = weight.t().contiguous()
    module = harness.interpreted("gptq") if device == "cpu" else kernel
    results = []
    for columns in (rounding._one_by_one, module.launch):
        made = [torch.empty(width, outs, device=device) for _ in range(2)]
        given = [v.to(device) for v in (rest.clone(), factor, scale)]
        for first in range(0, width, block):
            last = min(first + block, width)
            part = [v.to(device)[:, first:last] if group else v for v in grid]
            whole, here = (v[first:last] for v in (given[0], given[1][:, first:last]))
            columns(whole, made[0][first:last], made[1][first:last], here, given[2], tuple(part))
        results.append(made)
    assert all(map(torch.equal, *results))
    assert results[0][0].unique().numel() > 2


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_it_compiles_without_spills_and_without_fused_products(arch) -> None:
    rest, factor = torch.empty(128, 3072, device="meta"), torch.empty(128, 128, device="meta")
    with harness.recorded(kernel) as launches:
        kernel.launch(rest, rest, rest, factor, rest[0], (rest.t(),) * 3)
    binary = harness.compiled(launches[0], arch)
    assert (binary.spills, binary.stack) == (0, 0)
    # The update of 128 columns by 32 channels, of 128 threads.
    assert binary.count("FMUL") >= 32
