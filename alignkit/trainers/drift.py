"""The warning that preference training won its loss by ruining winners too, as it follows from logged metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from alignkit.escape import get_logger

logger = get_logger(__name__)
WINDOW = 10  # logs in each half of the window that is compared


class Drift:
    """Watches the winner's error against the reference and the margin; `remedy` is what the warning advises last."""

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy
        self._seen: deque[tuple[float, float]] = deque(maxlen=2 * WINDOW)

    def clear(self) -> None:
        """Forget what was seen."""
        self._seen.clear()

    def watch(self, health: Mapping[str, float], step: int) -> None:
        """Warn, once a window, when the winner's error rises above the reference's while the margin grows."""
        if not health.keys() >= {"health/winner_error_delta", "health/margin"}:
            return  # a loss of the user's own, or none of pairs
        self._seen.append((health["health/winner_error_delta"], health["health/margin"]))
        if len(self._seen) < 2 * WINDOW:
            return
        entries = list(self._seen)
        (w0, m0), (w1, m1) = (_means(half) for half in (entries[:WINDOW], entries[WINDOW:]))
        if w1 > max(w0, 0.0) and m1 > m0:
            self.clear()
            logger.warning(
                "step %d: the winner's error against the reference rises (%.2e -> %.2e) while the margin grows "
                "(%.3f -> %.3f). Winners and losers get worse; lower learning_rate, raise beta, or %s.",
                *(step, w0, w1, m0, m1, self.remedy),
            )


def _means(entries: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(winner for winner, _ in entries) / WINDOW, sum(margin for _, margin in entries) / WINDOW
