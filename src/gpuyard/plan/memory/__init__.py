"""How a GPU's memory is shared out when vLLM starts: weights, activations, the rest, and the KV cache."""
