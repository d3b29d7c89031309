"""How the gateway sees a node that was out and is back."""

import json

NODE = "molecule-gateway-0"
SERVERS = "python3 /usr/local/lib/gpuyard/gateway_state.py servers"


def test_the_node_gets_requests_again(host):
    servers = json.loads(host.check_output(SERVERS))
    assert [(server["server"], server["status"]) for server in servers] == [("molecule-chat-0", "UP")]


def test_that_it_does_is_on_the_disk_too(host):
    rows = host.check_output("cat /var/lib/haproxy/server-state").splitlines()
    columns = rows[1].lstrip("# ").split()
    states = [dict(zip(columns, row.split(), strict=False))["srv_admin_state"] for row in rows[2:]]
    assert states == ["0"]
