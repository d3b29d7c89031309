"""What a plan may say of a fleet, or of what it did not choose: each rule by its id, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanRule:
    says: str
    reason: str


RULES: dict[str, PlanRule] = {
    "FIT-UNKNOWN": PlanRule(
        "a model or a GPU is one whose memory the catalog can reckon",
        "without layers and sizes nothing that follows can be told",
    ),
    "SIZE-TENSOR-PARALLEL": PlanRule(
        "tensor_parallel_size is written down where one GPU does not hold the model",
        "vLLM takes 1 where the flag is left out, and would not start",
    ),
    "SIZE-GPUS": PlanRule(
        "the models of a pool take no more GPUs than its nodes have",
        "every model of a pool runs on each of its nodes, each shard of each copy on a GPU of its own",
    ),
    "SIZE-IDLE-GPUS": PlanRule(
        "every GPU that is paid has a model", "an engine uses tensor_parallel_size x data_parallel_size GPUs, no more"
    ),
    "SIZE-SPARE": PlanRule("a pool has more nodes than stand by", "nodes that stand by serve nothing"),
    "SIZE-ONE-NODE": PlanRule(
        "a pool has a second node", "the only node of a pool takes its models away with each upgrade"
    ),
    "SIZE-CACHE": PlanRule(
        "local NVMe holds the models of a node and the next revision of the largest",
        "a new revision is fetched and verified beside the one that serves",
    ),
    "SIZE-LINK": PlanRule(
        "tensor parallelism loses no more tokens/s to all-reduces than planning says",
        "two all-reduces in each layer wait for the slowest link",
    ),
    "SIZE-LARGER": PlanRule(
        "the fewest GPUs that hold a model are taken first",
        "more GPUs hold more requests at once, and pay for it in all-reduces",
    ),
    "SIZE-NODES": PlanRule(
        "an engine stays within a node", "one that spans nodes stops with any of them, and gpuyard starts none"
    ),
    "SIZE-COLD-START": PlanRule(
        "a restarted engine answers within planning.cold_start_seconds",
        "weights are read and the engine is made ready before the first answer",
    ),
    "SIZE-LOAD": PlanRule(
        "the nodes in service carry peak_tokens_per_second", "what is above their capacity waits or is turned away"
    ),
    "SIZE-LOAD-UPGRADE": PlanRule(
        "they carry it with a node less", "an upgrade takes one node after the other out of service"
    ),
    "SIZE-ASKED": PlanRule(
        "the spec's own machine is planned", "another one would do as well; nobody can compare them"
    ),
    "POWER-RACK": PlanRule(
        "a rack carries its nodes with all GPUs at their limit",
        "above its feed the breaker opens, or power is capped and the clocks fall",
    ),
    "COST-PRICE": PlanRule(
        "a machine has a price in its region and purchase", "without one it is in no bill and no comparison"
    ),
    "COST-OLD-PRICE": PlanRule("a price was read lately", "prices of GPUs move by tens of percent within a year"),
    "COST-SPOT": PlanRule(
        "a pool that has to serve is not bought as spot",
        "spot machines are taken back with minutes' notice, often many",
    ),
    "COST-THROUGHPUT": PlanRule(
        "the tokens/s behind a price were measured",
        "published figures lie between 0.35 and 0.84 of what is reckoned from bandwidth and FLOPS",
    ),
    "COST-CHEAPER": PlanRule(
        "the spec's own machine is planned",
        "the other one would answer the same tokens for less if it were always busy; `--choose` weighs whole nodes",
    ),
    "COST-DEARER": PlanRule("the least bill is chosen", "the other machine costs more for the same tokens"),
}
