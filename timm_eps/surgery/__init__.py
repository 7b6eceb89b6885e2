"""Changes of networks: adding gates, finding and removing branches, and updating optimizers and weight averages."""
