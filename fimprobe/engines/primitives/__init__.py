"""Products with Jacobians by backward passes, random signs, transfers between devices."""
