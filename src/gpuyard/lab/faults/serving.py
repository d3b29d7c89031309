"""Faults of engines. Those of the simulated engine go through its control file; the rest is done to any engine."""

from __future__ import annotations

import json
import shlex

from gpuyard.lab.faults.model import Fault, Injection, OnNode, Parameter, Probe, Step
from gpuyard.lab.faults.words import engine

UNITS = "systemctl list-units --plain --no-legend 'vllm@*.service' | awk '{print $1}'"
RESTART = OnNode(
    f'[ -e "$keep/units" ] || {UNITS} >"$keep/units"\nxargs -r systemctl restart --no-block <"$keep/units"',
    'if [ -e "$keep/units" ]; then\n'
    '  xargs -r systemctl reset-failed <"$keep/units" 2>/dev/null || true\n'
    '  xargs -r systemctl restart --no-block <"$keep/units"\nfi',
)
ONE = Parameter("unit", "which; without, the first engine", "", like=r"[A-Za-z0-9@:._-]*")


def told(key: str, value: object) -> Probe:
    """What the engine reads at every request."""
    question = 'import json, sys; told = json.load(open("/var/lib/gpuyard-lab/engine.json")); '
    question += "sys.exit(told.get(sys.argv[1]) != json.loads(sys.argv[2]))"
    return Probe(f"python3 -c {shlex.quote(question)} {key} {shlex.quote(json.dumps(value))} 2>/dev/null")


# One request as any client of this machine would make it; the key goes in by a pipe, never by an argument.
ASK = f"""\
unit=$({UNITS} | head -n1) && [ -n "$unit" ] || exit 1
model=${{unit#vllm@}} model=${{model%.service}}
port=$(systemctl show -p Environment --value "$unit" | tr ' ' '\\n' | sed -n 's/^GPUYARD_PORT=//p')
ask() {{
  {{ printf 'header = "Authorization: Bearer %s"\\n' "$(cat /etc/vllm/credentials/$model.key 2>/dev/null)"; }} |
    curl -sf -m 2 -K - -H 'Content-Type: application/json' "http://127.0.0.1:$port$1" ${{2:+-d "$2"}}
}}"""


def exits(injection: Injection) -> tuple[Step, ...]:
    code, message = injection.whole("code"), injection["message"]
    # Mended from the last to the first: the engines start again when they are told nothing any more.
    return (RESTART_AFTER, engine(injection, {"exit_at_start": {"code": code, "message": message}}), RESTART_BEFORE)


RESTART_AFTER, RESTART_BEFORE = OnNode("", RESTART.undo), OnNode(RESTART.do)


def cuda(injection: Injection) -> tuple[Step, ...]:
    said = {
        "803": "Error 803: system has unsupported display driver / cuda driver combination",
        "804": "Error 804: forward compatibility was attempted on non supported HW",
    }[injection["error"]]
    found = {"exit_at_start": {"code": 1, "message": f"RuntimeError: CUDA driver initialization failed: {said}"}}
    return (RESTART_AFTER, engine(injection, found), RESTART_BEFORE)


def chosen_unit(injection: Injection) -> str:
    return f'unit={injection.quoted("unit")}\n[ -n "$unit" ] || unit=$({UNITS} | head -n1)\n'


def stopped(injection: Injection) -> tuple[Step, ...]:
    # The real engine's core is a process of its own; where there is none, all of the engine stands still.
    pids = (
        'group=/sys/fs/cgroup$(systemctl show -p ControlGroup --value "$unit")/cgroup.procs\n'
        'pids=$(for pid in $(cat "$group"); do grep -ql EngineCore /proc/$pid/comm /proc/$pid/cmdline 2>/dev/null '
        "&& echo $pid; done || true)\n"
        '[ -n "$pids" ] || pids=$(cat "$group")\n'
    )
    return (
        OnNode(
            f'{chosen_unit(injection)}{pids}echo $pids >"$keep/pids"\nkill -STOP $pids',
            '[ ! -e "$keep/pids" ] || kill -CONT $(cat "$keep/pids") 2>/dev/null || true',
        ),
    )


def devices_gone(injection: Injection) -> tuple[Step, ...]:
    drop = '/run/systemd/system/"$unit".d'
    return (
        OnNode(
            f'{chosen_unit(injection)}echo "$unit" >"$keep/unit"\nmkdir -p {drop}\n'
            f"printf '[Service]\\nPrivateDevices=no\\nDeviceAllow=\\nDevicePolicy=strict\\n' "
            f">{drop}/zz-gpuyard-lab-fault.conf\nsystemctl daemon-reload",
            'if [ -e "$keep/unit" ]; then\n'
            f'  unit=$(cat "$keep/unit")\n  rm -f {drop}/zz-gpuyard-lab-fault.conf\n'
            f"  [ ! -d {drop} ] || rmdir --ignore-fail-on-non-empty {drop}\n  systemctl daemon-reload\nfi",
        ),
    )


FAULTS = (
    Fault(
        "engine-hangs",
        "the engine generates nothing any more, and /health still says 200",
        "vllm-project/vllm#39863; Fastllm-proxy#19 (85 minutes in rotation)",
        ("F33",),
        lambda injection: (engine(injection, {"hang": True}),),
        lambda _: Probe(
            f"{ASK}\nask /health >/dev/null && ! ask /v1/completions "
            '"{\\"model\\": \\"$model\\", \\"prompt\\": \\"Hi\\", \\"max_tokens\\": 1}" >/dev/null'
        ),
        needs=("simulated engine",),
    ),
    Fault(
        "engine-slow",
        "everything takes longer, and nothing says so: a driver that is 20 % slower",
        "modal.com/blog/gpu-health (H100s that lose half their FLOP/s)",
        ("F24",),
        lambda injection: (engine(injection, {"latency_factor": injection.number("factor")}),),
        lambda injection: told("latency_factor", injection.number("factor")),
        (Parameter("factor", "how many times longer", "1.25", between=(1.0, 1000.0)),),
        needs=("simulated engine",),
    ),
    Fault(
        "engine-wrong-tokens",
        "a share of the tokens is wrong, without an error",
        "arXiv 2605.04213; vllm-project/vllm#10713, #22881",
        ("F25", "F26"),
        lambda injection: (engine(injection, {"wrong_token_rate": injection.number("rate")}),),
        lambda injection: told("wrong_token_rate", injection.number("rate")),
        (Parameter("rate", "how large", "0.01", between=(0.0, 1.0)),),
        needs=("simulated engine",),
    ),
    Fault(
        "engine-poisoned",
        "one prompt ends the engine, each time it is asked",
        "CVE-2026-44222 (one request ends the engine)",
        ("F35",),
        lambda injection: (engine(injection, {"crash_on_prompt": injection["prompt"]}),),
        lambda injection: told("crash_on_prompt", injection["prompt"]),
        (Parameter("prompt", "the words that do it", "abracadabra"),),
        needs=("simulated engine",),
    ),
    Fault(
        "engine-crash-loop",
        "the engine ends as soon as it is started, again and again",
        "NVIDIA/gpu-operator#2166",
        ("F34",),
        exits,
        lambda _: Probe(
            "test -n \"$(systemctl list-units --plain --no-legend --state=failed,activating 'vllm@*')\" && "
            + "grep -qs exit_at_start /var/lib/gpuyard-lab/engine.json"
        ),
        (
            Parameter("code", "exit code", "1", between=(1, 255)),
            Parameter("message", "its last words", "error: unrecognized arguments: --no-such-flag"),
        ),
        needs=("simulated engine",),
    ),
    Fault(
        "engine-cuda-error",
        "the driver is too old for the engine's CUDA: error 803 or 804 at start",
        "gpustack/gpustack#1254",
        ("F23",),
        cuda,
        lambda injection: Probe(f"grep -qs 'Error {injection['error']}' /var/lib/gpuyard-lab/engine.json"),
        (Parameter("error", "which", "804", among=("803", "804")),),
        needs=("simulated engine",),
    ),
    Fault(
        "engine-stopped",
        "the engine's core stands still (SIGSTOP)",
        "vllm-project/vllm#39863",
        ("F33",),
        stopped,
        lambda _: Probe(
            '[ -e "$keep/pids" ] || exit 1\n'
            'for pid in $(cat "$keep/pids"); do grep -q "^State:.T" /proc/$pid/status || exit 1; done'
        ),
        (ONE,),
        needs=("engine",),
    ),
    Fault(
        "devices-gone",
        "`systemctl daemon-reload` takes the GPUs away from a running engine",
        "NVIDIA/nvidia-container-toolkit#48, #1227",
        ("F18",),
        devices_gone,
        lambda injection: Probe(
            f'{chosen_unit(injection)}group=/sys/fs/cgroup$(systemctl show -p ControlGroup --value "$unit")\n'
            '[ -d "$group" ] && ! sh -c \'echo $$ >"$1"/cgroup.procs && : </dev/full\' sh "$group" 2>/dev/null'
        ),
        (ONE,),
        needs=("engine",),
    ),
)
