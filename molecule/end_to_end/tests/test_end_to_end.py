"""What a user of the gateway meets: answers, streams, and a refusal for everything else."""

import http.client
import json
import os
import socket
from pathlib import Path

import pytest

NODE = "molecule-gateway-0"
MODEL = "smollm2-135m-instruct"
PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
PORT = 8081
KEY = (PROJECT / ".gpuyard/secrets/molecule/api_key").read_text().strip()
QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of France?"}]}


def ask(method, path, body=None, key=KEY, headers=()):
    """One request through the gateway: (status, text)."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    headers = {"Content-Type": "application/json", **dict(headers)}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    connection.request(method, path, json.dumps(body) if body is not None else None, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def engine_requests(host):
    """How many sessions HAProxy has opened to the engines so far, health checks aside."""
    rows = host.check_output("echo 'show stat' | socat - /run/haproxy/admin.sock").lstrip("# ").splitlines()
    names = rows[0].split(",")
    stats = [dict(zip(names, row.split(","), strict=False)) for row in rows[1:] if row]
    return sum(int(s["stot"] or 0) for s in stats if s["svname"] not in ("FRONTEND", "BACKEND"))


def test_the_model_answers_through_the_gateway():
    status, text = ask("POST", "/v1/chat/completions", {**QUESTION, "temperature": 0, "max_tokens": 24})
    assert status == 200, text
    assert "Paris" in json.loads(text)["choices"][0]["message"]["content"]


def test_a_stream_arrives_in_pieces_and_ends_with_done():
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    body = json.dumps({**QUESTION, "temperature": 0, "max_tokens": 16, "stream": True})
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    response = connection.getresponse()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = [line.removeprefix(b"data: ") for line in response.read().split(b"\n\n") if line.startswith(b"data: ")]
    assert events[-1].strip() == b"[DONE]"
    assert len(events) > 4


def test_the_models_route_lists_the_model():
    status, text = ask("GET", "/v1/models")
    assert status == 200, text
    assert [model["id"] for model in json.loads(text)["data"]] == [MODEL]


def test_no_key_and_a_wrong_key_are_the_same_401(host):
    before = engine_requests(host)
    answers = {ask("POST", "/v1/chat/completions", QUESTION, key=key) for key in (None, "wrong", KEY + "x", "")}
    assert len(answers) == 1
    assert answers.pop()[0] == 401
    assert engine_requests(host) == before


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("GET", "/health"),
        ("GET", "/docs"),
        ("POST", "/tokenize"),
        ("POST", "/invocations"),
        ("POST", "/collective_rpc"),
        ("POST", "/pause"),
        ("DELETE", "/v1/models"),
        ("GET", "/v1/chat/completions"),
        ("POST", "//v1/chat/completions"),
        ("POST", "/V1/chat/completions"),
        ("POST", "/v1/%63hat/completions"),
        ("POST", "/v1/../v1/chat/completions"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1/load_lora_adapter"),
    ],
)
def test_a_route_outside_the_list_sends_no_byte_to_the_engine(host, method, path):
    before = engine_requests(host)
    status, _ = ask(method, path, {} if method == "POST" else None)
    assert status in (404, 405)
    assert engine_requests(host) == before


def test_a_body_of_200_megabytes_is_refused_before_it_is_read(host):
    before = engine_requests(host)
    with socket.create_connection(("127.0.0.1", PORT), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer " + KEY.encode() + b"\r\nContent-Length: 209715200\r\n\r\n" + b"x" * 65536
        )
        assert b" 413 " in connection.recv(200)
    assert engine_requests(host) == before


def test_two_lengths_in_one_request_reach_nobody(host):
    before = engine_requests(host)
    with socket.create_connection(("127.0.0.1", PORT), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer "
            + KEY.encode()
            + b"\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"
        )
        assert b" 400 " in connection.recv(200)
    assert engine_requests(host) == before


def test_the_gateway_keeps_no_user_key_in_clear(host):
    assert host.run(f"grep -rF {KEY[:20]} /etc/haproxy /var/lib/haproxy /run/haproxy").rc == 1
    assert KEY not in host.check_output("journalctl --no-pager -o cat")


def test_a_killed_gateway_is_back_by_systemd_alone(host):
    before = host.check_output("systemctl show haproxy -p MainPID --value")
    host.check_output(f"kill -9 {before}")
    host.check_output(
        'timeout 30 sh -c \'until [ "$(systemctl show haproxy -p MainPID --value)" -gt 0 ]'
        f' && [ "$(systemctl show haproxy -p MainPID --value)" != {before} ]'
        " && systemctl is-active -q haproxy; do sleep 0.2; done'"
    )
    status, _ = ask("GET", "/v1/models")
    assert status in (200, 503), "the gateway listens again; its engine checks may still be running"


def test_a_drained_server_stays_drained_over_a_reload_and_a_restart(host):
    socat = "socat - /run/haproxy/admin.sock"
    server = f"model_{MODEL}/molecule-chat-0"
    state = f"echo 'show servers state model_{MODEL}' | {socat}"

    def admin_state():
        rows = [row.split() for row in host.check_output(state).splitlines() if "molecule-chat-0" in row]
        return int(rows[0][6])  # srv_admin_state: 0x08 is a forced drain

    host.check_output(f"echo 'set server {server} state drain' | {socat}")
    try:
        assert admin_state() & 0x08
        host.check_output("systemctl reload haproxy")
        assert admin_state() & 0x08
        host.check_output("systemctl restart haproxy")
        assert admin_state() & 0x08
    finally:
        host.check_output(f"echo 'set server {server} state ready' | {socat}")
        host.check_output("systemctl reload haproxy")
    assert not admin_state() & 0x08
