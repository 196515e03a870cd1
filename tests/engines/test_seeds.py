"""Seeds for the engines' own samplers fit every runner, and no two outputs share one by accident."""

from hypothesis import given
from hypothesis import strategies as st

from twinjet.engines.seeds import output_seed
from twinjet.request import draw_seed


@given(seed=st.integers(0, 2**64 - 1), output_index=st.integers(0, 63))
def test_a_seed_fits_a_signed_64_bit_number_and_is_never_negative(seed: int, output_index: int) -> None:
    assert 0 <= output_seed(seed, output_index) < 2**63


def test_seeds_of_outputs_differ_and_do_not_meet_a_neighbours() -> None:
    starts = (0, 1, 2, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1)
    seeds = [output_seed(seed, i) for seed in starts for i in range(64)]
    assert len(set(seeds)) == len(seeds)


@given(st.integers(0, 2**63 - 1))
def test_output_0_has_the_requests_own_seed_where_it_fits(seed: int) -> None:
    assert output_seed(seed, 0) == seed


def test_drawn_seeds_are_exact_as_doubles() -> None:
    seeds = [draw_seed() for _ in range(1000)]
    assert all(int(float(seed)) == seed for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) > 2**50
