"""What can go wrong in a lab, on purpose: one table of faults, and the hands that break and mend."""
