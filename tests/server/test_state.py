"""The server's state machine: exactly once, whatever the network and the workers do."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pavi_scale.errors import NumericalError, WorkerError
from pavi_scale.server.protocol import (
    Assign,
    CompleteRound,
    ExpireWorker,
    FailRound,
    Heartbeat,
    Ignore,
    Ready,
    RoundCancelled,
    RoundStarted,
    TaskDone,
    TaskFailed,
    Tick,
    WorkerFailed,
    WorkerJoined,
    WorkerLeft,
)
from pavi_scale.server.state import ServerState


def feed(server, *events, now=0.0):
    """Instructions of the last event; the invariants hold after each."""
    out = []
    for event in events:
        out = server.handle(event, now)
        server.validate()
    return out


def ready(*names):
    return [event for name in names for event in (WorkerJoined(name), Ready(name, 0))]


class Network:
    """Workers and a network that repeats, reorders, delays and drops messages; workers die and join."""

    def __init__(self, random, faults):
        # `max_losses` is out of the way: here a worker's death has nothing to do with the task it held.
        self.random, self.faults, self.now = random, faults, 0.0
        self.server = ServerState(timeout=10.0, max_losses=10**6)
        self.seq, self.holds, self.bag = {}, {}, []
        self.accepted, self.tokens, self.finished = [], {}, {}
        self.born = 0

    def to_server(self, event):
        out = self.server.handle(event, self.now)
        self.server.validate()
        if isinstance(event, TaskDone) and not any(isinstance(i, Ignore) for i in out):
            self.accepted.append((event.round, event.index))
        for instruction in out:
            if isinstance(instruction, Assign):
                key = (instruction.round, instruction.index)
                holder, token = self.tokens.get(key, (None, 0))
                assert instruction.token > token or (holder, token) == (instruction.worker, instruction.token)
                self.tokens[key] = instruction.worker, instruction.token
                self.bag.append(instruction)
            elif isinstance(instruction, CompleteRound):
                assert instruction.round not in self.finished
                self.finished[instruction.round] = instruction.results
            else:
                assert isinstance(instruction, Ignore | ExpireWorker)

    def deliver(self, message):
        if not isinstance(message, Assign):
            self.to_server(message)
        elif message.worker in self.seq and self.holds[message.worker] is None:
            self.holds[message.worker] = message

    def compute(self, name):
        """The worker answers what it holds and asks for more; both messages may travel in any order."""
        task = self.holds[name]
        if task is not None:
            self.bag.append(TaskDone(name, task.round, task.index, task.token, (task.round, task.index**2)))
            self.holds[name] = None
            self.seq[name] += 1
        self.bag.append(Ready(name, self.seq[name]))

    def join(self):
        self.born += 1
        name = f"w{self.born}"
        self.seq[name], self.holds[name] = 0, None
        self.to_server(WorkerJoined(name))
        self.bag.append(Ready(name, 0))

    def leave(self, silent):
        name = self.random.choice(sorted(self.seq))
        del self.seq[name], self.holds[name]
        if not silent:
            self.bag.append(WorkerLeft(name, "killed"))

    def wait(self, seconds):
        for _ in range(int(seconds)):
            self.now += 1.0
            if not self.seq:
                self.join()
            for name in list(self.seq):
                if name in self.server.workers:
                    self.to_server(Heartbeat(name))
            self.to_server(Tick())
        for name in [name for name in self.seq if name not in self.server.workers]:
            del self.seq[name], self.holds[name]

    def step(self):
        choice = self.random.random()
        if self.faults > 0 and choice < 0.4:
            self.faults -= 1
            fault = self.random.choice(["repeat", "drop", "join", "kill", "silent", "resend"])
            if fault in ("repeat", "drop") and self.bag:
                message = self.random.choice(self.bag)
                if fault == "repeat":
                    self.bag.append(message)
                else:
                    self.bag.remove(message)
            elif fault == "join":
                self.join()
            elif fault in ("kill", "silent") and self.seq:
                self.leave(fault == "silent")
        elif self.bag and choice < 0.8:
            self.deliver(self.bag.pop(self.random.randrange(len(self.bag))))
        elif self.seq and choice < 0.95:
            self.compute(self.random.choice(sorted(self.seq)))
        else:
            self.wait(self.random.choice([1, 12]))


@settings(max_examples=400)
@given(random=st.randoms(use_true_random=False), faults=st.integers(0, 60), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), bound=st.integers(0, 3))
def test_every_task_counts_exactly_once(random, faults, sizes, bound):
    network = Network(random, faults)
    for number, size in enumerate(sizes, 1):
        network.to_server(RoundStarted("numeric", number, size))
        steps = 0
        while number - bound >= 1 and number - bound not in network.finished or number == len(sizes) and len(network.finished) < number:
            network.step()
            steps += 1
            assert steps < 20_000, "the round hangs"
    assert network.finished == {number: tuple((number, i**2) for i in range(size)) for number, size in enumerate(sizes, 1)}
    assert sorted(network.accepted) == [(number, i) for number, size in enumerate(sizes, 1) for i in range(size)]


def test_task_prefers_the_worker_of_its_residue_and_idle_workers_steal():
    server = ServerState()
    feed(server, *ready("a", "b"))
    out = feed(server, RoundStarted("k", 1, 6))
    assert [(i.worker, i.index) for i in out] == [("a", 0), ("b", 1)]
    order = []
    for seq in range(1, 4):  # a answers everything, b is slow
        task = server.workers["a"].lease
        feed(server, TaskDone("a", 1, task.index, task.token, None))
        order += [i.index for i in feed(server, Ready("a", seq))]
    assert order == [2, 4, 5]


def test_late_answer_under_an_old_token_is_dropped():
    server = ServerState(timeout=10.0)
    feed(server, *ready("a", "b"), RoundStarted("k", 1, 1))
    old = server.open[1].leases[0]
    assert old.worker == "a"
    out = feed(server, WorkerLeft("a", "gone"))
    assert [(i.worker, i.index) for i in out] == [("b", 0)]
    assert isinstance(feed(server, TaskDone("a", 1, 0, old.token, "x"))[0], Ignore)
    feed(server, WorkerJoined("a2"))
    assert "stale token" in feed(server, TaskDone("a2", 1, 0, old.token, "x"))[0].reason
    assert feed(server, TaskDone("b", 1, 0, out[0].token, "y")) == [CompleteRound(1, ("y",))]
    assert "over" in feed(server, TaskDone("b", 1, 0, out[0].token, "y"))[0].reason


def test_silent_worker_expires_and_heartbeats_keep_a_lease():
    server = ServerState(timeout=10.0)
    feed(server, *ready("a", "b"), RoundStarted("k", 1, 2), Tick())
    for now in range(1, 15):
        out = feed(server, Heartbeat("a"), Tick(), now=float(now))
    assert out == []
    assert list(server.workers) == ["a"]
    assert server.open[1].queued() == [1]
    assert server.open[1].leases[0].worker == "a"


def test_time_the_driver_slept_does_not_count_against_workers():
    server = ServerState(timeout=10.0)
    feed(server, *ready("a"), RoundStarted("k", 1, 1), Tick())
    assert feed(server, Tick(), now=3600.0) == []
    assert list(server.workers) == ["a"]


def test_a_question_asked_again_gets_the_same_lease():
    server = ServerState()
    feed(server, *ready("a"))
    first = feed(server, RoundStarted("k", 1, 3))
    assert feed(server, Ready("a", 0)) == first
    assert feed(server, Ready("a", 1)) == first
    assert feed(server, Ready("a", 0))[0].reason == "late question"


def test_failure_cancels_the_other_tasks_and_frees_the_server():
    server = ServerState()
    feed(server, *ready("a", "b"))
    a, b = feed(server, RoundStarted("k", 1, 5))
    error = NumericalError("nan")
    assert feed(server, TaskFailed("a", 1, a.index, a.token, error)) == [FailRound(1, error)]
    assert isinstance(feed(server, TaskDone("b", 1, b.index, b.token, None))[0], Ignore)
    assert feed(server, Ready("b", 1)) == []
    assert [i.worker for i in feed(server, RoundStarted("k", 2, 1))] == ["b"]
    feed(server, RoundCancelled())
    assert not server.open


def test_no_worker_left_tells_the_story():
    server = ServerState(timeout=10.0, startup=30.0)
    feed(server, RoundStarted("elbo", 7, 2))
    assert feed(server, Tick(), now=29.0) == []
    (fail,) = feed(server, Tick(), now=31.0)
    assert isinstance(fail, FailRound)
    assert "no worker joined" in str(fail.error)
    feed(server, *ready("a"), RoundStarted("elbo", 8, 2), now=40.0)
    feed(server, WorkerLeft("a", "its connection closed"), now=41.0)
    assert feed(server, Tick(), now=46.0) == []
    assert feed(server, Tick(expected=1), now=52.0) == []
    (fail,) = feed(server, Tick(), now=53.0)
    assert isinstance(fail.error, WorkerError)
    for part in ("task 0 of round 2 ('elbo', state 8)", "leased to a (token 1)", "lost with a (its connection closed)", "0 of 2 tasks"):
        assert part in str(fail.error)


def test_a_task_that_kills_its_workers_fails_the_round():
    server = ServerState(max_losses=3)
    feed(server, RoundStarted("k", 1, 1))
    for n in range(3):
        feed(server, *ready(f"w{n}"))
        out = feed(server, WorkerLeft(f"w{n}", "out of memory"))
    assert "lost with its worker too often" in str(out[0].error)
    assert str(out[0].error).count("out of memory") == 3


def test_a_connection_that_breaks_again_and_again_is_no_death():
    server = ServerState(max_losses=3)
    feed(server, RoundStarted("k", 1, 1))
    for n in range(29):
        (given,) = feed(server, WorkerJoined(f"w#{n}", "process"), Ready(f"w#{n}", 0))
        assert feed(server, WorkerLeft(f"w#{n}", "its connection closed")) == []
    (given,) = feed(server, WorkerJoined("w#29", "process"), Ready("w#29", 0))
    assert feed(server, TaskDone("w#29", 1, 0, given.token, "x")) == [CompleteRound(1, ("x",))]


def test_an_answer_that_breaks_every_connection_fails_the_round():
    server = ServerState(max_losses=3)
    feed(server, RoundStarted("k", 1, 1))
    for n in range(30):
        feed(server, WorkerJoined(f"w#{n}", "process"), Ready(f"w#{n}", 0))
        out = feed(server, WorkerLeft(f"w#{n}", "its connection closed"))
    assert "fewer than 30 broken connections" in str(out[0].error)


def test_only_those_who_come_back_are_taken_off_the_dead():
    server = ServerState(max_losses=3)
    feed(server, RoundStarted("k", 1, 1))
    for name in ("a", "b", "c"):
        feed(server, WorkerJoined(f"{name}#1", name), Ready(f"{name}#1", 0))
        out = feed(server, WorkerLeft(f"{name}#1", "out of memory"))
        if name == "b":
            feed(server, WorkerJoined("b#2", "b"), WorkerLeft("b#2", "goodbye"))
    assert out == []
    feed(server, WorkerJoined("d#1", "d"), Ready("d#1", 0))
    (fail,) = feed(server, WorkerLeft("d#1", "out of memory"))
    assert "too often" in str(fail.error)


def test_failure_with_parked_workers_left_does_not_lose_them():
    server = ServerState(max_losses=1)
    feed(server, *ready("a"), RoundStarted("k", 1, 1), *ready("b"))
    assert isinstance(feed(server, WorkerLeft("a", "killed"))[0], FailRound)
    assert [i.worker for i in feed(server, RoundStarted("k", 2, 1))] == ["b"]


def test_worker_that_cannot_build_fails_this_and_later_rounds():
    server = ServerState()
    error = NumericalError("no")
    feed(server, WorkerJoined("a"), WorkerFailed("a", error))
    assert feed(server, RoundStarted("k", 1, 1)) == [FailRound(1, error)]


def test_workers_that_die_before_they_ask_do_not_keep_a_round_waiting_for_ever():
    server = ServerState(timeout=10.0)
    failed = []
    feed(server, RoundStarted("k", 1, 1))
    for n in range(100):  # each is gone before the patience of the one before has ended
        out = [*server.handle(WorkerJoined(f"w{n}", process=f"p{n}"), float(n)), *server.handle(WorkerLeft(f"w{n}", "its connection closed"), float(n))]
        server.validate()
        failed += [i for i in out if isinstance(i, FailRound)]
    assert len(failed) == 1
    assert "leave before they ask" in failed[0].error.what
    assert failed[0].error.exit_code == 75


def test_a_worker_at_work_bears_with_others_that_die_before_they_ask():
    server = ServerState(timeout=1000.0)
    feed(server, *ready("good"), RoundStarted("k", 1, 1))
    for n in range(100):
        out = feed(server, WorkerJoined(f"w{n}", process=f"p{n}"), WorkerLeft(f"w{n}", "its connection closed"), now=float(n))
        assert not any(isinstance(i, FailRound) for i in out)
    assert feed(server, TaskDone("good", 1, 0, 1, "r"), now=100.0) == [CompleteRound(1, ("r",))]


def test_one_worker_that_loses_its_connection_again_and_again_before_it_asks_is_no_death():
    server = ServerState(timeout=1000.0)
    feed(server, RoundStarted("k", 1, 1))
    for n in range(100):
        out = feed(server, WorkerJoined(f"w{n}", process="the same"), WorkerLeft(f"w{n}", "its connection closed"), now=float(n))
        assert not any(isinstance(i, FailRound) for i in out)


def test_an_empty_round_is_complete():
    assert feed(ServerState(), RoundStarted("k", 1, 0)) == [CompleteRound(1, ())]


def test_a_worker_that_would_wait_begins_with_the_next_round():
    server = ServerState()
    feed(server, *ready("a", "b"), RoundStarted("k", 1, 2), RoundStarted("k", 2, 2))
    a, b = (server.workers[name].lease for name in "ab")
    assert [(lease.round, lease.index) for lease in (a, b)] == [(1, 0), (1, 1)]
    assert feed(server, TaskDone("b", 1, 1, b.token, "b1")) == []
    (later,) = feed(server, Ready("b", 1))  # a is slow: b does not wait for it
    assert (later.round, later.index) == (2, 1)
    assert feed(server, WorkerLeft("a", "gone")) == []
    assert feed(server, TaskDone("b", 2, 1, later.token, "b2")) == []
    (again,) = feed(server, Ready("b", 2))  # the oldest round first
    assert (again.round, again.index) == (1, 0)
    assert feed(server, TaskDone("b", 1, 0, again.token, "b3")) == [CompleteRound(1, ("b3", "b1"))]


def test_a_later_round_may_be_complete_first():
    server = ServerState()
    feed(server, *ready("a", "b"), RoundStarted("k", 1, 1), RoundStarted("k", 2, 1))
    b = server.workers["b"].lease
    assert b.round == 2
    assert feed(server, TaskDone("b", 2, 0, b.token, "y")) == [CompleteRound(2, ("y",))]
    assert list(server.open) == [1]
    assert isinstance(feed(server, TaskDone("b", 2, 0, b.token, "y"))[0], Ignore)


def test_a_failure_ends_all_open_rounds():
    server = ServerState()
    feed(server, *ready("a", "b"), RoundStarted("k", 1, 1), RoundStarted("k", 2, 1))
    lease, error = server.workers["b"].lease, NumericalError("nan")
    assert feed(server, TaskFailed("b", 2, 0, lease.token, error)) == [FailRound(1, error), FailRound(2, error)]
    assert isinstance(feed(server, TaskDone("a", 1, 0, 1, "x"))[0], Ignore)


def test_repeated_and_unknown_workers_are_ignored():
    server = ServerState()
    feed(server, WorkerJoined("a"))
    assert feed(server, WorkerJoined("a"))[0].reason == "joined already"
    assert "unknown worker" in feed(server, Heartbeat("b"))[0].reason
