"""What each branch is worth and costs, and which ones to remove for a budget."""
