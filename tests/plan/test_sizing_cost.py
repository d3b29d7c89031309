"""Money: bills add up, tokens served are not tokens that could be, and a break-even is where the lines cross."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard.catalog.market import ApiPrice, load_market
from gpuyard.plan.sizing.cost import Line, bill, break_even, dip, served, shares
from gpuyard.plan.sizing.figures import Figure, Ground

MARKET = load_market()
ROWS = {row.name: row for row in MARKET.assumptions}
AMOUNTS = st.floats(0, 1e5)


def ground(**stated: float) -> Ground:
    return Ground(MARKET, stated, ROWS)


def dollars(value: float) -> Figure:
    return Figure(value=value, unit="USD/h", how="stated", verified=True)


def api(name: str) -> ApiPrice:
    return next(row for row in MARKET.api_prices if f"{row.provider}/{row.model}" == name)


@pytest.mark.parametrize(("each", "hour", "month", "year"), [(3, 30, 21_900, 262_800), (4, 40, 29_200, 350_400)])
def test_ten_a100_of_40_gb_at_three_to_four_dollars_an_hour(
    each: float, hour: float, month: float, year: float
) -> None:
    told = bill([Line(what="ten A100-40", usd_per_hour=dollars(10 * each))], ground())
    assert (told.usd_per_hour.value, told.usd_per_month.value, told.usd_per_year.value) == (hour, month, year)
    assert told.usd_per_month.verified


@pytest.mark.parametrize(("each", "mtok"), [(3, 83_429), (4, 111_238)])
def test_ten_a100_of_40_gb_against_an_api(each: float, mtok: float) -> None:
    """gpt-4o-mini at 0.15 and 0.60 USD, three prompt tokens for each of the answer: 0.2625 USD a million."""
    base = ground(input_tokens=750, output_tokens=250)
    told = break_even(base, dollars(10 * each), (2000, 2000, 2000), 0.4, api("openai/gpt-4o-mini"))
    assert told.usd_per_mtok.value == pytest.approx(0.2625)
    assert told.mtok_per_month.value == pytest.approx(mtok, abs=1)
    # 2,000 answer tokens a second are 8,000 with their prompts, 21,024 Mtok a month: it never pays.
    assert told.share_of_capacity.value == pytest.approx(mtok / 21_024, rel=1e-4) and told.pays is False


def test_at_the_break_even_the_fleet_and_the_api_cost_the_same() -> None:
    base = ground(utilisation=0.5)
    capacity = Figure(value=10_000, unit="tokens/s", how="measured", verified=True)
    money = served(base, usd_per_hour=dollars(100), capacity=capacity, utilisation=0.5, apis=[api("openai/gpt-4o")])
    (even,) = money.break_even
    assert even.mtok_per_month.value * even.usd_per_mtok.value == pytest.approx(100 * 730)
    again = served(
        base, usd_per_hour=dollars(100), capacity=capacity, utilisation=even.share_of_capacity.value, apis=[]
    )
    assert again.usd_per_mtok.value == pytest.approx(even.usd_per_mtok.value)
    assert again.mtok_per_month.value == pytest.approx(even.mtok_per_month.value)


def test_what_is_known_as_an_interval_stays_one_to_the_verdict() -> None:
    base = ground()
    prices = [api("openai/gpt-4o-mini")]
    wide = Figure(value=20_000, low=5_000, high=80_000, unit="tokens/s", how="reckoned", verified=False)
    money = served(base, usd_per_hour=dollars(30), capacity=wide, utilisation=0.4, apis=prices)
    assert money.usd_per_mtok.low and money.usd_per_mtok.high
    assert money.usd_per_mtok.low < money.usd_per_mtok.value < money.usd_per_mtok.high
    assert not money.usd_per_mtok.verified and money.break_even[0].pays is None


def test_answers_alone_carry_the_price_of_their_prompts() -> None:
    base = ground(input_tokens=300, output_tokens=100)
    capacity = Figure(value=1000, unit="tokens/s", how="measured", verified=True)
    money = served(base, usd_per_hour=dollars(36), capacity=capacity, utilisation=1.0, apis=[])
    assert money.usd_per_mtok_answered.value == pytest.approx(10)  # 36 USD for 3.6 Mtok of answers
    assert money.usd_per_mtok.value == pytest.approx(2.5)


@given(st.lists(AMOUNTS, max_size=12))
def test_a_bill_is_the_sum_of_its_lines(amounts: list[float]) -> None:
    told = bill([Line(what=str(index), usd_per_hour=dollars(value)) for index, value in enumerate(amounts)], ground())
    assert told.usd_per_hour.value == pytest.approx(sum(amounts))
    assert told.usd_per_year.value == pytest.approx(12 * told.usd_per_month.value)


@given(
    st.integers(1, 500),
    st.integers(0, 499),
    st.integers(1, 8),
    st.integers(1, 8),
    st.floats(0.001, 1),
    st.floats(0, 1000),
    st.floats(0, 2000),
)
def test_what_is_paid_is_idle_spare_out_without_a_model_or_served(
    nodes: int, spare: int, used: int, gpus: int, utilisation: float, upgrades: float, minutes: float
) -> None:
    base = ground(upgrades_per_year=upgrades, minutes_per_upgrade=minutes)
    told = shares(
        base, nodes=nodes, spare=min(spare, nodes - 1), used=min(used, gpus), gpus=gpus, utilisation=utilisation
    )
    parts = [told.no_model, told.spare, told.upgrades, told.idle, told.served]
    assert sum(part.value for part in parts) == pytest.approx(1)
    assert all(part.value >= -1e-12 for part in parts)
    assert told.served.value <= utilisation * (1 + 1e-9)


@given(st.floats(0.01, 0.99), st.floats(1.01, 10), st.floats(0.1, 1000), st.floats(1, 1e6))
def test_more_use_never_costs_more_a_token_and_a_higher_bill_never_less(
    utilisation: float, factor: float, hourly: float, rate: float
) -> None:
    capacity = Figure(value=rate, unit="tokens/s", how="measured", verified=True)

    def price(hour: float, use: float) -> float:
        return served(
            ground(), usd_per_hour=dollars(hour), capacity=capacity, utilisation=use, apis=[]
        ).usd_per_mtok.value

    assert price(hourly, min(1.0, utilisation * factor)) <= price(hourly, utilisation)
    assert price(hourly * factor, utilisation) > price(hourly, utilisation)


def test_twelve_upgrades_of_ten_minutes_are_two_hours_a_year() -> None:
    assert dip(ground(upgrades_per_year=12, minutes_per_upgrade=10)) == pytest.approx(2 / 8760)
