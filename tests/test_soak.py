"""The soak's short form: faults of every kind, moving limits, lost callbacks, two kills."""

from benchmarks.soak import run


def test_nothing_is_lost_and_nothing_is_created_twice() -> None:
    """A worker that is killed twice and restarted under 20 % faults makes each voice once."""
    ledger = run(voices=60, kills=2)

    assert (ledger.lost, ledger.twice) == (0, 0), str(ledger)
    assert ledger.killed == 2
    assert ledger.created == ledger.asked == ledger.succeeded + ledger.failed
    assert ledger.failed > 0
    assert ledger.faults > 0
