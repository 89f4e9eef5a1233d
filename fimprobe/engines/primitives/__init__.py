"""Products with Jacobians by backward passes only, random signs, transfers between devices."""
