"""The in-process engine, and what makes two engines agree bit for bit."""

import sys
import weakref
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from threadpoolctl import threadpool_info, threadpool_limits

from pavi_scale.errors import CohortError, NumericalError, WorkerError
from pavi_scale.server.answer import aligned, blas_threads, taking_turns, torch_threads
from pavi_scale.server.local import LocalEngine


def test_answers_come_in_task_order(make_spec, state, tasks):
    with LocalEngine(make_spec()) as engine:
        assert engine.parallelism == 1
        results = engine.round("numeric", state, tasks)
        assert engine.round("numeric", state, []) == []
    for task, result in zip(tasks, results, strict=True):
        noise = np.random.default_rng(task["seed"]).standard_normal(state["w"].shape)
        np.testing.assert_allclose(result["product"], state["w"] @ noise.T, rtol=1e-12)
        np.testing.assert_array_equal(result["units"], 2 * task["units"])


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_stream_hands_answers_over_one_by_one(make_spec, state, tasks, lanes):
    with LocalEngine(make_spec(), lanes) as engine:
        expected, seen = engine.round("numeric", state, tasks), []
        for answer, wanted in zip(engine.stream("numeric", state, tasks), expected, strict=True):
            assert {k: a.tobytes() for k, a in answer.items()} == {k: a.tobytes() for k, a in wanted.items()}
            seen.append(weakref.ref(answer["product"]))
            del answer
            assert sum(each() is not None for each in seen) <= 1  # nobody keeps what was handed over
        with pytest.raises(WorkerError, match="deliberate"):
            list(engine.stream("fail", state, [{}, {"bad": True}]))
    with pytest.raises(WorkerError, match="closed"):
        list(engine.stream("numeric", state, []))


def test_errors(make_spec, state):
    engine = LocalEngine(make_spec())
    with pytest.raises(NumericalError, match="alpha"):
        engine.round("refuse", state, [{"bad": True}])
    with pytest.raises(WorkerError, match="ValueError: deliberate") as caught:
        engine.round("fail", state, [{}, {"bad": True}])
    assert "task 1" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)
    engine.close()
    engine.close()
    with pytest.raises(WorkerError, match="closed"):
        engine.round("numeric", state, [])
    with pytest.raises(CohortError, match="cannot be read"):
        LocalEngine(make_spec(broken=True))


def test_answer_must_be_numeric_arrays():
    class Odd:
        def build(self):
            return self

        def compute(self, kind, state, task):
            return {"bare": [1.0], "list": {"a": [1.0]}, "object": {"a": np.asarray([object()])}}[kind]

    engine = LocalEngine(Odd())
    with pytest.raises(WorkerError, match="dtype object"):
        engine.round("object", {}, [{}])
    with pytest.raises(WorkerError, match="named arrays"):
        engine.round("bare", {}, [{}])
    assert engine.round("list", {}, [{}])[0]["a"].shape == (1,)


def test_thread_count_is_the_specs_and_comes_back(make_spec):
    with torch_threads(2):
        with LocalEngine(make_spec(threads=1)) as engine:
            assert engine.round("who", {}, [{}])[0]["threads"] == 1
        assert torch.get_num_threads() == 2


def test_lanes_have_the_specs_thread_count_whoever_set_one_last(make_spec, state):
    with torch_threads(2), LocalEngine(make_spec(threads=1), 2) as engine:
        asked = engine.submit("refuse", state, [{}] * 8)  # nothing of torch
        with torch_threads(1):
            asked.result()
        assert {int(r["threads"]) for r in engine.round("who", {}, [{"sleep": 0.05}] * 4)} == {1}


def test_a_round_of_a_closed_engine_is_an_error_of_the_package(make_spec, state):
    engine = LocalEngine(make_spec(), 2)
    asked = engine.submit("who", state, [{"sleep": 0.2}] * 6)
    engine.close()
    with pytest.raises(WorkerError, match="closed during a round"):
        asked.result()


@given(hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, min_side=0)), st.integers(0, 3))
def test_aligned_keeps_values(array, how):
    given_ = [array, array.T, array[..., None][..., ::-1], np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:]][how]
    out = aligned(given_)
    assert out.shape == given_.shape
    assert out.dtype == given_.dtype
    assert out.flags.c_contiguous
    assert out.flags.writeable
    assert out.size == 0 or out.ctypes.data % 64 == 0
    assert out.tobytes() == given_.tobytes()
    assert aligned(out) is out or out.size == 0


def test_threads_take_turns_while_something_is_computed_and_no_longer():
    before = sys.getswitchinterval()
    with taking_turns():
        assert sys.getswitchinterval() < before / 10
    with pytest.raises(KeyError), taking_turns():
        raise KeyError
    assert sys.getswitchinterval() == before
    one, two = ExitStack(), ExitStack()  # two fits of one process, of which the first ends first
    one.enter_context(taking_turns())
    two.enter_context(taking_turns())
    one.close()
    assert sys.getswitchinterval() < before / 10
    two.close()
    assert sys.getswitchinterval() == before


def test_threads_of_linear_algebra_are_limited_until_the_last_of_several_fits_ends():
    def threads():
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        one, two = ExitStack(), ExitStack()
        one.enter_context(blas_threads(1))
        two.enter_context(blas_threads(1))
        one.close()
        assert threads() == {1}
        two.close()
        assert threads() == {2}
