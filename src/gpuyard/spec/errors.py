"""The one tree of refusals.

RefusedError                 rule, what was found, why, the smallest change that would pass
├── spec.loader.SpecError    every finding of a file at once
├── plan.lock.LockError
│   └── plan.lock.NewerLockError
├── plan.names.UnknownError     no row of the catalog has this name
├── plan.resolve.PlanError      every reason why there is no lock
├── upgrade.waves.UpgradeError
├── upgrade.record.RecordError
├── handover.HandoverError
└── handover.inventory.InventoryError
"""


class RefusedError(Exception):
    """Refused on purpose: one line that says what was found, why it is refused and what would pass."""

    def __init__(self, rule: str, found: str, why: str, change: str) -> None:
        self.rule = rule
        self.found = found
        self.why = why
        self.change = change
        super().__init__(f"{rule}: {found}: {why}; {change}")
