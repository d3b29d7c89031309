"""Each of the three fleets, previewed on an empty account and brought up."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.emulated_aws.bill import bill
from tests.emulated_aws.conftest import BroughtUp
from tests.emulated_aws.fleet import FLEETS
from tests.emulated_aws.readback import Readback, astray
from tools.aws_previews import PREVIEWS

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", FLEETS)
def test_the_preview_is_the_one_that_was_reviewed(brought_up: BroughtUp, name: str):
    _, preview = brought_up(name)
    assert preview == (PREVIEWS / f"{name}.yaml").read_text(), "if that is meant: make aws-previews"


@pytest.mark.parametrize("name", FLEETS)
def test_the_bill_of_the_plan_is_the_sum_over_what_was_created(brought_up: BroughtUp, name: str):
    fleet, _ = brought_up(name)
    told = subprocess.run(
        ["gpuyard", "plan", str(fleet.project / f"fleets/{name}.yaml"), "--json"], capture_output=True, check=False
    )
    plan = {line["what"]: line["usd_per_hour"]["value"] for line in json.loads(told.stdout)["bill"]["lines"]}
    plan.pop("staff")  # people are no part of an account
    assert bill(fleet) == pytest.approx(plan, rel=1e-5)  # the plan tells six digits
    assert len(plan) >= 7


@pytest.mark.parametrize("name", [name for name in FLEETS if name != "aws-p5en"])
def test_what_the_account_holds_is_what_ec2_publishes(brought_up: BroughtUp, name: str):
    fleet, _ = brought_up(name)
    readback = Readback(fleet)
    assert [*readback.mismatches(), *astray(fleet)] == []
    assert readback.machines == 10
