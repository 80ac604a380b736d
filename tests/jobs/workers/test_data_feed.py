"""Which samples a rank gets: each one once, in one order, whatever the number of ranks and wherever it goes on."""

import pyarrow as pa
import pytest

from diagonal.data.prompts import samples
from jobs.workers.data_feed import Feed, sample_order

BATCH, UPDATES = 5, 12


def feed() -> Feed:
    order = sample_order(7, 0, UPDATES, BATCH)
    return Feed(pa.table({"prompt": [f"prompt {item}" for item in order]}), BATCH, UPDATES)


def seen(done: int, until: int, ranks: int) -> list[tuple[int, str]]:
    """(sample, prompt) of updates `done` + 1 to `until` on all ranks, by sample."""
    found = []
    for rank in range(ranks):
        table = feed().own_rows(done, rank, ranks).to_pylist()
        mine = len(table) // (UPDATES - done)
        found += [(row["sample"], row["prompt"]) for row in table[: mine * (until - done)]]
    return sorted(found)


def test_the_order_is_that_of_the_seed_and_the_epoch() -> None:
    assert sample_order(7, 3, 2, 5) == [item for _, item in samples(7, 3, 0, 10)]
    assert sorted(sample_order(7, 3, 7, 1)) == list(range(7))


@pytest.mark.parametrize("worlds", [(1, 1, 1), (2, 1, 2), (3, 2, 5), (1, 4, 3)])
def test_a_run_that_changes_its_world_size_sees_every_sample_once(worlds: tuple[int, int, int]) -> None:
    cuts = (0, 4, 7, UPDATES)
    parts = [seen(start, end, ranks) for start, end, ranks in zip(cuts, cuts[1:], worlds, strict=False)]
    whole = [pair for part in parts for pair in part]
    assert whole == seen(0, UPDATES, 1)
    assert [sample for sample, _ in whole] == list(range(UPDATES * BATCH))


def test_a_stage_that_is_done_asks_for_no_data() -> None:
    assert list(feed().batches(UPDATES, 0, 1)) == []


@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_gives_each_update_the_samples_of_the_rank_in_order() -> None:
    for rank, expected in ((0, [0, 2, 4]), (1, [1, 3])):
        batches = list(feed().batches(10, rank, 2))
        assert [list(batch["sample"]) for batch in batches] == [
            [50 + sample for sample in expected],
            [55 + sample for sample in expected],
        ]
        rows = feed().rows["prompt"].to_pylist()
        assert [str(p) for p in batches[0]["prompt"]] == [rows[50 + sample] for sample in expected]
