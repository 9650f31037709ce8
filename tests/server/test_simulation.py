"""The simulated cluster: where nothing is scarce it scales as arithmetic says, and what is made scarce is what it names."""

import pytest

from pavi_scale.server.simulation import Costs, Fleet, Simulation, simulate

FREE = Costs(tasks=240, task_seconds=0.2, state_bytes=0, answer_bytes=0, exchange_seconds=0, byte_seconds=0, reduce_seconds=0, spread=0.0)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_nothing_scarce_is_arithmetic(workers):
    found = simulate(FREE, Fleet(workers, gigabits=1e6), rounds=3)
    assert found.round_seconds == pytest.approx(240 * 0.2 / workers, rel=0.01)
    assert found.efficiency == pytest.approx(1.0, abs=0.01)


def test_tasks_of_different_length():
    # Nobody can help with the longest task; one worker does all of them.
    costs = Costs(4, 1.0, 0, 0, 0, 0, 0, 0.0, lengths=(2.5, 0.5, 0.5, 0.5))
    assert simulate(costs, Fleet(1, 1e6), rounds=3).round_seconds == pytest.approx(4.0, rel=0.01)
    assert simulate(costs, Fleet(4, 1e6), rounds=3).round_seconds == pytest.approx(2.5, rel=0.01)


@pytest.mark.parametrize(
    ("costs", "fleet", "name", "seconds"),
    [
        (Costs(1000, 1e-4, 0, 0, exchange_seconds=2e-3, byte_seconds=0, reduce_seconds=0), Fleet(16, 1e6), "event loop", 2.0),
        (Costs(64, 1e-3, 1e8, 0, 1e-6, 0, 0), Fleet(64, 1.0), "link out", 64 * 0.8),
        (Costs(64, 1e-3, 0, 1e8, 1e-6, 0, 0), Fleet(8, 1.0), "link in", 64 * 0.8),
        (Costs(100, 1e-3, 0, 0, 1e-6, 0, reduce_seconds=0.05), Fleet(50, 1e3), "reduction", 5.0),
    ],
)
def test_what_is_scarce_sets_the_pace(costs, fleet, name, seconds):
    found = simulate(costs, fleet, rounds=4)
    assert found.saturated == name
    assert 0.7 * seconds < found.round_seconds < 1.3 * seconds


def test_stragglers_cost_no_more_than_their_speed():
    fair, slow = (simulate(FREE, Fleet(8, 1e6, stragglers=share, slowness=4.0), rounds=3) for share in (0.0, 0.25))
    # Two of eight workers at a quarter of the speed: 6.5 workers' worth, and at most one slow task at the end.
    assert fair.round_seconds * 8 / 6.5 < slow.round_seconds < fair.round_seconds * 8 / 6.5 + 0.8 + 0.2


STEP = Costs(tasks=1, task_seconds=0.1, state_bytes=0, answer_bytes=0, exchange_seconds=0, byte_seconds=0, reduce_seconds=0, spread=0.0)


@pytest.mark.parametrize(("workers", "staleness", "together"), [(8, 0, 1), (8, 3, 4), (8, 7, 8), (8, 20, 8), (3, 7, 3)])
def test_as_many_steps_at_a_time_as_staleness_allows(workers, staleness, together):
    found = simulate(STEP, Fleet(workers, 1e6), rounds=400, staleness=staleness)
    assert found.round_seconds == pytest.approx(0.1 / together, rel=0.05)


def test_staleness_bears_a_straggler():
    # One of four workers needs ten times as long. Oldest first: the others go on until so many steps wait for its one.
    kind = Fleet(4, 1e6, stragglers=0.25, slowness=10.0)
    tight, loose = (simulate(STEP, kind, rounds=600, staleness=s).round_seconds for s in (3, 40))
    assert loose == pytest.approx(0.1 / 3.1, rel=0.1)
    assert tight > 2 * loose


def test_preemptions_lose_tasks_and_no_answers():
    simulation = Simulation(FREE, Fleet(6, 1e6, preemptions=20.0, absence=5.0), rounds=10, seed=3)
    found = simulation.run()
    assert found.lost > 5
    assert simulation.meter.tasks == 10 * FREE.tasks
    assert found.efficiency < 0.9


def test_the_same_seed_gives_the_same_cluster():
    fleet = Fleet(5, stragglers=0.2, preemptions=10.0)
    assert simulate(Costs(50, 0.5), fleet, 3, seed=1) == simulate(Costs(50, 0.5), fleet, 3, seed=1)
    assert simulate(Costs(50, 0.5), fleet, 3, seed=1) != simulate(Costs(50, 0.5), fleet, 3, seed=2)
