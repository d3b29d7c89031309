"""All compatibility rules, by id: each of these files registers its own."""

from gpuyard.plan.rules import cuda, driver, engine, network, node
from gpuyard.plan.rules.rule import RULES

__all__ = ["RULES", "cuda", "driver", "engine", "network", "node"]
