"""The lab's engine: vLLM as its clients, its gateway and its systemd unit see it, without a model behind it.

It runs on a node, from a tree of its own like the real one (`vllm-sim` in the catalog): Python 3.9 and the standard
library alone. What it shares with the real engine is what `tests/contract` asks of both.
"""
