"""How an update's time is taken from stamps: by its place in the cycle, without warm-up and outliers."""

from jobs.benchmarks.ray_train_overhead import WARM_UP, stamped, typical


def test_an_update_takes_the_mean_over_the_cycle_of_each_places_median() -> None:
    times = [100.0] * WARM_UP + [1.0, 4.0, 1.0, 4.0, 50.0, 4.0]  # the generator learns in every second; one outlier
    stamps = [(sum(times[:count]), 2 * sum(times[:count])) for count in range(len(times) + 1)]
    assert typical(stamps, 0, 2) == 2.5
    assert typical(stamps, 1, 2) == 5.0


def test_a_stamp_is_taken_when_a_batch_is_asked_for() -> None:
    stamps: list[tuple[float, float]] = []
    batches = stamped(iter("ab"), stamps)
    assert next(batches) == "a" and len(stamps) == 1
    assert next(batches) == "b" and len(stamps) == 2
    assert stamps[0][0] <= stamps[1][0] and stamps[0][1] <= stamps[1][1]
