"""When training ends before its last epoch; whole runs that do are in `test_distill`."""

import pytest

from defeat.engine.training.early_stopping import EarlyStopping


@pytest.mark.parametrize(
    ("completed", "best", "stops"),
    [(2, 2, False), (4, 2, False), (6, 2, True), (7, 2, True), (8, 6, False), (20, 2, False), (6, None, False)],
)
def test_it_stops_after_so_many_evaluations_without_a_better_one(completed, best, stops):
    """Every second epoch is evaluated. After the last epoch there is nothing left to stop."""
    early_stopping = EarlyStopping(patience=2, every_epochs=2, epochs=20)
    assert early_stopping.stops(completed=completed, best=best) is stops


def test_without_patience_it_never_stops():
    assert not EarlyStopping(patience=0, every_epochs=1, epochs=20).stops(completed=19, best=1)


@pytest.mark.parametrize(("completed", "left"), [(4, 3), (5, 3), (6, 2), (10, 0)])
def test_the_evaluations_that_are_saved_include_that_of_the_last_epoch(completed, left):
    assert EarlyStopping(patience=1, every_epochs=2, epochs=10).evaluations_after(completed) == left
