"""Probes that look at a node and change nothing: one per file, each with one verdict.

They run with the node's own Python (3.9 and later) and its standard library. `roles/node_health` ships this folder as
it is to /usr/local/lib/gpuyard/health, where `python3 /usr/local/lib/gpuyard/health '[{"check": …}]'` runs them.
"""
