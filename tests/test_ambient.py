"""Threads of one process share torch's generator and default dtype: none of them draws another's numbers."""

import threading

import torch

from pavi_scale.ambient import precision, seeded


def beside(work):
    """Run `work` in another thread until it ends or waits; the thread."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(0.2)
    return thread


def test_nobody_seeds_the_generator_of_another_thread():
    before = torch.get_rng_state()
    expected = torch.randn(4, generator=torch.Generator().manual_seed(1)), torch.randn(4, generator=torch.Generator().manual_seed(2))
    other = []

    def draw():
        with seeded(2):
            other.append(torch.randn(4))

    with seeded(1):
        thread = beside(draw)
        found = torch.randn(4)
    thread.join(10)
    assert torch.equal(found, expected[0])
    assert torch.equal(other[0], expected[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_seeded_anew_within():
    with seeded(1):
        first = torch.randn(2)
        with seeded(1):
            assert torch.equal(torch.randn(2), first)
        assert not torch.equal(torch.randn(2), first)


def test_who_wants_another_dtype_waits():
    found = []

    def look():
        with precision(torch.float32):
            found.append(torch.tensor(0.1).dtype)

    with precision(torch.float64):
        thread = beside(look)
        assert found == []
        assert torch.tensor(0.1).dtype == torch.float64
    thread.join(10)
    assert found == [torch.float32]
