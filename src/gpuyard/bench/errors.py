"""What the load client refuses, as part of the one tree of refusals."""

from gpuyard.spec.errors import RefusedError


class BenchError(RefusedError):
    """An address that cannot be measured: it does not answer, or not the same twice."""
