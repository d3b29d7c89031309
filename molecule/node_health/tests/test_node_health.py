"""What the probes say when the node itself asks them."""

import json

NODE = "molecule-gateway-0"
HEALTH = "python3 -B /usr/local/lib/gpuyard/health"


def ask(host, *checks):
    done = host.run(f"{HEALTH} %s", json.dumps(checks))
    assert done.stdout, done.stderr
    return done.rc, json.loads(done.stdout)


def test_a_service_that_runs_is_healthy(host):
    code, verdict = ask(host, {"check": "check_service_active", "unit": "ssh.service"})
    assert (code, verdict["state"]) == (0, "Healthy"), verdict


def test_one_check_that_fails_makes_the_node_unhealthy_and_says_why(host):
    healthy = {"check": "check_service_active", "unit": "ssh.service"}
    code, verdict = ask(host, healthy, {"check": "check_service_active", "unit": "none.service"})
    assert (code, verdict["state"]) == (1, "Unhealthy")
    assert [check["state"] for check in verdict["checks"]] == ["Healthy", "Unhealthy"]
    assert "none.service is not there" in verdict["checks"][1]["reason"]
