"""What can go wrong, tried: `make faults`. Each module beside this one is a part with `run(budget_s, full, out) -> dict`."""
