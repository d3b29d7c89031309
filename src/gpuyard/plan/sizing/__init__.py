"""What a fleet's models need and what that costs: network, storage, power and money, with the arithmetic."""
