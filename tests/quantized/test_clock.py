"""The clock: from the time-step a denoiser receives to a bucket, and to rows of a scale table."""

from typing import Any

import numpy as np
import pytest
import torch

from quantempo.errors import QuantempoError
from quantempo.quantized import StepClock, Times

# Unequal buckets, so that a wrong index is a wrong bucket: [0, 100), [100, 101), [101, 900), ...
EDGES = (100, 101, 900)
TABLE = torch.tensor([sum(t >= edge for edge in EDGES) for t in range(1000)])


def clock(per_unit: float = 1.0) -> StepClock:
    return StepClock(TABLE, Times(len(TABLE), per_unit=per_unit))


@pytest.mark.parametrize("t", [0, 99, 100, 101, 899, 900, 999])
@pytest.mark.parametrize(
    "form",
    [
        int,
        float,
        np.int64,
        lambda t: torch.tensor(t),
        lambda t: torch.tensor(float(t)),
        lambda t: torch.tensor([t]),
        lambda t: torch.tensor([float(t)], dtype=torch.float64),
    ],
    ids=["int", "float", "numpy", "0-dim", "0-dim float", "(1,)", "(1,) double"],
)
def test_one_time_step_in_every_form_gives_its_bucket(t: int, form: Any) -> None:
    made = clock()
    made.set(form(t))
    assert made.bucket.shape == () and made.bucket.dtype == torch.int64
    assert int(made.bucket) == int(TABLE[t])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_a_batch_of_time_steps_keeps_its_order(dtype: torch.dtype) -> None:
    made = clock()
    made.set(torch.tensor([999, 0, 100, 500], dtype=dtype))
    assert made.bucket.tolist() == [3, 0, 1, 2]


def test_times_outside_the_training_range_go_to_the_ends() -> None:
    made = clock()
    made.set(torch.tensor([-5.0, 1000.0, 5e6, 999.4]))
    assert made.bucket.tolist() == [0, 3, 3, 3]


def test_fractions_round_to_the_nearest_training_time_step() -> None:
    made = clock()
    made.set(torch.tensor([99.4, 99.6, 100.4, 100.6]))
    assert made.bucket.tolist() == [0, 1, 1, 2]


def test_time_as_a_fraction_is_scaled_before_rounding() -> None:
    made = clock(per_unit=1000.0)
    # In float32 0.1 * 1000 is 100.0000015: rounding must come after the product.
    made.set(torch.tensor([0.0, 0.0999, 0.1, 0.101, 0.9, 1.0]))
    assert made.bucket.tolist() == [0, 1, 1, 2, 3, 3]


def test_every_token_has_a_bucket_of_its_own() -> None:
    made = clock()
    made.set(torch.tensor([[0, 100, 950], [0, 0, 500]]))
    wanted = torch.tensor([[0.5, 1.0, 4.0], [0.5, 0.5, 2.0]])
    for like, rows in (
        (torch.zeros(2, 3, 7), wanted[..., None]),
        (torch.zeros(6, 7), wanted.reshape(-1, 1)),
        (torch.zeros(2, 5, 7), wanted.amax(1).view(-1, 1, 1)),
    ):
        assert torch.equal(made.rows(SCALES, like), rows)
    with pytest.raises(QuantempoError, match=r"a time-step for every token.*attach"):
        assert made.bucket is None


SCALES = torch.tensor([0.5, 1.0, 2.0, 4.0])


def test_rows_of_one_time_step_are_one_number() -> None:
    made = clock()
    made.set(950)
    row = made.rows(SCALES, torch.zeros(3, 2))
    assert row.shape == () and float(row) == 4.0


@pytest.mark.parametrize("like", [(4, 3, 2, 2), (4, 7, 3), (4, 5)])
def test_rows_of_a_mixed_batch_broadcast_over_the_batch(like: tuple[int, ...]) -> None:
    made = clock()
    made.set(torch.tensor([999, 0, 100, 500]))
    rows = made.rows(SCALES, torch.zeros(like))
    assert rows.shape == (4, *[1] * (len(like) - 1))
    assert rows.flatten().tolist() == [4.0, 0.5, 1.0, 2.0]


def test_rows_that_repeat_a_sample_share_its_scale() -> None:
    made = clock()
    made.set(torch.tensor([0, 999]))
    # Video models fold frames into the batch: sample 0's frames first.
    rows = made.rows(SCALES, torch.zeros(6, 2))
    assert rows.flatten().tolist() == [0.5, 0.5, 0.5, 4.0, 4.0, 4.0]
    with pytest.raises(QuantempoError, match="2 time-steps for a layer input of 5 rows"):
        made.rows(SCALES, torch.zeros(5, 2))


def test_a_table_of_one_column_is_constant_in_time() -> None:
    made = clock()
    for t in (0, 999, torch.tensor([0, 500, 999])):
        made.set(t)
        row = made.rows(torch.tensor([0.25]), torch.zeros(3, 2))
        assert row.shape == () and float(row) == 0.25


def test_the_table_is_saved_and_the_bucket_is_not() -> None:
    assert list(clock().state_dict()) == ["bucket_of"]


def test_places_are_ranks_from_the_image_on() -> None:
    for run in torch.tensor([[1, 0.9, 0.4], [0, 0.1, 0.6], [2, -1, -1.5]]):
        assert Times.of(list(run), 1000).index(run).tolist() == [2, 1, 0]
