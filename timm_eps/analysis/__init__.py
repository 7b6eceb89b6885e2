"""Value and cost of each branch, and the choice of branches to remove for a budget."""
