"""When a training ends before its last epoch: its AP has not improved for a while."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """Stops after `patience` evaluations in a row without a better AP. It keeps no state: epochs alone decide.

    Attributes:
        patience: evaluations without a better AP after which training ends; 0: never.
        every_epochs: epochs between two evaluations.
        epochs: epochs of the whole training, after which there is nothing to stop.
    """

    patience: int
    every_epochs: int
    epochs: int

    def without_improvement(self, *, completed: int, best: int) -> int:
        """Return how many evaluations there were since that of the best epoch, after `completed` epochs."""
        return (completed - best) // self.every_epochs

    def stops(self, *, completed: int, best: int | None) -> bool:
        """Return whether to stop after `completed` epochs, of which `best` had the best AP (None: no evaluation)."""
        if best is None or not self.patience or completed == self.epochs:
            return False
        return self.without_improvement(completed=completed, best=best) >= self.patience

    def evaluations_after(self, completed: int) -> int:
        """Return how many evaluations the epochs after `completed` would have had."""
        return -(-(self.epochs - completed) // self.every_epochs)
